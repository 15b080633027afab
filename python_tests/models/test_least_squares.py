from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from snkernels.models.anchors import embed, run_blocks
from snkernels.models.least_squares import Moments, cut_moments, solve
from snkernels.models.vit import PlainViT


def stream(rows: Tensor, sizes: list[int]) -> Moments:
    moments = Moments.none(rows.shape[1])
    for part in rows.split(sizes):
        moments.merge(Moments.of(part))
    return moments


def fit(x: Tensor, y: Tensor, batch: int = 50) -> tuple[Tensor, Tensor]:
    rows = torch.cat((x.double(), y.double()), dim=1)
    sizes = [batch] * (len(rows) // batch) + [len(rows) % batch] * (len(rows) % batch > 0)
    width = x.shape[1]
    return solve(stream(rows, sizes), slice(0, width), slice(width, None))


def squared_error(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> float:
    return (x.double() @ weight.T + bias - y.double()).square().sum().item()


def least_squared_error(x: Tensor, y: Tensor) -> float:
    """The smallest error that numpy finds in float64, with a column of ones for the bias."""
    ones = np.concatenate((x.double().numpy(), np.ones((len(x), 1))), axis=1)
    solution = np.linalg.lstsq(ones, y.double().numpy(), rcond=None)[0]
    return float(np.square(ones @ solution - y.double().numpy()).sum())


def well_conditioned(n: int, d: int) -> Tensor:
    return torch.randn(n, d)


def massive_activations(n: int, d: int) -> Tensor:
    """Two channels that are huge at few tokens, and one with a huge mean, as in real ViTs."""
    x = torch.randn(n, d)
    x[:: n // 10, 0] = 1e4
    x[:: n // 5, 1] = -3e4
    x[:, 2] += 1e4
    return x


def nearly_collinear(n: int, d: int) -> Tensor:
    x = torch.randn(n, d, dtype=torch.float64)
    x[:, 1] = x[:, 0] + 1e-5 * x[:, 1]
    x[:, 2] = 3 * x[:, 3] - x[:, 4]
    return x


def channels_of_all_sizes(n: int, d: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64) * torch.logspace(-8, 8, d, dtype=torch.float64)


@pytest.mark.parametrize(
    "features", [well_conditioned, massive_activations, nearly_collinear, channels_of_all_sizes]
)
def test_no_map_is_better(features: Callable[[int, int], Tensor]) -> None:
    x = features(500, 24)
    y = x.double() @ torch.randn(24, 10).double() / x.double().std(0).max() + torch.randn(500, 10)
    weight, bias = fit(x, y)
    assert weight.shape == (10, 24)
    assert weight.dtype == bias.dtype == torch.float64
    best = least_squared_error(x, y)
    assert best > 0
    assert squared_error(x, y, weight, bias) <= best * (1 + 1e-9)


def test_an_exact_map_is_found() -> None:
    x, weight, bias = torch.randn(200, 8), torch.randn(5, 8).double(), torch.randn(5).double()
    found = fit(x, x.double() @ weight.T + bias)
    torch.testing.assert_close(found[0], weight, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found[1], bias, rtol=1e-11, atol=1e-11)


def test_fewer_rows_than_channels_gives_the_least_norm() -> None:
    """On channels of unit spread, the norm that the docstring names."""
    x, y = torch.randn(20, 40).double() * torch.logspace(-3, 3, 40).double(), torch.randn(20, 6)
    weight, bias = fit(x, y)
    assert squared_error(x, y, weight, bias) < 1e-18 * y.square().sum().item()
    spread = x.std(0, correction=0)
    scaled = ((x - x.mean(0)) / spread).numpy()
    centred = (y - y.mean(0)).double().numpy()
    expected = np.linalg.lstsq(scaled, centred, rcond=1e-10)[0].T
    torch.testing.assert_close(weight * spread, torch.from_numpy(expected))


def test_constant_channels_get_no_weight() -> None:
    """The rounding of a mean is no signal, however small the spread that it leaves."""
    x = torch.randn(300, 6, dtype=torch.float64)
    x[:, 2], x[:, 4] = 0.0, 1234.567
    assert Moments.of(x[:7]).centred[4, 4] > 0
    y = torch.randn(300, 4)
    weight, bias = fit(x, y, batch=7)
    assert (weight[:, [2, 4]] == 0).all()
    assert squared_error(x, y, weight, bias) <= least_squared_error(x, y) * (1 + 1e-9)


def test_one_row_gives_the_constant_map() -> None:
    x, y = torch.randn(1, 3), torch.randn(1, 2)
    weight, bias = fit(x, y)
    assert (weight == 0).all()
    torch.testing.assert_close(bias, y[0].double())


def test_moments_do_not_depend_on_the_batches() -> None:
    rows = torch.randn(97, 6).double() + torch.tensor([0, 1e6, -1e6, 1e3, 0, 1]).double()
    whole = Moments.of(rows)
    parts = stream(rows, [1, 40, 0, 3, 53])
    assert parts.count == whole.count == 97
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(parts.centred, whole.centred, rtol=1e-12, atol=1e-7)
    centred = np.cov(rows.numpy().T, bias=True) * 97
    torch.testing.assert_close(whole.centred, torch.from_numpy(centred))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_must_be_finite(value: float) -> None:
    x = torch.randn(10, 3)
    x[4, 1] = value
    with pytest.raises(ValueError, match="images must give finite tokens"):
        fit(x, torch.randn(10, 2))


def test_rows_must_be_there() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        solve(Moments.none(5), slice(0, 3), slice(3, None))


def test_cuts_see_the_tokens_of_both_anchors(make_vit: Callable[..., PlainViT]) -> None:
    small, large = make_vit(depth=2), make_vit(depth=5, embed_dim=24)
    images = torch.randn(6, 3, 8, 8)
    moments = cut_moments(small, large, [(1, 3), (2, 5)], images.split(4))
    for (p, q), at_cut in zip([(1, 3), (2, 5)], moments, strict=True):
        tokens = [
            run_blocks(vit, embed(vit, images), 0, stop) for vit, stop in ((small, p), (large, q))
        ]
        rows = torch.cat(tokens, dim=-1).flatten(0, 1)
        assert at_cut.count == 6 * 5
        expected = Moments.of(rows)
        torch.testing.assert_close(at_cut.mean, expected.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(at_cut.centred, expected.centred, rtol=1e-4, atol=1e-4)


ROWS = torch.randn(60, 7, generator=torch.Generator().manual_seed(0))


def gather_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=3)
    # The ranks hold 13, 47 and no rows.
    parts = ROWS.split([13, 47, 0])
    torch.save(stream(parts[rank], [len(parts[rank])]).gather(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_gather_the_same_bits(tmp_path: Path) -> None:
    mp.spawn(gather_on_rank, (str(tmp_path),), nprocs=3)
    with torch.serialization.safe_globals([Moments]):
        first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    for other in others:
        assert other.count == first.count == 60
        assert torch.equal(other.mean, first.mean)
        assert torch.equal(other.centred, first.centred)
    expected = stream(ROWS, [13, 47])
    assert torch.equal(first.mean, expected.mean)
    assert torch.equal(first.centred, expected.centred)
