import copy
import io
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from judge import assert_as_exact_as_torch
from torch import Tensor, nn

from snkernels.layers import StitchingLayer, StitchLayerNorm


def random_layer(in_features: int = 30, out_features: int = 40, rank: int = 4) -> StitchingLayer:
    layer = StitchingLayer(in_features, out_features, rank)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


def official(state: dict[str, Tensor], x: Tensor, rank: int) -> Tensor:
    """The official layer, from its tensors alone."""
    p = {name.removeprefix("transform."): value.to(x.dtype) for name, value in state.items()}
    y = F.linear(x, p["weight"], p["bias"])
    return y + x @ p["lora_A"].t() @ p["lora_B"].t() / rank


def inferred(layer: StitchingLayer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def assert_is_the_official_function(layer: StitchingLayer, x: Tensor) -> None:
    state = layer.state_dict()
    exact = official(state, x.double(), layer.rank)
    eager = official(state, x, layer.rank)
    assert_as_exact_as_torch("inference", inferred(layer, x), eager, exact)
    assert_as_exact_as_torch("with gradients", layer(x).detach(), eager, exact)


def test_keys_shapes_and_start() -> None:
    layer = StitchingLayer(30, 40, 4)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "transform.weight": (40, 30),
        "transform.bias": (40,),
        "transform.lora_A": (4, 30),
        "transform.lora_B": (40, 4),
    }
    trainable = {name for name, value in layer.named_parameters() if value.requires_grad}
    assert trainable == {"transform.bias", "transform.lora_A", "transform.lora_B"}
    assert not layer.transform.lora_B.any()
    bound = 30**-0.5  # Kaiming-uniform with a = √5
    assert layer.transform.lora_A.abs().max() <= bound
    assert layer.transform.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    assert list(StitchingLayer(30, 40, 0).state_dict()) == ["transform.weight", "transform.bias"]


@pytest.mark.parametrize("training", [True, False])
def test_is_the_official_function(training: bool) -> None:
    assert_is_the_official_function(random_layer().train(training), torch.randn(3, 7, 30))


# What may happen to a layer between two uses: each takes it and returns the one to go on with.
def _load(layer: StitchingLayer) -> StitchingLayer:
    layer.load_state_dict(random_layer().state_dict())
    return layer


def _load_assign(layer: StitchingLayer) -> StitchingLayer:
    layer.load_state_dict(random_layer().state_dict(), assign=True)
    return layer


def _save_and_reload(layer: StitchingLayer) -> StitchingLayer:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    layer.load_state_dict(torch.load(file))
    return layer


def _step(layer: StitchingLayer) -> StitchingLayer:
    trainable = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1)
    layer(torch.randn(5, 30)).square().sum().backward()
    optimizer.step()
    return layer


def _write_through_data(layer: StitchingLayer) -> StitchingLayer:
    """As EMA loops do; it bumps no version counter."""
    for parameter in layer.parameters():
        parameter.data.mul_(0.9).add_(torch.randn_like(parameter), alpha=0.1)
    return layer


def _pickle(layer: StitchingLayer) -> StitchingLayer:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


HAPPENINGS: list[Callable[[StitchingLayer], StitchingLayer]] = [
    lambda layer: layer.train(),
    lambda layer: layer.eval(),
    copy.deepcopy,
    _load,
    _load_assign,
    _save_and_reload,
    _step,
    _write_through_data,
    _pickle,
]


@pytest.mark.parametrize("first", range(len(HAPPENINGS)))
def test_no_order_of_events_makes_it_another_function(first: int) -> None:
    """After each event, in every order of three, it is what its own state dict says."""
    x = torch.randn(6, 30)
    for second, third in itertools.product(range(len(HAPPENINGS)), repeat=2):
        layer = random_layer().eval()
        inferred(layer, x)
        for event in (first, second, third):
            layer = HAPPENINGS[event](layer)
            torch.testing.assert_close(
                inferred(layer, x),
                official(layer.state_dict(), x, 4).detach(),
                rtol=1e-4,
                atol=1e-4,
            )


def test_a_hundred_flips_change_no_bit() -> None:
    layer, x = random_layer(), torch.randn(5, 30)
    state = copy.deepcopy(layer.state_dict())
    outputs = []
    for _ in range(100):
        outputs.append((inferred(layer.train(), x), inferred(layer.eval(), x)))
    assert all(torch.equal(a, outputs[0][0]) and torch.equal(b, outputs[0][1]) for a, b in outputs)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_the_merged_weight_is_kept_and_no_state() -> None:
    layer, x = random_layer().eval(), torch.randn(5, 30)
    inferred(layer, x)
    merged = layer._merged
    inferred(layer, x)
    assert merged is not None
    assert layer._merged is merged
    assert len(layer.state_dict()) == 4
    assert copy.deepcopy(layer)._merged is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    layer = random_layer().to(dtype).eval()
    assert layer(torch.randn(5, 30, dtype=dtype)).dtype == dtype
    assert_is_the_official_function(layer, torch.randn(5, 30).to(dtype))


def test_forward_norm_is_the_norm_of_forward() -> None:
    layer, norm, x = random_layer(), nn.LayerNorm(40, eps=1e-6), torch.randn(2, 5, 30)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for training in (True, False):
        y, normed = layer.train(training).forward_norm(x, norm)
        torch.testing.assert_close(y, layer(x))
        torch.testing.assert_close(normed, norm(y), rtol=1e-4, atol=1e-4)


def test_stitch_layer_norm_is_the_pair() -> None:
    pair, x = StitchLayerNorm(30, 40, 4, eps=1e-5), torch.randn(2, 5, 30)
    y, normed = pair(x)
    torch.testing.assert_close(y, pair.stitch(x))
    torch.testing.assert_close(normed, pair.norm(y), rtol=1e-4, atol=1e-5)
    assert pair.norm.eps == 1e-5


def test_set_base() -> None:
    layer = random_layer().eval()
    inferred(layer, torch.randn(5, 30))
    weight, bias = torch.randn(40, 30, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    layer.set_base(weight, bias)
    assert torch.equal(layer.transform.weight, weight.float())
    assert torch.equal(layer.transform.bias, bias.float())
    assert_is_the_official_function(layer, torch.randn(5, 30))
    with pytest.raises(ValueError, match=r"weight must have shape \(40, 30\).*\(30, 40\)"):
        layer.set_base(weight.t(), bias)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4, 1), "in_features must be at least 1, got 0"),
        ((4, -1, 1), "out_features must be at least 1, got -1"),
        ((4, 4, -1), "rank must be at least 0, got -1"),
        ((4, 4, float("nan")), "rank must be an integer, got nan, a float"),
    ],
)
def test_bad_sizes(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        StitchingLayer(*sizes)


def test_bad_norms() -> None:
    layer, x = random_layer(), torch.randn(5, 30)
    with pytest.raises(TypeError, match=r"norm must be a torch\.nn\.LayerNorm.*BatchNorm1d"):
        layer.forward_norm(x, nn.BatchNorm1d(40))
    with pytest.raises(ValueError, match=r"norm must normalise \(40,\).*\(30,\)"):
        layer.forward_norm(x, nn.LayerNorm(30))


def test_norms_that_compute_something_else() -> None:
    class Doubled(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match=r"norm must be a torch\.nn\.LayerNorm.*Doubled"):
        random_layer().forward_norm(torch.randn(5, 30), Doubled(40))


def test_threads_share_a_layer() -> None:
    """Inference and training at once: neither sees the other's cache half made."""
    layer, x = random_layer().eval(), torch.randn(6, 30)
    expected = inferred(layer, x)

    def work(i: int) -> bool:
        if i % 3 == 0:
            layer(x).sum().backward()
            return True
        if i % 3 == 1:
            layer._merged = None
        return torch.equal(inferred(layer, x), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(600)))
