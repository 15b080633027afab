from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from snkernels.models.stitched import StitchedViT
from snkernels.models.wrappers import inside

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "an average of DataParallel": lambda model: AveragedModel(nn.DataParallel(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_takes_off(name: str, make: Callable[..., StitchedViT]) -> None:
    model = make()
    found = inside(WRAPPERS[name](model))
    assert type(found) is StitchedViT
    if "average" not in name.lower():  # which is a copy
        assert found is model


def test_compiled_as_a_whole(make: Callable[..., StitchedViT]) -> None:
    model = make()
    compiled = torch.compile(model, backend="eager")
    assert inside(compiled) is model
    with pytest.raises(TypeError, match="model must not be compiled as a whole"):
        inside(compiled, compiled=False)
    with pytest.raises(TypeError, match="model must not be compiled as a whole"):
        inside(nn.DataParallel(compiled), compiled=False)
    model.compile(backend="eager")
    assert inside(model) is model
    with pytest.raises(TypeError, match=r"compiled by model\.compile_blocks\(\)"):
        inside(model, compiled=False)


def test_compiled_blocks_are_no_wrapper(make: Callable[..., StitchedViT]) -> None:
    model = make()
    model.compile_blocks(backend="eager")
    assert inside(model, compiled=False) is model


@pytest.mark.parametrize("model", [nn.Linear(1, 1), nn.DataParallel(nn.Linear(1, 1)), "S-L", None])
def test_anything_else_is_refused(model: object) -> None:
    with pytest.raises(
        TypeError, match=r"model must be a StitchedViT, .* got (Linear|str|NoneType)"
    ):
        inside(model)
