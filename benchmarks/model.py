"""Times the model layer beside the release's way, and writes a record, its table and its plot.

    python -m benchmarks.model --out benchmarks/results/cpu-model.json

Anchors have the shapes of DeiT III and random weights, images are 224 × 224, all in fp32 on the
CPU. Run it on a machine that does nothing else: on 2 cores it takes about 40 minutes, with
``--quick`` 3. Nothing is recorded of results that differ from each route alone. For a GPU there is
``python -m benchmarks.model_gpu``.

The whole space is timed in rounds: each runs ours once, and a part of the routes one by one in the
other ways, dealt so that every round has cheap and costly ones. What a round takes is scaled to all
routes by its share of the multiply-adds. All rounds together have every route once, but for the
largest case, ``--large``: S-L at batch 8 in two rounds of a twelfth of the routes each, which by
itself takes about 7 minutes.
"""

import argparse
import datetime
import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine, model_record, rivals, table
from benchmarks.model_record import KIND, Accuracy, Comparison, Memory, ModelRecord
from benchmarks.schema import RESULTS
from benchmarks.timing import Candidate, Samples, Spread, host_timer, interleave, speedup
from snkernels import PlainViT, StitchedViT
from snkernels.kernels import native
from snkernels.models.anchors import vit_shape
from snkernels.progress import progress_bar
from snkernels.routing import cost
from snkernels.routing.plan import Blocks, Embed, Gather, Plan, Readout, Switch, plan

SHAPES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}
RATES = {"S": 0.05, "B": 0.15, "L": 0.4}
TOLERANCE = 1e-5

RELEASE = "release's forward"
OWN = "our single forwards"

WHOLE_SPACE = (
    "singly: routes that were run one by one in the other ways, over all rounds; what they took is "
    "scaled to all routes by multiply-adds. arithmetic: how many times fewer multiply-adds ours "
    "needs. Equal prefixes alone save 2.70 (S-L) and 2.71 times (S-B); the rest is the last block, "
    "of which a plan, and our single forward too, computes the class token alone."
)
MIXTURE = (
    "The homogeneous batch runs the route whose multiply-adds are nearest to the mean of the 16; "
    "its time is scaled by what it has more or less. Counted is what a forward computes: of the "
    "last block the class token alone."
)


def make(pair: str, rank: int = 64, rates: bool = False) -> StitchedViT:
    """Two anchors and their stitches; LayerScale and B as training leaves them, not as it begins.

    Args:
        pair: letters of the small and the large anchor.
        rank: of the stitches.
        rates: whether to drop paths as the paper does.
    """
    torch.manual_seed(0)
    small, large = (
        PlainViT(
            embed_dim=SHAPES[one][0],
            depth=SHAPES[one][1],
            num_heads=SHAPES[one][2],
            drop_path_rate=RATES[one] if rates else 0.0,
        )
        for one in pair
    )
    model = StitchedViT(small, large, rank)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def check(name: str, actual: Tensor, expected: Tensor) -> None:
    """Compares logits.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    scale = max(1.0, expected.abs().max().item())
    worst = (actual - expected).abs().max().item() / scale
    if not worst <= TOLERANCE:
        raise AssertionError(f"{name}: logits differ by {worst:.2g} of the largest")


def plan_flops(made: Plan, model: StitchedViT, class_token: bool) -> int:
    """Multiply-adds of a plan, counted as those of a route are.

    Args:
        made: the plan.
        model: what runs it.
        class_token: whether the last block counts as what is run of it, keys and values of all
            tokens and the rest of one.
    """
    shapes = [vit_shape(vit) for vit in model.anchors]
    rows: dict[int, int] = {}
    total = 0
    for call in made.calls:
        match call:
            case Embed(anchor, samples, out):
                rows[out] = len(samples)
                total += rows[out] * cost.embed_flops(shapes[anchor])
            case Switch(stitch, _, source, out, _):
                rows[out] = source.stop - source.start
                ends = shapes[stitch.direction], shapes[1 - stitch.direction]
                total += rows[out] * cost.stitch_flops(*ends)
            case Gather(pieces=pieces, out=out):
                rows[out] = sum(piece.stop - piece.start for piece in pieces)
            case Blocks(anchor, start, stop, value):
                shape = shapes[anchor]
                count, last = stop - start, stop == shape.depth
                whole = cost.block_flops(shape)
                total += rows[value] * whole * count
                if last and class_token:
                    n, d = shape.tokens, shape.embed_dim
                    # norm1, keys and values of all tokens; query, attention and MLP of one.
                    tail = 5 * n * d + 2 * n * d * d + 10 * d * d + 2 * n * d + 5 * d
                    total -= rows[value] * (whole - tail)
            case Readout(anchor, value):
                total += rows[value] * cost.head_flops(shapes[anchor])
    return total


@dataclass(frozen=True)
class Ways:
    """The ways to run one route of a model for images."""

    model: StitchedViT
    release: Callable[[int, Tensor], Tensor]

    @classmethod
    def of(cls, model: StitchedViT) -> "Ways":
        """With the stitches merged ahead."""
        project = rivals.Merged(model)

        def release(route: int, images: Tensor) -> Tensor:
            chosen = model.space.route(route)
            return rivals.along(model, chosen, images, rivals.release_block, project)

        return cls(model, release)

    def own(self, route: int, images: Tensor) -> Tensor:
        return self.model(images, stitch=route)


def whole_space(pair: str, batch: int, rounds: int, deal: int | None = None) -> Comparison:
    """All routes in one pass, against the release's way and our own forward, route by route.

    Args:
        pair: letters of the anchors.
        batch: number of images.
        rounds: how often the whole space is run.
        deal: into how many parts the routes are dealt, of which each round takes one; None for as
            many as there are rounds.
    """
    deal = rounds if deal is None else deal
    model = make(pair)
    ways, images = Ways.of(model), torch.randn(batch, 3, 224, 224)
    by_cost = sorted(model.routes, key=lambda route: route.flops)
    total = sum(route.flops for route in model.routes)
    place = {route.id: i for i, route in enumerate(model.routes)}
    samples: Samples = {"ours": [], RELEASE: [], OWN: []}
    singly = 0
    with torch.inference_mode():
        model(images[:1], routes="all", max_rows=64)  # merges weights, fills the allocator
        for turn in range(rounds):
            part = by_cost[turn * deal // rounds :: deal]
            singly += len(part)
            start = time.perf_counter()
            logits = model(images, routes="all")
            samples["ours"].append(time.perf_counter() - start)
            seconds = {RELEASE: 0.0, OWN: 0.0}
            shown = f"whole space, round {turn + 1} of {rounds}: routes one by one"
            for route in progress_bar(part, shown):
                for name, run in ((RELEASE, ways.release), (OWN, ways.own)):
                    start = time.perf_counter()
                    alone = run(route.id, images)
                    seconds[name] += time.perf_counter() - start
                    check(f"{pair}, route {route.id}, {name}", logits[place[route.id]], alone)
            share = sum(route.flops for route in part) / total
            for name, value in seconds.items():
                samples[name].append(value / share)
    made = plan([(0, route) for route in model.space], model.space)
    singles = [plan([(0, route)], model.space) for route in model.space]
    whole, own = (
        total / plan_flops(made, model, class_token=True),
        sum(plan_flops(one, model, class_token=True) for one in singles)
        / plan_flops(made, model, class_token=True),
    )
    least = {"SL": (3.0, 2.7), "SB": (3.3, 2.9)}[pair]
    return comparison(
        "whole_space",
        "-".join(pair),
        {"batch": batch, "routes": len(model.routes), "singly": singly},
        samples,
        least=dict(zip((RELEASE, OWN), least, strict=True)),
        arithmetic={RELEASE: whole, OWN: own},
        note=WHOLE_SPACE,
    )


def mixed_batch(pair: str, rounds: int) -> Comparison:
    """16 images on 16 drawn routes, against single forwards and one homogeneous batch."""
    model = make(pair)
    ways, images = Ways.of(model), torch.randn(16, 3, 224, 224)
    ids, middle, scale = mixture(model)
    alike = f"homogeneous batch (route {middle})"

    def ours() -> Tensor:
        return model(images, stitch=ids)

    def singles(run: Callable[[int, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.cat([run(id, images[i : i + 1]) for i, id in enumerate(ids)])

    def homogeneous() -> float:
        return timed() * scale

    timed = host_timer(lambda: model(images, stitch=middle))
    others = {RELEASE: singles(ways.release), OWN: singles(ways.own)}
    with torch.inference_mode():
        for name, call in others.items():
            check(f"{pair}, mixed batch, {name}", ours(), call())
        samples = interleave(
            [
                Candidate("ours", host_timer(ours)),
                *(Candidate(name, host_timer(call)) for name, call in others.items()),
                Candidate(alike, homogeneous),
            ],
            seconds=0,
            least=rounds,
            warmup=0,
        )
    return comparison(
        "mixed_batch",
        "-".join(pair),
        {"batch": 16},
        samples,
        least={RELEASE: 1.2, OWN: 1.2, alike: 0.95},
        note=MIXTURE,
    )


def mixture(model: StitchedViT) -> tuple[list[int], int, float]:
    """16 drawn routes; the one nearest to their mean cost; and that mean over its own cost.

    A route costs what its forward computes: of the last block the class token alone. The paper's
    count, which has all tokens there, makes the homogeneous batch cheaper than the mixture by 2.7 %
    (S-L) and 4.2 % (S-B), as all of its images end in the large anchor and half of the mixture's in
    the small one.
    """
    costs = {
        route.id: plan_flops(plan([(0, route)], model.space), model, class_token=True)
        for route in model.space
    }
    ids = [route.id for route in random.Random(0).sample(model.routes, 16)]
    mean = sum(costs[id] for id in ids) / 16
    middle = min(costs, key=lambda id: abs(costs[id] - mean))
    return ids, middle, mean / costs[middle]


def one_route(pair: str, route: int, batch: int, rounds: int) -> Comparison:
    """A plan with one route, against a loop over its blocks with the same fused ops."""
    model = make(pair)
    ways, images = Ways.of(model), torch.randn(batch, 3, 224, 224)
    chosen = model.space.route(route)
    calls = {
        "ours": lambda: ways.own(route, images),
        "hand-written loop": lambda: rivals.fused_loop(model, chosen, images),
        RELEASE: lambda: ways.release(route, images),
    }
    with torch.inference_mode():
        expected = calls["ours"]()
        for name, call in calls.items():
            check(f"{pair}, route {route}, {name}", expected, call())
        samples = interleave(
            [Candidate(name, host_timer(call)) for name, call in calls.items()],
            seconds=0,
            least=rounds,
        )
    return comparison(
        "one_route",
        "-".join(pair),
        {"route": route, "batch": batch},
        samples,
        least={"hand-written loop": 0.99},
    )


def stochastic_depth(pair: str, batch: int, rounds: int) -> Comparison:
    """Forward and backward at the paper's rates, against computing all branches and zeroing."""
    model = make(pair, rates=True).train()
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    mean = sum(route.flops for route in model.routes) / len(model.routes)
    route = min(model.routes, key=lambda route: abs(route.flops - mean))
    zeroed = "blocks as modules, which compute and zero"
    parameters = [p for p in model.parameters() if p.requires_grad]
    turns = dict.fromkeys(("ours", zeroed, RELEASE), 0)

    def step(name: str, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            turns[name] += 1
            torch.manual_seed(turns[name])  # the same samples are dropped in every way
            loss = F.cross_entropy(forward(), labels)
            torch.autograd.grad(loss, parameters, allow_unused=True)
            return loss.detach()

        return run

    def by(block: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: rivals.along(model, route, images, block, rivals.unmerged)

    calls = {
        "ours": step("ours", lambda: model(images, stitch=route.id)),
        zeroed: step(zeroed, by(rivals.called_block)),
        RELEASE: step(RELEASE, by(rivals.release_block)),
    }
    first = {name: call() for name, call in calls.items()}
    for name, loss in first.items():
        check(f"{pair}, training step, {name}", first["ours"], loss)
    samples = interleave(
        [Candidate(name, host_timer(call)) for name, call in calls.items()],
        seconds=0,
        least=rounds,
        warmup=0,
    )
    sizes = {"batch": batch, "route": route.id}
    return comparison("stochastic_depth", "-".join(pair), sizes, samples)


def comparison(
    section: str,
    model: str,
    sizes: dict[str, int],
    samples: Samples,
    least: dict[str, float] | None = None,
    arithmetic: dict[str, float] | None = None,
    note: str | None = None,
) -> Comparison:
    """What is recorded of samples that took turns."""
    return Comparison(
        section=section,
        model=model,
        sizes=sizes,
        rounds=len(samples["ours"]),
        seconds={name: Spread.of(values) for name, values in samples.items()},
        speedup={name: speedup(samples, "ours", name) for name in samples if name != "ours"},
        least=least or {},
        arithmetic={name: round(value, 3) for name, value in (arithmetic or {}).items()},
        note=note,
    )


def memory(pair: str, batch: int, max_rows: int) -> Memory:
    """What a pass over the whole space adds to a process of its own.

    The bound: for each of ``max_rows`` rows its tokens, their norm, and the copy that a gather
    makes, in the width of the large anchor; and for the 10 rows that go through blocks together
    what lies between the GEMMs, 20 times their tokens, with 64 MiB for the allocator and the
    libraries' workspaces.
    """
    code = f"from benchmarks import model; model.measure_memory({pair!r}, {batch}, {max_rows})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    tokens = 197 * SHAPES[pair[1]][0] * 4
    return Memory(
        "-".join(pair),
        batch,
        max_rows,
        measured["peak_rows"],
        measured["bytes"],
        tokens * (3 * max_rows + 20 * 10) + 64 * 2**20,
    )


def measure_memory(pair: str, batch: int, max_rows: int) -> None:
    """Prints what a pass adds to this process, which must not have run one before."""
    model = make(pair, rank=0)  # without copies of weights that the first pass would merge
    images = torch.randn(batch, 3, 224, 224)
    rows = [(i, route) for route in model.space for i in range(batch)]
    made = plan(rows, model.space, max_rows)
    with torch.inference_mode():
        for id in (0, 1):
            model(images[:1], stitch=id)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of building it all
        before = _resident("VmRSS")
        model(images, routes="all", max_rows=max_rows)
    used = _resident("VmHWM") - before
    print(json.dumps({"bytes": used, "peak_rows": made.peak_rows}))


def _resident(what: str) -> int:
    """Bytes of memory that this process has now (VmRSS), or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024


Job = Callable[[], Comparison | Memory | Accuracy]


def jobs(quick: bool, large: bool) -> Iterator[Job]:
    """What a run measures, one after another."""
    if large:
        yield lambda: whole_space("SL", 8, 2, deal=12)
        return
    if quick:
        yield lambda: whole_space("SB", 1, 2)
        yield lambda: mixed_batch("SB", 3)
        yield lambda: one_route("SB", 7, 1, 11)
        yield lambda: stochastic_depth("SB", 2, 3)
        yield lambda: memory("SB", 1, 16)
        return
    for pair, batch, rounds in (("SL", 1, 5), ("SB", 1, 5), ("SB", 8, 2)):
        yield lambda p=pair, b=batch, r=rounds: whole_space(p, b, r)
    yield lambda: mixed_batch("SL", 9)
    yield lambda: mixed_batch("SB", 25)
    # Many rounds: a difference of 1 % is looked for, and rounds differ by 3.
    for pair, batch, rounds in (("SL", 1, 61), ("SL", 8, 31), ("SB", 1, 101), ("SB", 8, 61)):
        yield lambda p=pair, b=batch, r=rounds: one_route(p, 7, b, r)
    yield lambda: stochastic_depth("SL", 4, 5)
    for max_rows in (16, 64, 256):
        yield lambda m=max_rows: memory("SB", 2, m)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where something is not as it must be."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    parser.add_argument("--out", type=Path, help="default: in benchmarks/results")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="S-B alone, few rounds")
    which.add_argument(
        "--large", action="store_true", help="the whole space of S-L at batch 8 alone"
    )
    options = parser.parse_args(arguments)
    if native.IMPORT_ERROR is not None:
        sys.exit(f"the compiled module did not import: {native.IMPORT_ERROR}")
    command = shlex.join(["python", "-m", "benchmarks.model", *arguments])
    record = new_record(command)
    name = f"cpu-{record.date[:10]}-model{'-large' if options.large else ''}.json"
    return run(list(jobs(options.quick, options.large)), record, options.out or RESULTS / name)


def new_record(command: str, device: str = "cpu", dtype: str = "float32") -> ModelRecord:
    """A record of this machine that holds no results yet."""
    commit, dirty = machine.commit()
    return ModelRecord(
        kind=KIND,
        date=datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0).isoformat(),
        command=command,
        commit=commit,
        dirty=dirty,
        threads=torch.get_num_threads(),
        machine=machine.describe(),
        versions=machine.versions(),
        comparisons=[],
        memory=[],
        device=device,
        dtype=dtype,
    )


def run(todo: Sequence[Job], record: ModelRecord, out: Path, limit: float | None = None) -> int:
    """Adds what jobs measure to a record, and writes it after each, so that nothing is lost.

    Args:
        todo: the jobs.
        record: where the results go.
        out: the file.
        limit: seconds after which no job begins any more; None for all jobs.

    Returns:
        1 where a job broke, time ran out, or something is not as it must be.
    """
    begin, failures = time.perf_counter(), []
    for i, job in enumerate(progress_bar(todo, "model benchmarks")):
        if limit is not None and time.perf_counter() > begin + limit:
            failures.append(f"no time was left for {len(todo) - i} of {len(todo)} measurements")
            break
        try:
            record.add(job())
        except Exception as error:  # the others can still be measured
            failures.append(f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        record.save(out)
    if record:
        table.write(out)
        model_record.plot(out)
        print(model_record.markdown(record))
        print(f"Wrote {out}, and beside it the table (.md) and the plot (.png).")
    failures += model_record.misses(record)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
