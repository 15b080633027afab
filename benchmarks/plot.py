"""The plot of a record: speed over eager torch, one panel per op and phase."""

from pathlib import Path

from benchmarks.case import BARE, EAGER
from benchmarks.schema import CaseResult, Record

_OTHERS = {"marker": "o", "markersize": 5, "alpha": 0.7}
_OURS = {"marker": "D", "markersize": 8, "markeredgecolor": "black", "ecolor": "black"}


def write(record: Path) -> None:
    """Draws the PNG beside a record; medians with quartiles.

    Without the bare kernel, beside which nothing else of a panel would be told apart.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple[str, str], list[CaseResult]] = {}
    colours: dict[str, str] = {}  # the same in all panels
    for case in Record.load(record).cases:
        groups.setdefault((case.op, case.phase), []).append(case)
        for entry in case.entries:
            if entry.name not in (EAGER, BARE):
                colours.setdefault(entry.name, f"C{len(colours)}")
    columns = len({phase for _, phase in groups})
    rows = -(-len(groups) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 1 + 3 * rows), squeeze=False, layout="constrained"
    )
    handles = {}
    for axes, ((op, phase), cases) in zip(grid.flat, groups.items(), strict=False):
        for name, colour in colours.items():
            points = [
                (row, entry.speedup[EAGER], entry.ours)
                for row, case in enumerate(cases)
                for entry in case.entries
                if entry.name == name and EAGER in entry.speedup
            ]
            if not points:
                continue
            y, spreads, ours = zip(*points, strict=True)
            medians = [s.median for s in spreads]
            errors = (
                [s.median - s.low for s in spreads],
                [s.high - s.median for s in spreads],
            )
            style = _OURS if ours[0] else _OTHERS
            handles[name] = axes.errorbar(
                medians, y, xerr=errors, linestyle="", color=colour, **style
            )
        axes.axvline(1, color="grey", linewidth=1)
        axes.set_yticks(range(len(cases)), [_label(case) for case in cases])
        axes.invert_yaxis()
        axes.set_title(f"{op}, {phase}", fontsize=10)
        axes.set_xlabel("times faster than eager torch")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    figure.savefig(record.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


def _label(case: CaseResult) -> str:
    told = [f"{name}={case.sizes[name]}" for name in ("r", "groups") if name in case.sizes]
    return " ".join([case.shape, *told])
