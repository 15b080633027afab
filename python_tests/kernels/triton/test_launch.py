from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from snkernels.kernels.triton import configs, launch
from snkernels.kernels.triton.multi_stitch import multi_stitch_forward


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """Of one group, without what would take another launch."""
    group = [weight, *[None] * 5]
    return multi_stitch_forward(x, [0, len(x)], group, [1.0], len(weight), False, 1e-6)[0]


@pytest.fixture
def torch_precision() -> Iterator[None]:
    previous = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(previous)


def options_of_a_forward(dtype: torch.dtype) -> dict[str, Any]:
    """The options of the launches of a forward on meta tensors, which must not run."""
    launches = []
    with launch.launches_go_to(lambda *launched: launches.append(launched)):
        x, weight = (torch.empty(50, 100, dtype=dtype, device="meta") for _ in range(2))
        forward(x, weight)
    ((_, _, _, options),) = launches
    return dict(options)


@pytest.mark.usefixtures("torch_precision")
def test_fp32_products_follow_torch_and_are_exact_by_default() -> None:
    assert options_of_a_forward(torch.float32)["PRECISION"] == "ieee"
    torch.set_float32_matmul_precision("high")
    assert options_of_a_forward(torch.float32)["PRECISION"] == "tf32"
    assert options_of_a_forward(torch.float16)["PRECISION"] == "ieee"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = True
    assert options_of_a_forward(torch.float32)["PRECISION"] == "tf32"


def test_override_replaces_values_until_it_ends() -> None:
    before = options_of_a_forward(torch.float16)
    with configs.override("project", BLOCK_M=32, num_warps=2):
        with configs.override("project", BLOCK_M=16):
            assert options_of_a_forward(torch.float16) == before | {"BLOCK_M": 16, "num_warps": 2}
        assert options_of_a_forward(torch.float16) == before | {"BLOCK_M": 32, "num_warps": 2}
    assert options_of_a_forward(torch.float16) == before


def test_no_more_registers_than_there_are() -> None:
    """65536 for the threads of a CTA, of which wide rows have the most."""
    for features in (64, 1280, 8192, 1 << 16):
        config = configs.normalize_rows_backward(torch.float16, torch.float32, features)
        assert config["maxnreg"] * config["num_warps"] * 32 <= 65536, features


def test_launches_run_again_after_they_went_elsewhere() -> None:
    x, weight = torch.ones(3, 4), torch.ones(5, 4)
    with pytest.raises(ZeroDivisionError), launch.launches_go_to(lambda *_: 1 // 0):
        forward(x, weight)
    assert torch.equal(forward(x, weight), torch.full((3, 5), 4.0))


def test_launches_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins: a machine with two GPUs would be needed."""
    current = ["cuda:0"]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(str(self.device))

        def __exit__(self, *_: object) -> None:
            current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: launched.append((grid, current[-1]))

    launched: list[tuple[tuple[int, ...], str]] = []
    monkeypatch.setattr(torch.cuda, "device", Device)
    launch.launch(Kernel(), (7,), SimpleNamespace(device=torch.device("cuda", 1)))
    assert launched == [((7,), "cuda:1")]
    assert current == ["cuda:0"]
