"""A route of one model, and what it costs there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from snkernels.layers import StitchingLayer
from snkernels.models.anchors import Anchor, embed_parameters, readout_parameters, vit_shape
from snkernels.routing.cost import route_flops
from snkernels.routing.space import Route, Stitch


@dataclass(frozen=True)
class ModelRoute(Route):
    """A route and what it costs in one model.

    Attributes:
        flops: Multiply-adds for one image, low-rank parts merged.
        parameters: Numbers held by the parameters it uses, low-rank parts included.
    """

    flops: int
    parameters: int


def priced(
    route: Route, anchors: tuple[Anchor, Anchor], stitch: Callable[[Stitch], StitchingLayer]
) -> ModelRoute:
    """Add to a route what it costs between these anchors.

    Args:
        route: The route.
        anchors: The small and the large anchor.
        stitch: Gives the layer of a stitch.
    """
    parameters = [
        *embed_parameters(anchors[route.segments[0].anchor]),
        *readout_parameters(anchors[route.segments[-1].anchor]),
    ]
    for crossed in route.stitches:
        parameters += stitch(crossed).parameters()
    for segment in route.segments:
        blocks = anchors[segment.anchor].blocks
        parameters += blocks[segment.start : segment.stop].parameters()
    small, large = map(vit_shape, anchors)
    return ModelRoute(
        route.id,
        route.segments,
        route.stitches,
        flops=route_flops(route, small, large),
        parameters=sum(parameter.numel() for parameter in parameters),
    )
