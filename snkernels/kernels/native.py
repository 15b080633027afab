"""The thin face of the compiled module: tensors become pointers here, after every check.

The functions have the signatures of the library ops that they implement and allocate the outputs.
"""

import importlib
from collections.abc import Sequence
from typing import Any

# Before the compiled module: both use OpenMP, and loaded after torch it shares torch's threads.
import torch
from torch import Tensor

_C: Any = None
IMPORT_ERROR: str | None = None
CUDA_VERSION: str | None = None
try:
    _C = importlib.import_module("snkernels._C")
    CUDA_VERSION = _C.cuda_version
except ImportError as error:
    IMPORT_ERROR = str(error)

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

View = tuple[int, int, int, int, int, int]


def _view(name: str, tensor: Tensor | None, rows: int, cols: int, device: str) -> View | None:
    """(pointer, dtype, rows, cols, strides) of a matrix, or of a vector as a matrix of one row."""
    if tensor is None:
        return None
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None or not (tensor.is_cpu if device == "cpu" else tensor.is_cuda):
        raise TypeError(
            f"{name} must be float32, float16 or bfloat16 on {device}, "
            f"but it is {tensor.dtype} on {tensor.device}"
        )
    shape, stride = tensor.shape, tensor.stride()
    if shape != (rows, cols) and (rows != 1 or shape != (cols,)):
        raise ValueError(f"{name} must have shape ({rows}, {cols}), but it has {tuple(shape)}")
    return tensor.data_ptr(), dtype, rows, cols, stride[0], stride[-1]


def _stitch_views(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    device: str,
) -> tuple[View | None, ...]:
    (out_features, in_features), rank = weight.shape, 0 if lora_A is None else lora_A.shape[0]
    return (
        _view("x", x, x.shape[0], in_features, device),
        _view("weight", weight, out_features, in_features, device),
        _view("bias", bias, 1, out_features, device),
        _view("lora_A", lora_A, rank, in_features, device),
        _view("lora_B", lora_B, out_features, rank, device),
    )


def _grads_like(
    tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[list[Tensor], list[View | None]]:
    """Room for the gradients that are needed, and a view of each or None for all."""
    grads: list[Tensor] = []
    views: list[View | None] = []
    for tensor, need in zip(tensors, needs, strict=True):
        if not need or tensor is None:
            views.append(None)
            continue
        grad = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        grads.append(grad)
        views.append(
            _view("grad", grad, grad.shape[0] if grad.dim() == 2 else 1, grad.shape[-1], "cpu")
        )
    return grads, views


def norm_outputs(
    x: Tensor,
    features: int,
    dtype: torch.dtype | None = None,
    normed_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for y and LN(y), in the dtype of x or others, and for the statistics of each row of x.

    The statistics are fp32, and fp64 for fp64.
    """
    rows, dtype = x.shape[0], dtype or x.dtype
    statistics = torch.promote_types(dtype, torch.float32)
    return (
        x.new_empty(rows, features, dtype=dtype),
        x.new_empty(rows, features, dtype=normed_dtype or dtype),
        x.new_empty(rows, dtype=statistics),
        x.new_empty(rows, dtype=statistics),
    )


def stitch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`snkernels.reference.stitch`; ``out`` is written to instead of a new tensor."""
    y = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    views = _stitch_views(x, weight, bias, lora_A, lora_B, "cpu")
    _C.stitch_forward(
        *views, scaling, _view("y", y, x.shape[0], weight.shape[0], "cpu"), torch.get_num_threads()
    )
    return y


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
    x_view, weight_view, _, A_view, B_view = _stitch_views(x, weight, bias, lora_A, lora_B, "cpu")
    grads, grad_views = _grads_like((x, weight, bias, lora_A, lora_B), needs)
    _C.stitch_backward(
        _view("grad_y", grad_y, x.shape[0], weight.shape[0], "cpu"),
        x_view,
        weight_view,
        A_view,
        B_view,
        scaling,
        *grad_views,
        torch.get_num_threads(),
    )
    return grads


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
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, LN(y), mean, 1/σ); see :func:`snkernels.reference.stitch` and ``layer_norm``.

    ``out``, four tensors for these, is written to instead of new ones.
    """
    rows, features = x.shape[0], weight.shape[0]
    y, normed, mean, rstd = norm_outputs(x, features) if out is None else out
    _C.stitch_layer_norm_forward(
        *_stitch_views(x, weight, bias, lora_A, lora_B, "cpu"),
        scaling,
        _view("norm_weight", norm_weight, 1, features, "cpu"),
        _view("norm_bias", norm_bias, 1, features, "cpu"),
        eps,
        _view("y", y, rows, features, "cpu"),
        _view("normed", normed, rows, features, "cpu"),
        _view("mean", mean, 1, rows, "cpu"),
        _view("rstd", rstd, 1, rows, "cpu"),
        torch.get_num_threads(),
    )
    return y, normed, mean, rstd


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
    rows, features = x.shape[0], weight.shape[0]
    x_view, weight_view, _, A_view, B_view = _stitch_views(x, weight, bias, lora_A, lora_B, "cpu")
    grads, grad_views = _grads_like(
        (x, weight, bias, lora_A, lora_B, norm_weight, norm_bias), needs
    )
    _C.stitch_layer_norm_backward(
        _view("grad_y", grad_y, rows, features, "cpu"),
        _view("grad_normed", grad_normed, rows, features, "cpu"),
        x_view,
        weight_view,
        A_view,
        B_view,
        scaling,
        _view("y", y, rows, features, "cpu"),
        _view("mean", mean, 1, rows, "cpu"),
        _view("rstd", rstd, 1, rows, "cpu"),
        _view("norm_weight", norm_weight, 1, features, "cpu"),
        *grad_views,
        torch.get_num_threads(),
    )
    return grads


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
    rows, features = x.shape
    dtype = torch.promote_types(x.dtype, branch.dtype)
    total, normed, mean, rstd = norm_outputs(x, features, dtype, normed_dtype)
    _C.residual_layer_norm_forward(
        _view("x", x, rows, features, "cpu"),
        *_residual_views(branch, layer_scale, drop_path_scale),
        _view("norm_weight", norm_weight, 1, features, "cpu"),
        _view("norm_bias", norm_bias, 1, features, "cpu"),
        eps,
        _view("sum", total, rows, features, "cpu"),
        _view("normed", normed, rows, features, "cpu"),
        _view("mean", mean, 1, rows, "cpu"),
        _view("rstd", rstd, 1, rows, "cpu"),
        torch.get_num_threads(),
    )
    return total, normed, mean, rstd


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
    rows, features = total.shape
    grads, grad_views = _grads_like((x, branch, layer_scale, norm_weight, norm_bias), needs)
    _C.residual_layer_norm_backward(
        _view("grad_sum", grad_sum, rows, features, "cpu"),
        _view("grad_normed", grad_normed, rows, features, "cpu"),
        *_residual_views(branch, layer_scale, drop_path_scale),
        _view("sum", total, rows, features, "cpu"),
        _view("mean", mean, 1, rows, "cpu"),
        _view("rstd", rstd, 1, rows, "cpu"),
        _view("norm_weight", norm_weight, 1, features, "cpu"),
        *grad_views,
        torch.get_num_threads(),
    )
    return grads


def _residual_views(
    branch: Tensor, layer_scale: Tensor | None, drop_path_scale: Tensor | None
) -> tuple[View | None, View | None, View | None, int]:
    rows, features = branch.shape
    samples = rows if drop_path_scale is None else drop_path_scale.shape[0]
    return (
        _view("branch", branch, rows, features, "cpu"),
        _view("layer_scale", layer_scale, 1, features, "cpu"),
        _view("drop_path_scale", drop_path_scale, 1, samples, "cpu"),
        max(rows // max(samples, 1), 1),
    )


def cuda_bias_layer_norm(
    gemm: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, LN(y), mean, 1/σ) of y = gemm + bias, for a contiguous (M, N ≤ 2048) matrix on a GPU.

    Never run on a GPU yet: compiled only.
    """
    rows, features = gemm.shape
    if features > 2048:
        raise ValueError(f"the cuda backend takes up to 2048 features, but gemm has {features}")
    y, normed = torch.empty_like(gemm), torch.empty_like(gemm)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=gemm.device) for _ in range(2))
    vectors = (None if v is None else v.contiguous() for v in (bias, norm_weight, norm_bias))
    bias, norm_weight, norm_bias = vectors
    _C.cuda_bias_layer_norm(
        _view("gemm", gemm.contiguous(), rows, features, "cuda"),
        _view("bias", bias, 1, features, "cuda"),
        _view("norm_weight", norm_weight, 1, features, "cuda"),
        _view("norm_bias", norm_bias, 1, features, "cuda"),
        eps,
        _view("y", y, rows, features, "cuda"),
        _view("normed", normed, rows, features, "cuda"),
        _view("mean", mean, 1, rows, "cuda"),
        _view("rstd", rstd, 1, rows, "cuda"),
        gemm.device.index,
        torch.cuda.current_stream(gemm.device).cuda_stream,
    )
    return y, normed, mean, rstd


def cluster_kernel_obstacle(x: Tensor, weight: Tensor, lora_A: Tensor | None) -> str | None:
    """Why :func:`cuda_stitch_layer_norm` does not take these operands; None if it does."""
    (out_features, in_features), rank = weight.shape, 0 if lora_A is None else lora_A.shape[0]
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {x.dtype}"
    if in_features % 8 or out_features % 8 or not in_features or not 0 < out_features <= 2048:
        return f"it takes multiples of 8, up to 2048 out, not {out_features} from {in_features}"
    if rank > 64:
        return f"it takes ranks up to 64, not {rank}"
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, LN(y), mean, 1/σ) by one Hopper kernel; see :mod:`snkernels.reference`.

    W, A and B are cast to the dtype of x first, in a pass of their own where they are of another;
    a frozen W is best kept in the dtype of x. Scaling · x Aᵀ is not rounded to that dtype.

    Never run on a GPU yet: compiled, and its source run on a stand-in machine in the tests.

    Raises:
        ValueError: operands that :func:`cluster_kernel_obstacle` names the obstacle of.
    """
    if obstacle := cluster_kernel_obstacle(x, weight, lora_A):
        raise ValueError(f"the Hopper kernel cannot run: {obstacle}")
    (features, in_features), rank = weight.shape, 0 if lora_A is None else lora_A.shape[0]
    if lora_B is not None and rank % 8:
        # The copy engine reads rows that begin at multiples of 16 bytes.
        lora_B = torch.nn.functional.pad(lora_B, (0, -rank % 8))

    # In a list until the launch, so that no copy's memory is given to the next.
    operands = []
    for tensor in (x, weight, lora_A, lora_B):
        if tensor is not None:
            tensor = tensor.to(x.dtype).contiguous()
            if tensor.data_ptr() % 16:
                tensor = tensor.clone()
        operands.append(tensor)
    vectors = (None if v is None else v.contiguous() for v in (bias, norm_weight, norm_bias))
    bias, norm_weight, norm_bias = vectors
    rows = x.shape[0]
    y, normed, mean, rstd = norm_outputs(x, features)
    _C.cuda_stitch_layer_norm_sm90(
        _view("x", operands[0], rows, in_features, "cuda"),
        _view("weight", operands[1], features, in_features, "cuda"),
        _view("bias", bias, 1, features, "cuda"),
        _view("lora_A", operands[2], rank, in_features, "cuda"),
        _view("lora_B", operands[3], features, rank + -rank % 8, "cuda"),
        scaling,
        _view("norm_weight", norm_weight, 1, features, "cuda"),
        _view("norm_bias", norm_bias, 1, features, "cuda"),
        eps,
        _view("y", y, rows, features, "cuda"),
        _view("normed", normed, rows, features, "cuda"),
        _view("mean", mean, 1, rows, "cuda"),
        _view("rstd", rstd, 1, rows, "cuda"),
        y.device.index,
        torch.cuda.current_stream(y.device).cuda_stream,
    )
    return y, normed, mean, rstd
