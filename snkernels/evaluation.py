"""Every route measured on labelled images in one pass over the data, and the Pareto front of it."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snkernels import collectives
from snkernels.batches import Share, Tally, batch_order, digest
from snkernels.files import replacing
from snkernels.journal import Journal
from snkernels.models.anchors import describe
from snkernels.models.model_route import ModelRoute
from snkernels.models.modes import inference
from snkernels.models.stitched import StitchedViT
from snkernels.models.wrappers import inside
from snkernels.progress import progress_bar
from snkernels.routing.cost import pareto_front
from snkernels.routing.space import LARGE, SMALL
from snkernels.text import aligned

_TOP = 5


@dataclass(frozen=True)
class Score:
    """What one route costs and reaches.

    Attributes:
        route: The route.
        top1: Images classified right, in percent.
        top5: Images whose class is among the five best, in percent; None with five classes or
            fewer, where it says nothing.
        loss: Mean cross-entropy, in nats.
        on_front: Whether no other evaluated route is at least as cheap and at least as accurate
            (top-1), and better in one of the two.
    """

    route: ModelRoute
    top1: float
    top5: float | None
    loss: float
    on_front: bool

    @property
    def id(self) -> int:
        """Id of the route."""
        return self.route.id

    @property
    def direction(self) -> str:
        """The anchors in the order of the route, such as ``"S→L"``."""
        return self.route.direction

    @property
    def flops(self) -> int:
        """Multiply-adds for one image."""
        return self.route.flops


@dataclass(frozen=True)
class Evaluation:
    """The scores of all evaluated routes, in the order in which they were asked for.

    Attributes:
        scores: One per route.
        images: Number of images that each route classified.
    """

    scores: tuple[Score, ...]
    images: int

    def front(self) -> list[Score]:
        """The scores on the Pareto front, cheapest first."""
        return sorted((s for s in self.scores if s.on_front), key=lambda s: s.flops)

    @property
    def has_anchors(self) -> bool:
        """Whether both anchors were evaluated, so that the line between them is known."""
        return {SMALL, LARGE} <= {s.id for s in self.scores}

    def above_line(self, score: Score) -> float:
        """Percentage points of top-1 by which a route beats what the anchors alone would give.

        That is the straight line between the anchors over cost: what one gets at the same mean cost
        by sending a share of the images through the small anchor and the rest through the large.

        Raises:
            ValueError: If one of the anchors was not evaluated, or both cost the same.
        """
        anchors = {s.id: s for s in self.scores if s.id in (SMALL, LARGE)}
        if len(anchors) < 2 or anchors[SMALL].flops == anchors[LARGE].flops:
            raise ValueError("scores must hold both anchors, routes 0 and 1, at different costs")
        small, large = anchors[SMALL], anchors[LARGE]
        share = (score.flops - small.flops) / (large.flops - small.flops)
        return score.top1 - (small.top1 + share * (large.top1 - small.top1))

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line per route: id, route, direction, flops, top1, top5, loss, on_front.

        Percentages have four decimals, the loss has six; top5 is empty where there is none.

        Raises:
            OSError: If the file cannot be written.
        """
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(
                ("id", "route", "direction", "flops", "top1", "top5", "loss", "on_front")
            )
            for s in self.scores:
                percents = f"{s.top1:.4f}", "" if s.top5 is None else f"{s.top5:.4f}"
                row = s.id, s.route, s.direction, s.flops, *percents, f"{s.loss:.6f}"
                writer.writerow((*row, int(s.on_front)))

    def plot(self, path: str | os.PathLike[str], title: str | None = None) -> None:
        """Draw top-1 over cost into a file, in the format of its suffix; see ``pareto_plot``.

        Raises:
            ImportError: If matplotlib is not installed.
            OSError: If the file cannot be written.
        """
        from snkernels.pareto_plot import draw

        draw(self, path, title)

    def table(self) -> str:
        """The scores as text for a terminal, cheapest route first."""
        top5 = any(s.top5 is not None for s in self.scores)
        rows = [["id", "route", "MFLOPs", "top-1 %", *["top-5 %"] * top5, "loss", "front"]]
        for s in sorted(self.scores, key=lambda s: (s.flops, s.id)):
            rows.append(
                [
                    str(s.id),
                    str(s.route),
                    f"{s.flops / 1e6:,.2f}",
                    f"{s.top1:.2f}",
                    *([] if s.top5 is None else [f"{s.top5:.2f}"]),
                    f"{s.loss:.3f}",
                    "yes" if s.on_front else "no",
                ]
            )
        return aligned(rows, right={0, *range(2, len(rows[0]) - 1)})

    def summary(self) -> str:
        """Where stitched routes beat the line between the anchors and where not, in plain words.

        Raises:
            ValueError: See `above_line`.
        """
        gains = {s: self.above_line(s) for s in self.scores}
        small, large = (next(s for s in gains if s.id == anchor) for anchor in (SMALL, LARGE))
        stitched = [s for s in gains if s.route.stitches]
        noise = math.sqrt(large.top1 * (100 - large.top1) / self.images)
        lines = [
            f"Anchors: S {_reach(small)}, L {_reach(large)}, on {self.images:,} images; one image "
            f"is {100 / self.images:.2f} points, one standard error of L is {noise:.2f}.",
            f"{sum(s.on_front for s in stitched)} of the {len(self.front())} routes on the Pareto "
            "front are stitched.",
        ]
        above = [s for s in stitched if gains[s] > 0]
        lines.append(
            f"{len(above)} of {len(stitched)} stitched routes lie above the straight line between "
            f"the anchors: {_by_direction(stitched, above)}."
        )
        by_gain = sorted(stitched, key=gains.__getitem__)
        if above:
            best = by_gain[-1]
            lines.append(f"Furthest above: {_name(best)}, by {gains[best]:.2f} points.")
        if len(above) < len(stitched):
            worst = by_gain[0]
            lines.append(f"Furthest below: {_name(worst)}, by {-gains[worst]:.2f} points.")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def evaluate(
    model: nn.Module,
    loader: Iterable[Sequence[Any]],
    routes: Literal["all"] | Iterable[int] = "all",
    *,
    resume: str | os.PathLike[str] | None = None,
    max_rows: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure routes on labelled images: top-1, top-5 and loss of each, and the Pareto front.

    The data are read once, and a batch takes all routes in one forward, which computes once what
    several of them begin with. The model runs in eval mode and inference mode, and the training
    flags of its modules are restored.

    Under ``torch.distributed`` every rank must call this, with the same model and a loader of the
    same batches (no ``DistributedSampler``, which would pad). The ranks take turns, a batch each,
    tell each other the sums, and all return the same, bit for bit what one process returns that
    computes a batch with the same bits (device, backend, number of threads). What one rank raises
    all raise.

    Args:
        model: A ``StitchedViT`` on any device, or ``DistributedDataParallel``, an average of
            weights or ``torch.compile`` around one. What is around it takes no part: ranks need not
            keep step, and a pass over many routes would compile for long.
        loader: Batches that begin with images (batch, channels, height, width) of a floating dtype
            and labels (batch,) of an integer dtype. Both are moved to the model's device, images
            also to its dtype. A map-style ``DataLoader`` loads only batches that are measured here
            and now; of anything else the others are read and passed over.
        routes: Ids of the routes to measure, or "all".
        resume: File of finished batches, which the first rank writes and reads. A run that was
            interrupted goes on from it, on any number of ranks, and one that was not gives its
            result at once. It knows weights, routes, precision, the order of the images where the
            loader tells it, and the labels of what it reads again; other pixels it cannot notice.
        max_rows: See ``StitchedViT.forward``; it bounds the memory and changes no result.
        progress: Whether to show a progress bar when it takes more than seconds; needs tqdm.

    Raises:
        TypeError: If ``model`` is something else, an id is no integer, or a batch does not begin
            with images and labels.
        ValueError: If there is no such route, one is named twice or none is; if there are no
            images; if labels are not classes of the model; if logits are not finite; if ``resume``
            is a file of something else; if it or other ranks need a loader of the same batches and
            this is none. The message says which. No finished batch is lost.
        OSError: If ``resume`` cannot be read or written.
        RuntimeError: If another rank failed; the message names it and says how.
    """
    shared = resume is not None or collectives.world_size() > 1
    with collectives.agreed():
        model = inside(model)
        if not isinstance(loader, Iterable):
            kind = type(loader).__name__
            raise TypeError(f"loader must be an iterable, such as a DataLoader, got {kind}")
        wanted = _wanted(model, routes)
        order = batch_order(loader) if shared else None
        facts = _facts(model, wanted, loader, order) if shared else {}
    for rank, others in enumerate(collectives.gather(facts)):
        for fact, value in facts.items():
            if others[fact] != value:
                raise ValueError(
                    f"all ranks must measure the same, but {fact} is {others[fact]!r} on rank "
                    f"{rank} and {value!r} on rank {collectives.rank()}"
                )
    with ExitStack() as stack:
        journal: Journal | None = None
        done: dict[int, Tally] = {}
        whole = False
        with collectives.agreed():
            if resume is not None and collectives.rank() == 0:
                journal = stack.enter_context(closing(Journal(resume, facts)))
                done, whole = _found(journal, len(wanted))
        done, whole = collectives.gather((done, whole))[0]
        stack.enter_context(inference(model, next(model.parameters()).device.type))
        share = Share(loader, order, model.small.num_classes, done, whole)
        _measure_all(model, wanted, max_rows, share, done, journal, progress)
        with collectives.agreed():
            if journal is not None and not whole:
                journal.append([{"batches": len(done)}])
    return _summed(wanted, [done[index] for index in sorted(done)], model.small.num_classes)


def _facts(
    model: StitchedViT,
    wanted: Sequence[ModelRoute],
    loader: Iterable[Any],
    order: Sequence[Any] | None,
) -> dict[str, Any]:
    """What must be equal for batches that were measured elsewhere, or before, to be of use here."""
    like = next(model.parameters())
    precision = str(like.dtype)
    if torch.is_autocast_enabled(like.device.type):
        precision += f" under autocast to {torch.get_autocast_dtype(like.device.type)}"
    state = model.state_dict()
    shapes = json.dumps([describe(vit) for vit in (model.small, model.large)])
    try:
        batches = len(loader)  # type: ignore[arg-type]
    except TypeError:
        batches = None
    return {
        "snkernels evaluation": 1,
        "weights": digest(state.values(), shapes, *state),
        "precision": precision,
        "routes": [route.id for route in wanted],
        "classes": model.small.num_classes,
        "batches": batches,
        "order": None if order is None else digest([], repr(order)),
    }


def _found(journal: Journal, routes: int) -> tuple[dict[int, Tally], bool]:
    """Return the batches that a journal holds, and whether they are all."""
    done: dict[int, Tally] = {}
    whole = False
    for entry in journal.entries:
        try:
            if entry.keys() == {"batches"}:
                whole = True
                continue
            tally = Tally(**entry)
            counts = [len(tally.top1), len(tally.top5), len(tally.loss)]
        except TypeError:
            counts = []
        if counts != [routes] * 3:
            raise ValueError(f"{journal.path} is damaged: {entry} is no finished batch")
        done[tally.batch] = tally
    return done, whole


def _measure_all(
    model: StitchedViT,
    wanted: Sequence[ModelRoute],
    max_rows: int | None,
    share: Share,
    done: dict[int, Tally],
    journal: Journal | None,
    progress: bool,
) -> None:
    """Measure the batches of the share, and add to what is done those of all ranks."""
    name = f"evaluation, {len(wanted)} routes: batches"
    batches = iter(progress_bar(share, name, progress and collectives.rank() == 0))
    going = True
    while going:
        tally, failure = None, None
        try:
            batch = next(batches, None)
            share.compare()
            tally = None if batch is None else _measured(model, wanted, max_rows, *batch)
        except Exception as error:
            failure = error
        fresh = [tally for tally in collectives.gather(tally) if tally is not None]
        done.update((tally.batch, tally) for tally in fresh)
        going = bool(fresh)
        with collectives.agreed():
            # First, so that an error of one rank loses nothing that another has finished.
            if journal is not None:
                journal.append(asdict(tally) for tally in fresh)
            if failure is not None:
                raise failure
        if not going:
            with collectives.agreed():
                share.close()


def _measured(
    model: StitchedViT,
    wanted: Sequence[ModelRoute],
    max_rows: int | None,
    index: int,
    images: Tensor,
    labels: Tensor,
) -> Tally:
    like = next(model.parameters())
    known = digest([labels])
    images, labels = images.to(like.device, like.dtype), labels.to(like.device, torch.long)
    logits = model(images, routes=[route.id for route in wanted], max_rows=max_rows)
    rates = torch.stack([_rate(each, labels) for each in logits]).tolist()
    for route, (_, _, loss) in zip(wanted, rates, strict=True):
        if not math.isfinite(loss):
            raise ValueError(
                f"logits of route {route.id} ({route}) must be finite, got others in batch {index}"
            )
    top1, top5, losses = zip(*rates, strict=True)
    return Tally(index, len(labels), known, [*map(int, top1)], [*map(int, top5)], list(losses))


def _summed(wanted: Sequence[ModelRoute], tallies: Sequence[Tally], classes: int) -> Evaluation:
    images = sum(tally.images for tally in tallies)
    top1 = [100 * sum(t.top1[i] for t in tallies) / images for i in range(len(wanted))]
    top5 = [100 * sum(t.top5[i] for t in tallies) / images for i in range(len(wanted))]
    front = set(pareto_front([route.flops for route in wanted], top1))
    scores = tuple(
        Score(
            route,
            top1=top1[i],
            top5=top5[i] if classes > _TOP else None,
            # Rounded once, so that it does not depend on the order of the batches.
            loss=math.fsum(t.loss[i] for t in tallies) / images,
            on_front=i in front,
        )
        for i, route in enumerate(wanted)
    )
    return Evaluation(scores, images)


def _reach(score: Score) -> str:
    return f"{score.top1:.2f} % at {score.flops / 1e6:,.2f} MFLOPs"


def _name(score: Score) -> str:
    return f"route {score.id} ({score.route}), {_reach(score)}"


def _by_direction(scores: Sequence[Score], chosen: Sequence[Score]) -> str:
    """For each direction how many of its routes were chosen, as text."""
    directions = dict.fromkeys(s.direction for s in scores)
    return ", ".join(
        f"{direction} {sum(s.direction == direction for s in chosen)}"
        f" of {sum(s.direction == direction for s in scores)}"
        for direction in directions
    )


def _rate(logits: Tensor, labels: Tensor) -> Tensor:
    """Images right, images with their class among the five best, and loss, summed over a batch."""
    hits = logits.topk(min(_TOP, logits.shape[-1])).indices == labels[:, None]
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    return torch.stack((hits[:, 0].sum(), hits.sum(), loss))


def _wanted(model: StitchedViT, routes: Literal["all"] | Iterable[int]) -> list[ModelRoute]:
    ids = [route.id for route in model.space.named(routes, "routes")]
    if len(set(ids)) < len(ids):
        raise ValueError(f"routes must name each route only once, got {ids}")
    known = {route.id: route for route in model.routes}
    return [known[route_id] for route_id in ids]
