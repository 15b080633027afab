"""The picture of an evaluation: accuracy over cost, with the Pareto front."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from snkernels.routing.space import LARGE, SMALL

if TYPE_CHECKING:
    from snkernels.evaluation import Evaluation, Score

# Colours of Okabe and Ito (2008), which the colour-blind can tell apart; so can the markers.
_STYLES = {
    "S→L": {"marker": "o", "color": "#0072B2"},
    "L→S": {"marker": "^", "color": "#D55E00"},
    "L→S→L": {"marker": "s", "color": "#009E73"},
    "S→L→S": {"marker": "D", "color": "#CC79A7"},
}
_ANCHORS = {SMALL: "S", LARGE: "L"}
_INK = "#222222"


def draw(evaluation: Evaluation, path: str | os.PathLike[str], title: str | None = None) -> None:
    """Draw top-1 over multiply-adds per image, one point per route.

    Marker and colour tell the direction; points on the front are filled and joined by a line, the
    anchors are named, and a dashed line joins them.

    Args:
        evaluation: What to draw.
        path: Where to write; the suffix, such as ``.png`` or ``.svg``, sets the format.
        title: Above the picture; None for none.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'snkernels[demo]'") from error

    scale, unit = _unit(max(s.flops for s in evaluation.scores))
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()

    def points(scores: list[Score]) -> tuple[list[float], list[float]]:
        return [s.flops / scale for s in scores], [s.top1 for s in scores]

    front = evaluation.front()
    anchors = [s for s in evaluation.scores if s.id in _ANCHORS]
    if len(anchors) == len(_ANCHORS):
        axes.plot(
            *points(anchors),
            linestyle=(0, (4, 3)),
            linewidth=1,
            color="0.55",
            label="line between anchors",
        )
    axes.plot(*points(front), linewidth=1.6, color=_INK, label="Pareto front (filled)", zorder=2)
    for direction, style in _STYLES.items():
        scores = [s for s in evaluation.scores if s.direction == direction]
        on, off = ([s for s in scores if s.on_front is front] for front in (True, False))
        options: dict[str, Any] = {"linestyle": "", "markersize": 6.5, "zorder": 3, **style}
        if off:
            axes.plot(*points(off), markerfacecolor="none", markeredgewidth=1.3, **options)
        if on:
            axes.plot(*points(on), **{**options, "zorder": 3.5})
        if scores:
            axes.plot([], [], label=f"{direction} ({len(scores)})", **options)
    for s in anchors:
        axes.plot(
            s.flops / scale,
            s.top1,
            marker="*",
            markersize=15,
            color=_INK,
            markeredgecolor="white",
            linestyle="",
            zorder=4,
        )
        axes.annotate(
            f"{_ANCHORS[s.id]}\n{s.top1:.1f} %",
            (s.flops / scale, s.top1),
            # The front leaves S to the upper right, so its label stands to the left.
            xytext=(0, 9),
            ha={SMALL: "right", LARGE: "center"}[s.id],
            textcoords="offset points",
            fontweight="bold",
            color=_INK,
        )
    axes.set_xlabel(f"cost per image ({unit} multiply-adds)")
    axes.set_ylabel(f"top-1 accuracy on {evaluation.images:,} images (%)")
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    axes.margins(x=0.1, y=0.14)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def _unit(largest: float) -> tuple[float, str]:
    return (1e9, "billion") if largest >= 1e9 else (1e6, "million")
