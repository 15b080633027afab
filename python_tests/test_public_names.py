"""What ``import snkernels`` gives, and that it does so whatever is missing."""

import subprocess
import sys

import pytest

import snkernels

MISSING = ("triton", "timm", "matplotlib", "tqdm", "sklearn", "snkernels._C")

BLOCK = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if any(name == m or name.startswith(m + ".") for m in {MISSING}):
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def run_without_them(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there() -> None:
    assert set(snkernels.__all__) >= {
        "PlainViT",
        "StitchedViT",
        "__version__",
        "average_gradients",
        "broadcast_parameters",
        "distillation_loss",
        "evaluate",
        "layers",
        "ops",
        "training_loss",
        "use_backend",
    }
    for name in snkernels.__all__:
        assert getattr(snkernels, name) is not None
    assert set(snkernels.__all__) <= set(dir(snkernels))
    from snkernels.layers import StitchingLayer
    from snkernels.models.stitched import StitchedViT

    assert snkernels.layers.StitchingLayer is StitchingLayer
    assert snkernels.StitchedViT is StitchedViT


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'snkernels' has no attribute 'Stitched'"):
        snkernels.Stitched  # noqa: B018


def test_the_import_alone_loads_nothing() -> None:
    code = "import snkernels; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert run_without_them(code) == "[]\n"


def test_all_names_work_with_torch_alone() -> None:
    output = run_without_them("""
import torch
import snkernels
from snkernels import *

small = PlainViT(8, 4, 1, 7, embed_dim=8, depth=2, num_heads=2)
large = PlainViT(8, 4, 1, 7, embed_dim=12, depth=4, num_heads=2)
model = StitchedViT(small, large, rank=2)
model.init_stitches(torch.randn(20, 1, 8, 8))
training_loss(model, torch.randn(3, 1, 8, 8), torch.arange(3), routes_per_step=2).loss.backward()
result = evaluate(model, [(torch.randn(4, 1, 8, 8), torch.arange(4))])
print([s.id for s in result.scores], __version__ == snkernels.__version__)
x, weight = torch.randn(5, 3), torch.randn(4, 3)
torch.testing.assert_close(ops.stitch(x, weight), x @ weight.T)
for backend in ("cpu", "triton"):
    try:
        with use_backend(backend):
            ops.stitch_layer_norm(x, weight)
    except RuntimeError as error:
        print(error)
""")
    scores, cpu, triton = output.splitlines()
    assert scores == "[0, 1, 2, 4] True"
    assert "the compiled module did not import: No module named 'snkernels._C'" in cpu
    assert triton.endswith("cannot run stitch_layer_norm: triton is not installed")
