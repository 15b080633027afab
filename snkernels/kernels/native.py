"""The thin face of the compiled module, which reads and checks the tensors that it is given.

The functions allocate the outputs. Those of library ops have their signatures. ``linear``,
``residual_layer_norm``, ``residual_gradients``, ``stitch``, ``stitch_layer_norm``,
``stitch_gradients`` and ``width_of_stitches`` are quick ways in past torch: they look at their
arguments and at what torch is doing (:mod:`.watchers`), and leave to the caller what is not plainly
right.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

# Before the compiled module: both use OpenMP, and loaded after torch it shares torch's threads.
import torch
from torch import Tensor

from snkernels.kernels.watchers import VARIABLES, WATCHERS

_C: Any = None
IMPORT_ERROR: str | None = None
CUDA_VERSION: str | None = None
try:
    _C = importlib.import_module("snkernels._C")
    CUDA_VERSION = _C.cuda_version
    _C.watch_for(WATCHERS, VARIABLES)
except ImportError as error:
    IMPORT_ERROR = str(error)

# Where the GEMM of the CPU kernels was measured against that of MKL, which is made for other CPUs.
AMD_WITH_AVX512: bool = (
    _C is not None
    and _C.cpu_is_amd()
    and _C.cpu_isa() == "avx512"
    and torch.backends.mkl.is_available()
)

# What a function of the compiled module is told of a tensor in GPU memory.
View = tuple[int, int, int, int, int, int]
_cuda_view: Callable[[str, Tensor | None, int, int], View | None]
_cuda_view = CUDA_VERSION and _C.cuda_view  # type: ignore[assignment]


def _grads_like(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Room for the gradients that are needed, None for the others."""
    return [
        tensor.new_empty(tensor.shape) if need and tensor is not None else None
        for tensor, need in zip(tensors, needs, strict=True)
    ]


def norm_outputs(
    x: Tensor,
    features: int,
    dtype: torch.dtype | None = None,
    normed_dtype: torch.dtype | None = None,
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for y and LN(y), in the dtype of x or others, and for the statistics of each row of x.

    The statistics are fp32, and fp64 for fp64. Without a LayerNorm all but y have no elements.
    """
    rows = x.shape[0]

    def room(dtype: torch.dtype, *shape: int) -> Tensor:
        # Naming the dtype that it would have anyway takes half as long again.
        return x.new_empty(*shape) if dtype is own else x.new_empty(*shape, dtype=dtype)

    own = x.dtype
    dtype = dtype or own
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    if not normalize:
        return room(dtype, rows, features), room(dtype, 0), room(dtype, 0), room(dtype, 0)
    return (
        room(dtype, rows, features),
        room(normed_dtype or dtype, rows, features),
        room(statistics, rows),
        room(statistics, rows),
    )


def stitch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> Tensor:
    """See :func:`snkernels.reference.stitch`."""
    tensors = (weight, bias, lora_A, lora_B, None, None)
    return _one_stitch_forward(x, tensors, scaling, normalize=False)[0]


def stitch_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See :func:`snkernels.reference.stitch_backward`."""
    return multi_stitch_backward(
        *(grad_y, None, x, [0, x.shape[0]], (weight, bias, lora_A, lora_B, None, None)),
        *([scaling], None, None, None, [*needs, False, False]),
    )


def stitch_layer_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, LN(y), mean, 1/σ); see :func:`snkernels.reference.stitch` and ``layer_norm``."""
    tensors = (weight, bias, lora_A, lora_B, norm_weight, norm_bias)
    return _one_stitch_forward(x, tensors, scaling, normalize=True, eps=eps)


def stitch_layer_norm_backward(
    grad_y: Tensor | None,
    grad_normed: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See ``stitch_backward`` and ``layer_norm_backward`` of :mod:`snkernels.reference`."""
    tensors = (weight, bias, lora_A, lora_B, norm_weight, norm_bias)
    return multi_stitch_backward(
        grad_y, grad_normed, x, [0, x.shape[0]], tensors, [scaling], y, mean, rstd, needs
    )


def multi_stitch_forward(
    x: Tensor,
    offsets: list[int],
    tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    out_features: int,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stitches of all groups in one call; see :mod:`snkernels.ops.multi_stitch`."""
    groups = [
        (offsets[i], offsets[i + 1], scaling, *tensors[i * _TENSORS : (i + 1) * _TENSORS])
        for i, scaling in enumerate(scalings)
    ]
    return _stitch_forward(x, groups, out_features, normalize, eps)


def multi_stitch_backward(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor,
    offsets: list[int],
    tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of x and of all groups' tensors that ``needs`` marks, in order.

    Raises:
        ValueError: LN(y) has a gradient, but y or a statistic is not given.
    """
    if grad_normed is not None and (y is None or mean is None or rstd is None):
        raise ValueError("y, mean and rstd must be given with grad_normed, but one of them is None")
    grad = grad_y if grad_normed is None else grad_normed
    assert grad is not None
    grad_x, *grads = _grads_like((x, *tensors), needs)
    wanted = [g for g in (grad_x, *grads) if g is not None]
    if len(x) == 0:
        return [g.zero_() for g in wanted]
    groups = []
    for i, scaling in enumerate(scalings):
        own = slice(i * _TENSORS, (i + 1) * _TENSORS)
        groups.append((offsets[i], offsets[i + 1], scaling, *tensors[own], *grads[own]))
    normalized = grad_normed is not None
    _C.stitch_backward(
        *(grad_y, grad_normed, x, groups, grad.shape[1]),
        y if normalized else None,
        _statistics("mean", mean) if normalized else None,
        _statistics("rstd", rstd) if normalized else None,
        grad_x,
        torch.get_num_threads(),
    )
    return wanted


def _statistics(name: str, tensor: Tensor | None) -> Tensor | None:
    """A statistic, which kernels read as it was written: fp32, one row's after another.

    Raises:
        TypeError: it is anything else.
    """
    if tensor is not None and not (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        raise TypeError(f"{name} must be float32 and contiguous, as the forward returned it")
    return tensor


_TENSORS = 6  # of a group: weight, bias, lora_A, lora_B, norm_weight, norm_bias


def _one_stitch_forward(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    scaling: float,
    normalize: bool,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = tensors[0]
    assert weight is not None
    group = (0, x.shape[0], scaling, *tensors)
    return _stitch_forward(x, [group], weight.shape[0], normalize, eps)


def _stitch_forward(
    x: Tensor, groups: list[tuple[Any, ...]], features: int, normalize: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, LN(y), mean, 1/σ), of which all but y have no elements if there is no LayerNorm.

    A group: its first row and the one after its last, scaling, and its tensors.
    """
    outputs = norm_outputs(x, features, normalize=normalize)
    wanted = outputs if normalize else (outputs[0], None, None, None)
    _C.stitch_forward(x, groups, features, eps, *wanted, torch.get_num_threads())
    return outputs


# The quick ways in: the compiled functions themselves, as each frame of Python in between takes its
# time. None is their answer where anything is not plainly right.

# linear(x, weight, bias, least_work, least_rows): y of that many multiply-adds and rows or more,
# in inference.
linear: Callable[[Tensor, Tensor, Tensor | None, int, int], Tensor | None]
linear = _C and _C.linear

# stitch(x, parameters): y of tokens (..., in) and of a stitch (weight, …, norm_bias, scaling).
stitch: Callable[[Tensor, tuple[Any, ...]], Tensor | None]
stitch = _C and _C.stitch

# stitch_layer_norm(x, parameters, eps): y and LN(y), and mean and 1/σ of each row where autograd
# will need them.
stitch_layer_norm: Callable[[Tensor, tuple[Any, ...], float], tuple[Tensor, ...] | None]
stitch_layer_norm = _C and _C.stitch_layer_norm

# stitch_gradients(grad_y, grad_normed, x, parameters, y, mean, rstd, needs): those of x and of the
# six tensors of a stitch, None for what ``needs`` does not mark.
stitch_gradients: Callable[..., list[Tensor | None] | None]
stitch_gradients = _C and _C.stitch_gradients

# width_of_stitches(x, groups): the output width of stitches that x (..., in) fits; 0 for None.
width_of_stitches: Callable[[Tensor, list[Any]], int]
width_of_stitches = _C and _C.width_of_stitches

# residual_layer_norm(h, branch, layer_scale, norm_weight, norm_bias, eps) of tokens (..., N):
# (h + γ · branch, LN of that), and mean and 1/σ of each row where autograd will need them.
residual_layer_norm: Callable[..., tuple[Tensor, ...] | None]
residual_layer_norm = _C and _C.residual_layer_norm

# residual_gradients(grad_sum, grad_normed, h, branch, layer_scale, norm_weight, norm_bias, sum,
# mean, rstd, needs): those of h and of the four after it, None for what ``needs`` does not mark.
residual_gradients: Callable[..., list[Tensor | None] | None]
residual_gradients = _C and _C.residual_gradients


def residual_layer_norm_forward(
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum, LN(sum), mean, 1/σ); see :func:`snkernels.reference.residual`."""
    dtype = torch.promote_types(x.dtype, branch.dtype)
    outputs = norm_outputs(x, x.shape[1], dtype, normed_dtype)
    _C.residual_layer_norm_forward(
        *(x, branch, layer_scale, drop_path_scale, _rows_per_scale(x, drop_path_scale)),
        *(norm_weight, norm_bias, eps, *outputs, torch.get_num_threads()),
    )
    return outputs


def residual_layer_norm_backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See ``residual_backward`` and ``layer_norm_backward`` of :mod:`snkernels.reference`."""
    grads = _grads_like((x, branch, layer_scale, norm_weight, norm_bias), needs)
    statistics = _statistics("mean", mean), _statistics("rstd", rstd)
    _C.residual_layer_norm_backward(
        *(grad_sum, grad_normed, branch, layer_scale, drop_path_scale),
        *(_rows_per_scale(total, drop_path_scale), total, *statistics, norm_weight),
        *(*grads, torch.get_num_threads()),
    )
    return [grad for grad in grads if grad is not None]


def _rows_per_scale(rows: Tensor, drop_path_scale: Tensor | None) -> int:
    """Rows of a sample, which share a value of ``drop_path_scale``."""
    samples = 0 if drop_path_scale is None else drop_path_scale.shape[0]
    return max(rows.shape[0] // max(samples, 1), 1)


def cluster_kernel_obstacle(
    x: Tensor, weights: Sequence[Tensor | None], grouped: bool = False
) -> str | None:
    """Why the Hopper kernel does not take these operands, W of each group; None if it does.

    There must be a group. :func:`cuda_stitch_layer_norm` is a call that is not grouped.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {x.dtype}"
    if any(weight is None for weight in weights):
        return "it projects every group, but one is the identity"
    out_features, in_features = weights[0].shape  # type: ignore[union-attr]
    if in_features % 8 or out_features % 8 or not in_features or not out_features:
        return f"it takes multiples of 8 features, not {out_features} from {in_features}"
    if _C.cuda_sm90_kernel_for(in_features, out_features, grouped) is None:
        return f"W is too large for it: {out_features} features from {in_features}"
    if x.shape[0] > 2**31 - 128:
        return f"it takes up to 2³¹ − 128 rows, not {x.shape[0]}"
    capability = torch.cuda.get_device_capability(x.device)
    if capability != (9, 0):
        return "it runs on compute capability 9.0, not on {}.{}".format(*capability)
    return None


def cuda_stitch_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """(y, LN(y), mean, 1/σ) by one Hopper kernel; see :mod:`snkernels.reference`.

    W + scaling · B A is merged first, in a launch of its own, and rounded once to the dtype of x,
    in which A and B are multiplied. So is a W of another dtype; a frozen one without a low-rank
    part is best kept in that of x.

    None if :func:`cluster_kernel_obstacle` names one.
    """
    own = (weight, bias, lora_A, lora_B, norm_weight, norm_bias)
    return _cluster_kernel(x, None, own, (scaling,), eps)


def cuda_multi_stitch_layer_norm(
    x: Tensor,
    group_offsets: Tensor | list[int],
    tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The same kernels over groups of rows, 32 of them in a launch; ``tensors`` holds six of each.

    Offsets in device memory are read by the kernel alone, so nobody waits for them, and a captured
    graph goes by those that it finds when it is replayed; those of a list go into the launch.
    Rows that belong to no group are not written.

    None if :func:`cluster_kernel_obstacle` names one.
    """
    if isinstance(group_offsets, list):
        group_offsets = torch.tensor(group_offsets, device="cpu")
    return _cluster_kernel(x, group_offsets.contiguous(), tensors, scalings, eps)


def _cluster_kernel(
    x: Tensor,
    group_offsets: Tensor | None,
    tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """``tensors``: W, b, A, B, norm weight and norm bias of each group."""
    weights = tensors[::_TENSORS]
    if cluster_kernel_obstacle(x, weights, group_offsets is not None):
        return None
    (rows, in_features), features = x.shape, weights[0].shape[0]  # type: ignore[union-attr]
    device, stream = x.device.index, torch.cuda.current_stream(x.device).cuda_stream
    # Until the launches, or one copy's memory would be given to the next.
    kept: list[Tensor] = []

    def matrix(name: str, tensor: Tensor, dtype: torch.dtype, rows: int, cols: int) -> View | None:
        """In rows that begin at multiples of 16 bytes, as they are copied."""
        tensor = tensor.to(dtype).contiguous()
        if tensor.data_ptr() % 16:
            tensor = tensor.clone()
        kept.append(tensor)
        return _cuda_view(name, tensor, rows, cols)

    def vector(name: str, tensor: Tensor | None) -> View | None:
        if tensor is None:
            return None
        kept.append(tensor.contiguous())
        return _cuda_view(name, kept[-1], 1, features)

    sources = [tensor for i in (0, 2, 3) for tensor in tensors[i::_TENSORS] if tensor is not None]
    if len(sources) > len(weights) or any(tensor.dtype != x.dtype for tensor in sources):
        all_half = all(tensor.dtype == x.dtype for tensor in sources)
        dtype = x.dtype if all_half else torch.float32
        stitches = []
        for i, scaling in enumerate(scalings):
            weight, _, lora_A, lora_B, *_ = tensors[_TENSORS * i :]
            assert weight is not None
            low_rank: tuple[View | None, View | None] = None, None
            if lora_A is not None and lora_B is not None:
                missing = -lora_A.shape[0] % 8  # ranks, to whole 16 bytes of B
                rank = lora_A.shape[0] + missing
                lora_A = torch.nn.functional.pad(lora_A, (0, 0, 0, missing))
                lora_B = torch.nn.functional.pad(lora_B, (0, missing))
                low_rank = (
                    matrix("lora_A", lora_A, dtype, rank, in_features),
                    matrix("lora_B", lora_B, dtype, features, rank),
                )
            own = matrix("weight", weight, dtype, features, in_features)
            stitches.append((own, *low_rank, scaling))
        merged = x.new_empty(len(weights) * features, in_features)
        _C.cuda_merge(stitches, _cuda_view("merged", merged, *merged.shape), device, stream)
        weights = merged.split(features)

    projections = []
    for i, weight in enumerate(weights):
        _, bias, _, _, norm_weight, norm_bias = tensors[_TENSORS * i : _TENSORS * (i + 1)]
        assert weight is not None
        projections.append(
            (
                matrix("weight", weight, x.dtype, features, in_features),
                vector("bias", bias),
                vector("norm_weight", norm_weight),
                vector("norm_bias", norm_bias),
            )
        )
    y, normed, mean, rstd = norm_outputs(x, features)
    _C.cuda_stitch_layer_norm_sm90(
        matrix("x", x, x.dtype, rows, in_features),
        0 if group_offsets is None else group_offsets.data_ptr(),
        group_offsets is not None and group_offsets.is_cpu,
        projections,
        eps,
        _cuda_view("y", y, rows, features),
        _cuda_view("normed", normed, rows, features),
        _cuda_view("mean", mean, 1, rows),
        _cuda_view("rstd", rstd, 1, rows),
        device,
        stream,
    )
    return y, normed, mean, rstd
