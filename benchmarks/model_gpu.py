"""Times the model layer on a GPU: mixed batches, captured graphs, and predicted latencies.

    python -m benchmarks.model_gpu --out gpu-run/model.json

Anchors have the shapes of DeiT III and random weights in fp32, images are 224 × 224, and everything
runs in inference under autocast to bf16, once on each backend. Times are those of events on the
GPU's stream; of the CPU where launches are what is timed. Nothing is recorded of logits that are
less exact than those of the release's forward under the same autocast, by the rule of the tests.

Its own logic is tested with a CPU that stands in for a GPU.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import snkernels
from benchmarks import rivals
from benchmarks.model import MIXTURE, OWN, RELEASE, Job, comparison, make, mixture, new_record, run
from benchmarks.model_record import Accuracy, Comparison
from benchmarks.schema import RESULTS
from benchmarks.timing import Candidate, gpu_timer, interleave, launch_timer
from python_tests.judge import assert_as_exact_as_torch
from snkernels import StitchedViT
from snkernels.backends import use_backend
from snkernels.kernels import native

BACKENDS = ("torch", "triton", "cuda")
DEVICE = "cuda"
DTYPE = torch.bfloat16
ROUTE = 7  # S for half of its depth, then L: of about the mean cost

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Bench:
    """A model on the GPU, and the backend of its ops."""

    pair: str
    backend: str
    model: StitchedViT

    @property
    def name(self) -> str:
        """What the record calls it."""
        return f"{'-'.join(self.pair)}, {self.backend}"

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Inference under autocast, on the backend."""
        with use_backend(self.backend), torch.inference_mode(), torch.autocast(DEVICE, DTYPE):
            yield

    def eager(self, call: Forward) -> Forward:
        """A call as a user makes it: a region of autocast of its own, which casts weights anew."""

        def run() -> Tensor:
            with self.scope():
                return call()

        return run

    def release(self, images: Tensor, ids: Sequence[int]) -> Forward:
        """The release's forward, image after image, each on its route."""
        model, project = self.model, rivals.Merged(self.model)
        routes = [model.space.route(id) for id in ids]

        def along(i: int) -> Tensor:
            one = images[i : i + 1]
            return rivals.along(model, routes[i], one, rivals.release_block, project)

        return lambda: torch.cat([along(i) for i in range(len(ids))])

    def check(self, images: Tensor, ids: Sequence[int], calls: dict[str, Forward]) -> None:
        """Compares logits with those of fp32.

        Raises:
            AssertionError: a call is less exact than the release's forward under autocast.
        """
        forward = self.release(images, ids)
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            exact = forward().double()
        release = self.eager(forward)()
        for name, call in calls.items():
            logits = call().to(release.dtype)
            assert_as_exact_as_torch(f"{self.name}, {name}", logits, release, exact)


def images_of(batch: int) -> Tensor:
    """Random ones, the same for every bench."""
    torch.manual_seed(0)
    return torch.randn(batch, 3, 224, 224, device=DEVICE)


def timer(call: Forward) -> Callable[[], float]:
    """A sample by events on the GPU's stream, of some calls one behind the other."""
    return gpu_timer(call, calls=1, replays=2)


def mixed_batch(bench: Bench, captured: bool, rounds: int) -> Comparison:
    """16 images on 16 routes, launched op by op or as captured graphs."""
    model, images = bench.model, images_of(16)
    ids, middle, scale = mixture(model)
    alike = f"homogeneous batch (route {middle})"
    if captured:
        with bench.scope():
            mixed, level = (model.capture(16, stitch=stitch) for stitch in (ids, middle))
            each = [model.capture(1, stitch=id) for id in ids]
        calls: dict[str, Forward] = {
            "ours": lambda: mixed(images),
            OWN: lambda: torch.cat([one(images[i : i + 1]) for i, one in enumerate(each)]),
            alike: lambda: level(images),
        }
    else:
        singles = [
            lambda i=i, id=id: model(images[i : i + 1], stitch=id) for i, id in enumerate(ids)
        ]
        calls = {
            "ours": bench.eager(lambda: model(images, stitch=ids)),
            OWN: bench.eager(lambda: torch.cat([single() for single in singles])),
            RELEASE: bench.eager(bench.release(images, ids)),
            alike: bench.eager(lambda: model(images, stitch=middle)),
        }
    bench.check(images, ids, {name: calls[name] for name in ("ours", OWN)})
    samples = interleave(
        [Candidate(name, timer(call)) for name, call in calls.items()], seconds=0, least=rounds
    )
    samples[alike] = [scale * seconds for seconds in samples[alike]]
    return comparison(
        "mixed_batch",
        bench.name,
        {"batch": 16, "captured": int(captured)},
        samples,
        # The loop that one would write launches op by op.
        least={alike: 0.9} if captured else {OWN: 4.0, alike: 0.9},
        note=MIXTURE,
    )


def replay(bench: Bench, section: str, batch: int, rounds: int) -> Comparison:
    """One route as a captured graph beside its eager launch.

    Args:
        bench: the model and its backend.
        section: "replay" for the time of the GPU, "launch" for that of the CPU.
        batch: number of images.
        rounds: how often each is timed.
    """
    model, images = bench.model, images_of(batch)
    with bench.scope():
        graph = model.capture(batch, stitch=ROUTE)
    calls: dict[str, Forward] = {
        "ours": lambda: graph(images),
        "eager": bench.eager(lambda: model(images, stitch=ROUTE)),
    }
    bench.check(images, [ROUTE] * batch, calls)
    clock = {"replay": timer, "launch": launch_timer}[section]
    samples = interleave(
        [Candidate(name, clock(call)) for name, call in calls.items()], seconds=0, least=rounds
    )
    return comparison(section, bench.name, {"route": ROUTE, "batch": batch}, samples)


def accuracy(bench: Bench, rounds: int) -> Accuracy:
    """How well the parts predict every route at batch 1."""
    with bench.scope():
        found = snkernels.profile(bench.model, [1], check="all", rounds=rounds, seconds=0)
    return Accuracy(
        model=bench.name,
        batch=1,
        routes=len(found.checks),
        within=sum(abs(check.error) <= 0.1 for check in found.checks) / len(found.checks),
        median=found.error(),
        p95=found.error(0.95),
        worst=found.error(1),
    )


def jobs(pair: str, backends: Sequence[str]) -> Iterator[Job]:
    """What a run measures, one after another: most wanted first."""
    with torch.device(DEVICE):
        model = make(pair)
    benches = [Bench(pair, backend, model) for backend in backends]
    for captured in (False, True):
        for bench in benches:
            yield lambda b=bench, c=captured: mixed_batch(b, c, 5)
    for section in ("replay", "launch"):
        for bench in benches:
            for batch in (1, 16):
                yield lambda b=bench, s=section, n=batch: replay(b, s, n, 15)
    for bench in benches:
        yield lambda b=bench: accuracy(b, 3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 2 without a GPU, 1 where something is not as it must be."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="default: in benchmarks/results")
    parser.add_argument("--pair", choices=("SL", "SB"), default="SL")
    parser.add_argument("--limit", type=float, help="seconds after which no measurement begins")
    parser.add_argument(
        "--struck",
        nargs="+",
        default=[],
        choices=BACKENDS[1:],
        help="do not run it: its tests failed",
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("No GPU: torch.cuda.is_available() is False here, so there is nothing to do.")
        return 2
    if native.IMPORT_ERROR is not None:
        sys.exit(f"the compiled module did not import: {native.IMPORT_ERROR}")
    command = shlex.join(["python", "-m", "benchmarks.model_gpu", *arguments])
    record = new_record(command, "cuda", str(DTYPE).removeprefix("torch."))
    out = options.out or RESULTS / f"cuda-{record.date[:10]}-model.json"
    backends = [backend for backend in BACKENDS if backend not in options.struck]
    return run(list(jobs(options.pair, backends)), record, out, options.limit)


if __name__ == "__main__":
    sys.exit(main())
