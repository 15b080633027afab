"""The plot of a record: speed over eager torch, one panel per op and phase."""

from pathlib import Path

from benchmarks.case import EAGER
from benchmarks.schema import CaseResult, Record

_OTHERS = {"marker": "o", "markersize": 5, "alpha": 0.7}
_OURS = {"marker": "D", "markersize": 8, "color": "black", "markerfacecolor": "tab:red"}


def write(record: Path) -> None:
    """Draws the PNG beside a record; medians with quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple[str, str], list[CaseResult]] = {}
    for case in Record.load(record).cases:
        groups.setdefault((case.op, case.phase), []).append(case)
    columns = len({phase for _, phase in groups})
    rows = -(-len(groups) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 1 + 3 * rows), squeeze=False, layout="constrained"
    )
    for axes, ((op, phase), cases) in zip(grid.flat, groups.items(), strict=False):
        names = dict.fromkeys(entry.name for case in cases for entry in case.entries)
        for name in names:
            if name == EAGER:
                continue
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
            axes.errorbar(medians, y, xerr=errors, linestyle="", label=name, **style)
        axes.axvline(1, color="grey", linewidth=1)
        axes.set_yticks(range(len(cases)), [f"{case.shape} {_rank(case)}" for case in cases])
        axes.invert_yaxis()
        axes.set_title(f"{op}, {phase}", fontsize=10)
        axes.set_xlabel("times faster than eager torch")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(record.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


def _rank(case: CaseResult) -> str:
    return f"r={case.sizes['r']}" if "r" in case.sizes else ""
