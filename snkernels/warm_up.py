"""``snkernels.warmup``: compiles what a model will launch, before it serves, trains or is captured.

Nothing here lists kernels. The model itself runs, along routes of every kind, so whatever it
launches was launched once: Triton kernels, the CUDA module, torch's libraries, compiled blocks.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from snkernels.integers import integers
from snkernels.models.anchors import image_shape
from snkernels.models.modes import restored_modes, uncached_autocast
from snkernels.models.setting import is_compiled
from snkernels.models.stitched import StitchedViT
from snkernels.models.wrappers import inside
from snkernels.progress import progress_bar


@dataclass(frozen=True)
class WarmUp:
    """What :func:`warmup` did.

    Attributes:
        kernels: the Triton kernels that were compiled, or read from Triton's cache on disk, each
            with the types of its pointers.
        graphs: how many graphs torch.compile made.
        passes: how many passes the model ran.
        seconds: how long it took.
    """

    kernels: tuple[str, ...]
    graphs: int
    passes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{len(self.kernels)} Triton kernels and {self.graphs} graphs of torch.compile "
            f"made ready by {self.passes} passes in {self.seconds:.1f} s"
        )


def warmup(
    model: nn.Module,
    batch_sizes: int | Sequence[int],
    *,
    training: bool = False,
    progress: bool = True,
) -> WarmUp:
    """Runs the model once along every kind of route, so that nothing is left to compile.

    Call it as the model will be used: autocast, inference mode, a forced backend and the precision
    of fp32 products are those at the call, and the model is where it will run. Kernels do not
    depend on the batch size, so other sizes compile nothing either; of ``compile_blocks`` that
    holds for sizes from 2 on, and a size of 1 is another graph. Before a CUDA graph is captured,
    run it with the size of the capture: what libraries load at a first call must not be captured.

    The model, gradients, draws of routes and random numbers are as before afterwards.

    Args:
        model: a ``StitchedViT``, or ``DistributedDataParallel`` around one.
        batch_sizes: images in a batch, one size or some. On a CPU without compiled blocks, where
            nothing depends on them, one image runs instead.
        training: whether to run forward and backward in train mode, in place of inference in eval
            mode.
        progress: whether to show a progress bar when it takes more than seconds; needs tqdm.

    Returns:
        What was compiled.

    Raises:
        TypeError: another model, one inside ``torch.compile`` too, or sizes that are no integers.
        ValueError: no sizes, or one below 1.
        RuntimeError: a CUDA graph is being captured.
    """
    model = inside(model, compiled=False)
    sizes = integers("batch_sizes", batch_sizes, 1)
    like = next(model.parameters())
    on_gpu = like.device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warmup must come before the capture of a CUDA graph, not inside it")
    if not on_gpu and not is_compiled(model):
        sizes = [1]
    one_of_each = list({route.direction: route.id for route in reversed(model.routes)}.values())
    # Every kind of route by itself, and all in one pass, where they meet.
    ways: list[dict[str, Any]] = [{"stitch": route} for route in one_of_each]
    ways.append({"routes": one_of_each})
    runs = [(size, way) for size in sizes for way in ways]
    start, graphs = time.perf_counter(), _graphs()
    with _compiled_kernels() as kernels, _restored(model, training):
        for size, way in progress_bar(runs, "warm-up: passes", progress):
            _run(model, size, way, training)
    if on_gpu:
        torch.cuda.synchronize(like.device)
    return WarmUp(tuple(kernels), _graphs() - graphs, len(runs), time.perf_counter() - start)


def _run(model: StitchedViT, size: int, way: dict[str, Any], training: bool) -> None:
    like = next(model.parameters())
    images = torch.randn(size, *image_shape(model.small), device=like.device, dtype=like.dtype)
    if not training:
        with torch.no_grad():
            model(images, **way)
        return
    with torch.inference_mode(False), torch.enable_grad():
        logits = model(images, **way)
        if logits.requires_grad:
            leaves = list(model.trainable_parameters())
            # Not backward(), which would add to the gradients that the parameters may hold.
            torch.autograd.grad(logits, leaves, torch.randn_like(logits), allow_unused=True)


@contextlib.contextmanager
def _restored(model: StitchedViT, training: bool) -> Iterator[None]:
    """Puts the model into train or eval mode; afterwards all is as it was before."""
    last_route, device = model.last_route, next(model.parameters()).device
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), restored_modes(model), uncached_autocast(device.type):
        model.train(training)
        try:
            yield
        finally:
            model.last_route = last_route


@contextlib.contextmanager
def _compiled_kernels() -> Iterator[list[str]]:
    """Lists the Triton kernels that are compiled inside the ``with`` block."""
    names: list[str] = []
    try:
        from triton import knobs
    except ImportError:
        yield names
        return
    previous = knobs.runtime.jit_post_compile_hook

    def note(**facts: Any) -> Any:
        signature = facts["compile"]["signature"].values()
        pointers = ", ".join(kind for kind in signature if str(kind).startswith("*"))
        names.append(f"{facts['fn'].name.rpartition('.')[2]}({pointers})")
        return previous(**facts) if previous else None

    knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = previous


def _graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    # Not imported for this: it takes seconds, and where nobody did, there are none.
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])
