"""Block sizes, warps and stages of every Triton kernel: one visible heuristic for each.

There is no autotuner. A configuration follows from widths and dtypes alone, never from the number
of rows, so that every batch size runs what the first one compiled; :func:`override` replaces values
for a sweep. The numbers were chosen by the sweep (``python -m benchmarks.sweep``) of bf16 on an
H200. For other chips and dtypes they have what the static report asks for (``python -m
snkernels.kernels.report``), no spills on any chip, and at most the shared memory that consumer
chips have too.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

Config = dict[str, int]

_overrides: dict[str, Config] = {}
_heuristics: list[str] = []


@contextlib.contextmanager
def override(heuristic: str, **values: int) -> Iterator[None]:
    """Replaces values in all that one heuristic returns inside the ``with`` block.

    Args:
        heuristic: the name of a function below.
        values: e.g. ``BLOCK_M=64, num_warps=4``.

    Raises:
        ValueError: no heuristic has that name.
    """
    if heuristic not in _heuristics:
        raise ValueError(f"heuristic must be one of {', '.join(_heuristics)}, not {heuristic!r}")
    previous = _overrides.get(heuristic, {})
    _overrides[heuristic] = {**previous, **values}
    try:
        yield
    finally:
        _overrides[heuristic] = previous


def heuristics() -> tuple[str, ...]:
    """The names that :func:`override` takes."""
    return tuple(_heuristics)


def _overridable(heuristic: Callable[..., Config]) -> Callable[..., Config]:
    _heuristics.append(heuristic.__name__)

    @functools.wraps(heuristic)
    def choose(*args: object) -> Config:
        return {**heuristic(*args), **_overrides.get(heuristic.__name__, {})}

    return choose


@_overridable
def project(dtype: torch.dtype, weight: torch.dtype, precision: str, out_features: int) -> Config:
    """For ``multi_stitch._project_groups_kernel``."""
    if dtype == torch.float32 and precision == "ieee":
        # With three stages, sums of blocks beside the total spill under Triton 3.6.
        return _tiles(64, _block(out_features, 64), 16, num_warps=4, num_stages=2)
    # Of an A or B that the kernel casts, two tiles are in shared memory.
    block_k = 128 // max(dtype.itemsize, weight.itemsize)
    if out_features <= 64:  # the low-rank intermediates: small tiles leave room for long ones
        return _tiles(64, _block(out_features, 64), 2 * block_k, num_warps=8, num_stages=3)
    return _tiles(128, 128, block_k, num_warps=8, num_stages=3)


@_overridable
def merge(dtype: torch.dtype, precision: str, rank: int) -> Config:
    """For ``merge._merge_kernel``."""
    if dtype == torch.float32 and precision == "ieee":
        blocks = {"BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_R": 16}
    else:
        blocks = {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": _block(rank, 128 // dtype.itemsize)}
    return {**blocks, "num_warps": 4, "num_stages": 2}


@_overridable
def outer(dtype: torch.dtype, precision: str, width: int) -> Config:
    """For ``outer._outer_kernel``; ``width`` is that of its right operand."""
    if dtype == torch.float32 and precision == "ieee":
        return _outer(16, 64, width)
    config = _outer(128 // dtype.itemsize, 64 if width <= 64 else 128, width)
    if dtype == torch.float32:
        config["num_stages"] = 2  # a third would spill for an A100
    return config


@_overridable
def sum_rows() -> Config:
    """For ``sums._sum_rows_kernel`` and ``sums._sum_groups_kernel``."""
    return {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4}


@_overridable
def sum_partials() -> Config:
    """For ``sums._sum_partials_kernel``."""
    return {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8}


@_overridable
def normalize_rows(dtype: torch.dtype, norm: torch.dtype, features: int) -> Config:
    """For ``residual_layer_norm._normalize_kernel``; ``norm`` is the dtype of LN's weight."""
    # 32 values of each tensor to a thread: four loads of 16 bytes in half precision.
    config = _rows(features, 1, 2, 32)
    return config if norm == dtype else _with_all_registers(config)


@_overridable
def normalize_rows_backward(dtype: torch.dtype, norm: torch.dtype, features: int) -> Config:
    """For ``residual_layer_norm._normalize_backward_kernel``; CTAS_PER_SM is for its grid."""
    config = _rows(features, 2 if features <= 1024 else 1, 1, 16)
    # Of four tensors the rows of two steps are in shared memory, beside those computed with:
    # 64 KiB of it. Wider rows come when they are needed.
    ahead = config["BLOCK_M"] * config["BLOCK_N"] * dtype.itemsize <= 8192
    config |= {"CTAS_PER_SM": max(1, 8 // config["num_warps"]), "STAGES": 3 if ahead else 1}
    if norm != dtype or config["num_warps"] == 1:
        return _with_all_registers(config)
    return config


def chunk(rows: int, block_m: int, ctas_per_sm: int, device: torch.device) -> int:
    """The rows in a chunk, for a kernel in which each CTA goes through one chunk of them.

    As many CTAs as run at once: more would add partial sums, and fewer leave SMs idle. Without a
    GPU, as on an H100.
    """
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return -(-rows // (processors * ctas_per_sm * block_m)) * block_m or block_m


def _rows(features: int, rows: int, warps: int, per_thread: int) -> Config:
    """So many whole rows, ``per_thread`` values to a thread: more where those are few warps."""
    block_n = _block(features, 1 << 30)
    warps = min(16, max(warps, rows * block_n // (32 * per_thread)))
    block_m = max(1, warps * 32 * per_thread // block_n)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps}


def _with_all_registers(config: Config) -> Config:
    """For kernels that would spill: the assembler makes room for more CTAs on an SM than gain."""
    return {**config, "maxnreg": min(255, 65536 // (32 * config["num_warps"]))}


def _block(size: int, largest: int) -> int:
    """The power of two that holds ``size``, at least 16 (the least for dots), at most largest."""
    return min(largest, max(16, 1 << (size - 1).bit_length()))


def _tiles(block_m: int, block_n: int, block_k: int, **options: int) -> Config:
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return {**blocks, **options}


def _outer(block_m: int, block_p: int, width: int) -> Config:
    # On an H200 wide ones gain a little by 4 warps, or by tiles twice as wide. But the assembler
    # then spills for an A100, and Triton 3.6 makes each product of the latter wait.
    blocks = {"BLOCK_M": block_m, "BLOCK_P": block_p, "BLOCK_Q": _block(width, 64)}
    return {**blocks, "num_warps": 8, "num_stages": 3}
