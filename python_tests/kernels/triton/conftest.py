from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from device import DEVICE


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan_and_on_the_device() -> Iterator[None]:
    # A warning is enough: cuBLAS would refuse to run, and here it is the filling alone.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    try:
        with torch.device(DEVICE):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def right_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repairs bf16 in Triton's interpreter, which keeps it as uint16 and computes with these bits.

    Only products and conversions are repaired. A kernel that does anything else with bf16 before it
    converts still computes nonsense here.
    """
    if DEVICE != "cpu":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    original = {
        name: getattr(InterpreterBuilder, name)
        for name in ("create_dot", "cast_impl", "create_fp_to_fp")
    }

    def dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return original["create_dot"](self, widened(a), widened(b), *rest)

    def converting(name: str) -> Any:
        def convert(self: Any, source: TensorHandle, to: Any, *rest: Any) -> TensorHandle:
            if to.scalar != tl.bfloat16:
                return original[name](self, widened(source), to, *rest)
            rounded = torch.from_numpy(np.array(widened(source).data, np.float32)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

        return convert

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    for name in ("cast_impl", "create_fp_to_fp"):
        monkeypatch.setattr(InterpreterBuilder, name, converting(name))
