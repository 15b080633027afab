"""CUDA graphs of a model's forward: one launch where there were hundreds.

On a CPU its logic is tested with a stand-in for the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from snkernels.integers import integer
from snkernels.models.anchors import image_shape
from snkernels.models.modes import uncached_autocast

if TYPE_CHECKING:
    from snkernels.models.stitched import StitchedViT


class _Shared(NamedTuple):
    """What the graphs of one model have in common.

    They take turns, so what they compute in between may lie in one place.  The allocator hands
    memory on only within one stream, and takes a pool for good whose last graph is gone; hence the
    stream, and a graph without work that stays.
    """

    pool: Any
    stream: torch.cuda.Stream
    keeper: torch.cuda.CUDAGraph

    @classmethod
    def make(cls) -> _Shared:
        """Make it on the current device."""
        shared = cls(torch.cuda.graph_pool_handle(), torch.cuda.Stream(), torch.cuda.CUDAGraph())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the graph is empty
            with torch.cuda.graph(shared.keeper, pool=shared.pool, stream=shared.stream):
                pass
        return shared


_SHARED: WeakKeyDictionary[nn.Module, _Shared] = WeakKeyDictionary()


class CapturedForward:
    """A forward of fixed shape and routes, which each call replays.

    A replay reads the parameters where they were when it was captured: what an optimizer step or
    ``load_state_dict`` writes into them is seen, and where one was moved or replaced the next call
    raises.  A module that was replaced whole is not noticed.  Graphs of one model share their
    memory and must not be replayed on two streams at once.

    Args:
        model: On a CUDA device.
        images: Images of the shape, dtype and device that every call will have; their values do
            not matter, but they are written over.
        arguments: What else ``model`` is called with.
    """

    def __init__(self, model: nn.Module, images: Tensor, arguments: dict[str, Any]) -> None:
        self._images = images
        self._parameters = [
            (owner._parameters, name, f"{prefix}.{name}")
            for prefix, owner in model.named_modules()
            for name, parameter in owner._parameters.items()
            if parameter is not None
        ]
        self._captured_at = self._addresses()
        with torch.inference_mode(), uncached_autocast("cuda"):
            self._replay, self._logits = _record(lambda: model(self._images, **arguments), model)

    @classmethod
    def of(cls, model: StitchedViT, batch_size: int, arguments: dict[str, Any]) -> CapturedForward:
        """Capture a stitched model; see ``StitchedViT.capture``."""
        batch_size = integer("batch_size", batch_size, 1)
        if model.training:
            raise RuntimeError("a model must be in eval mode to be captured, it is in training")
        like = next(model.small.parameters())
        if like.device.type != "cuda":
            raise RuntimeError(
                f"capture needs CUDA graphs, and the model is on device {str(like.device)!r}"
            )
        with torch.cuda.device(like.device):
            return cls(model, like.new_zeros(batch_size, *image_shape(model.small)), arguments)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of images, as the model would.

        Args:
            images: Of the shape that was captured; copied, and cast to its dtype, into the graph's
                own buffer.

        Raises:
            ValueError: If images have another shape.
            RuntimeError: If a parameter was moved since; capture again.
        """
        if images.shape != self._images.shape:
            raise ValueError(
                f"images must have shape {tuple(self._images.shape)}, as captured, "
                f"got {tuple(images.shape)}"
            )
        addresses = self._addresses()
        if addresses != self._captured_at:
            pairs = zip(self._parameters, addresses, self._captured_at, strict=True)
            path = next(path for (*_, path), now, then in pairs if now != then)
            raise RuntimeError(f"{path} was moved since the forward was captured: capture anew")
        with torch.inference_mode():
            self._images.copy_(images)
            self._replay()
        return self._logits.clone()

    def _addresses(self) -> list[int]:
        """Where the parameters are, 0 for one that is gone."""
        return [
            0 if (parameter := owner[name]) is None else parameter.data_ptr()
            for owner, name, _ in self._parameters
        ]


def _record(call: Callable[[], Tensor], model: nn.Module) -> tuple[Callable[[], None], Tensor]:
    """Capture a call; return its replay, and the output that each replay fills."""
    shared = _SHARED.get(model)
    if shared is None or shared.stream.device_index != torch.cuda.current_device():
        shared = _SHARED[model] = _Shared.make()
    stream = shared.stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # what is compiled, planned or allocated once must not be captured
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=shared.pool, stream=stream):
        logits = call()
    return graph.replay, logits
