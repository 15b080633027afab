"""How long the parts of a stitched model take on a device, and so how long each route will."""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise, zip_longest
from typing import Any, Literal

import torch

from snkernels.integers import integer, integers
from snkernels.models.anchors import embed, finish, image_shape
from snkernels.models.blocks import entry_norm, parts_of, run_block
from snkernels.models.executor import slices
from snkernels.models.modes import inference
from snkernels.models.setting import is_compiled, setting_of, shapes_of
from snkernels.models.stitched import StitchedViT
from snkernels.models.wrappers import inside
from snkernels.progress import progress_bar
from snkernels.routing.latency import PARTS, Check, Parts, Profile
from snkernels.routing.plan import plan
from snkernels.routing.space import LARGE, SMALL, Route, Segment, Stitch, StitchingSpace

_CHECKS = 8
# Whole routes that are run between one time that the parts are measured and the next.
_CHUNK = 12

# Name of a part, and the anchor that it belongs to.
_Part = tuple[str, int]


def profile(
    model: StitchedViT,
    batch_sizes: int | Sequence[int],
    device: torch.device | str | None = None,
    *,
    check: Literal["all"] | Iterable[int] | None = None,
    rounds: int = 5,
    seconds: float = 2.0,
    progress: bool = True,
) -> Profile:
    """Measure the parts of a model, predict its routes by adding up, and check that on real runs.

    Parts are timed where they stand in a forward pass, one after another along walks through both
    anchors and over every switch, so that weights are as far from the processor's caches, and
    activations as near, as when a route runs. Medians over the rounds are kept; blocks of one
    anchor count as alike, and so do stitches of one direction.

    Whole routes are run in turns with the walks, and each run is compared with the parts as they
    were right before and after it, so that a machine which is slow for some seconds does not count
    as an error of the prediction.

    The model is measured as it is: compiled blocks are measured compiled. It runs in eval mode and
    inference mode, and the training flags of its modules are restored. On an otherwise idle machine
    the figures mean most. On a GPU parts are timed by events on its stream, without graphs.

    Args:
        model: A stitched model.
        batch_sizes: Images per call, one size or some, each 1 or more.
        device: Where to measure; None for where the model is. Elsewhere a copy of it is measured,
            unless it is compiled.
        check: Ids of the routes to run whole, or "all"; None for eight, from the cheapest to the
            costliest.
        rounds: How often each part and each checked route is measured at least.
        seconds: For how long, at each batch size, where that many rounds take less.
        progress: Whether to show a progress bar when it takes more than seconds; needs tqdm.

    Raises:
        TypeError: If a batch size or an id is no integer.
        ValueError: If there are no batch sizes, one of them or ``rounds`` is below 1, ``seconds``
            is no time, no route has an id, none is to be checked, or compiled blocks are to be
            measured elsewhere.
    """
    model = inside(model, compiled=False)
    sizes = sorted(integers("batch_sizes", batch_sizes, 1))
    rounds = integer("rounds", rounds, 1)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds must be 0 or more, got {seconds}")
    if check is None:
        routes: list[Route] = _spread(model, _CHECKS)
    else:
        routes = model.space.named(check, "check")
    if device is not None and torch.empty(0, device=device).device != _device(model):
        if is_compiled(model):
            raise ValueError(
                f"device must be {_device(model)}, where the model is, got {device}: a copy of "
                "compiled blocks is not compiled"
            )
        model = copy.deepcopy(model).to(device)
    samples = {size: _Samples(model, size, routes) for size in sizes}
    turns: list[_Samples] = []
    with inference(model, _device(model).type):
        for size in sizes:
            start = time.perf_counter()
            warm_up = _Samples(model, size, routes[:1])
            warm_up.take()
            per_run = (time.perf_counter() - start) / warm_up.runs
            fitting = int(seconds / (per_run * samples[size].runs))
            turns += [samples[size]] * max(rounds, fitting)
        for turn in progress_bar(turns, "profile: rounds", progress):
            turn.take()
    parts = {size: samples[size].parts() for size in sizes}
    checks = tuple(
        Check(size, route.id, predicted, predicted * statistics.median(ratios))
        for size in sizes
        for route, ratios in samples[size].route_ratios.items()
        for predicted in [parts[size].seconds(route)]
    )
    return Profile(setting_of(model), shapes_of(model), parts, checks)


class _Samples:
    """The times of parts and of whole routes at one batch size."""

    def __init__(self, model: StitchedViT, batch_size: int, routes: Sequence[Route]) -> None:
        like = next(model.parameters())
        shape = (batch_size, *image_shape(model.small))
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.model, self.images = model, images.to(like.device, like.dtype)
        self.parts_seconds: list[dict[_Part, float]] = []  # one for each walk
        # What each run took, over the sum of its parts at that time.
        self.route_ratios: dict[Route, list[float]] = {route: [] for route in routes}
        self.random = random.Random(0)

    @property
    def runs(self) -> int:
        """How many forward passes ``take`` makes."""
        chunks = math.ceil(len(self.route_ratios) / _CHUNK)
        return 4 * (chunks + 1) + len(self.route_ratios)

    def take(self) -> None:
        """Measure everything once, whole routes in a new order."""
        routes = list(self.route_ratios)
        self.random.shuffle(routes)
        before = self._walks()
        for start in range(0, len(routes), _CHUNK):
            seconds = {route: self._run(route) for route in routes[start : start + _CHUNK]}
            after = self._walks()
            around = _parts(before + after)
            for route, taken in seconds.items():
                self.route_ratios[route].append(taken / around.seconds(route))
            before = after

    def parts(self) -> Parts:
        """Medians over what was measured."""
        return _parts(self.parts_seconds)

    def _walks(self) -> list[dict[_Part, float]]:
        """Measure all parts once, each along every path that has it."""
        space = self.model.space
        paths = (space.route(SMALL), space.route(LARGE), *_zigzags(space))
        # Not the median: a route pays for all its blocks, the slow ones too.
        walks = [
            {part: statistics.mean(seconds) for part, seconds in self._walk(path).items()}
            for path in paths
        ]
        self.parts_seconds += walks
        return walks

    def _run(self, route: Route) -> float:
        watch = _watch(self.images.device)
        self.model(self.images, stitch=route.id)
        watch.lap()
        (seconds,) = watch.read()
        return seconds

    def _walk(self, path: Route) -> dict[_Part, list[float]]:
        """Run a path as a call does, and time its parts on the way."""
        model: Any = self.model
        parts: list[tuple[_Part, int]] = []  # and the block, which slices run one after another
        watch = _watch(self.images.device)

        def lap(name: str, anchor: int, block: int = 0) -> None:
            watch.lap()
            parts.append(((name, anchor), block))

        # A call checks its images and looks its plan up before anything runs.
        anchor = path.segments[0].anchor
        model._check_batch(self.images)
        plan([(i, model.space.route(anchor)) for i in range(len(self.images))], model.space)
        blocks = model.anchors[anchor].blocks
        h = embed(model.anchors[anchor], self.images)
        norm = entry_norm(blocks[0])
        normed = norm(h) if norm else None
        lap("embed", anchor)
        for segment, stitch in zip_longest(path.segments, path.stitches):
            anchor, blocks = segment.anchor, model.anchors[segment.anchor].blocks
            last = segment.stop - 1
            outs = []
            for stream in map(list[Any], slices(model.anchors[anchor], h, normed)):
                between = range(segment.start, segment.stop)
                chain = {i: parts_of(blocks[i], h) for i in between}
                for i in between:
                    if i == last and stitch is None:
                        finish(model.anchors[anchor], stream[0], i, stream[1])
                        lap("finish", anchor, i)
                    else:
                        following = chain.get(i + 1)
                        run_block(blocks[i], chain[i], stream, following and following.norm1)
                        lap("block" if i < last else "exit", anchor, i)
                outs.append(stream[0])
            if stitch is not None:
                h = outs[0] if len(outs) == 1 else torch.cat(outs)
                layer = model.stitch_layers[anchor][stitch.index]
                entered = model.anchors[1 - anchor].blocks
                norm = entry_norm(entered[model.space.cuts[stitch.index][1 - anchor]])
                h, normed = layer.forward_norm(h, norm) if norm else (layer(h), None)
                lap("switch", anchor, stitch.index)
        totals: dict[tuple[_Part, int], float] = defaultdict(float)
        for place, lap_seconds in zip(parts, watch.read(), strict=True):
            totals[place] += lap_seconds
        seconds: dict[_Part, list[float]] = defaultdict(list)
        for (name_and_anchor, _), total in totals.items():
            seconds[name_and_anchor].append(total)
        return seconds


def _parts(walks: Sequence[dict[_Part, float]]) -> Parts:
    """Medians over walks."""
    times: dict[_Part, list[float]] = defaultdict(list)
    for walk in walks:
        for part, seconds in walk.items():
            times[part].append(seconds)
    medians = {part: statistics.median(each) for part, each in times.items()}

    def pair(name: str) -> tuple[float, float]:
        return medians.get((name, SMALL), 0.0), medians.get((name, LARGE), 0.0)

    return Parts(*map(pair, PARTS))


class _Watch:
    """Seconds between laps by the wall clock; the first lap begins now."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def lap(self) -> None:
        """End a lap and begin the next."""
        self.times.append(time.perf_counter())

    def read(self) -> list[float]:
        """Seconds of each lap."""
        return [end - start for start, end in pairwise(self.times)]


class _GPUWatch:
    """The same by events on the current stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)
        self.stream = torch.cuda.current_stream(device)
        self.events: list[torch.cuda.Event] = []
        self.lap()

    def lap(self) -> None:
        """End a lap and begin the next, when the GPU comes to it."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        self.events.append(event)

    def read(self) -> list[float]:
        """Seconds of each lap, when the GPU is done."""
        self.events[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(self.events)]


def _watch(device: torch.device) -> _Watch | _GPUWatch:
    return _GPUWatch(device) if device.type == "cuda" else _Watch()


def _device(model: StitchedViT) -> torch.device:
    return next(model.parameters()).device


def _zigzags(space: StitchingSpace) -> list[Route]:
    """Two paths through both anchors that change over at every cut: from S, and from L."""
    bounds = [(0, 0), *space.cuts]
    paths = []
    for first in (SMALL, LARGE):
        anchors = [(first + k) % 2 for k in range(len(space.cuts))]
        segments = (
            Segment(anchor, start[anchor], stop[anchor])
            for anchor, (start, stop) in zip(anchors, pairwise(bounds), strict=True)
        )
        stitches = (Stitch(anchor, k) for k, anchor in enumerate(anchors[:-1]))
        paths.append(Route(-1, tuple(segments), tuple(stitches)))
    return paths


def _spread(model: StitchedViT, count: int) -> list[Route]:
    """Routes from the cheapest to the costliest, about evenly far apart in number."""
    by_cost = sorted(model.routes, key=lambda route: route.flops)
    last = len(by_cost) - 1
    places = {round(i * last / (count - 1)) for i in range(count)}
    return [by_cost[place] for place in sorted(places)]
