"""``multi_stitch`` and ``multi_stitch_layer_norm``: rows in groups, a stitch of its own for each.

Each stitch has its own full W, unlike the adapters of multi-LoRA serving, so this is a ragged
grouped GEMM. Parameters come one tensor each, never stacked: an optimizer must be able to skip a
stitch that was not drawn. So a group that the host knows to be empty never reaches the library op.
"""

import functools
import itertools
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from snkernels import reference
from snkernels.kernels import native
from snkernels.ops.autograd import applied, differentiable_once
from snkernels.ops.checks import check_input, check_number, check_stitch, check_tensor
from snkernels.ops.library import (
    autocast,
    needs_grad,
    register,
    tries_kernel,
    triton_kernel,
    without_autocast,
)
from snkernels.ops.stitch import empty_grads, spread

Optionals = Sequence[Tensor | None]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


class StitchGroup(NamedTuple):
    """The parameters of one group; see :func:`snkernels.ops.stitch_layer_norm` for their shapes.

    Without a weight the group is the identity: y = x, which needs equal widths.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    scaling: float = 1.0


TENSORS: Final = 6  # of a group; the scaling comes after them


def _fake(
    x: Tensor,
    group_offsets: Tensor | None,
    known_offsets: Sequence[int] | None,
    tensors: Optionals,
    scalings: Sequence[float],
    out_features: int,
    normalize: bool,
    eps: float,
) -> Outputs:
    return native.norm_outputs(x, out_features, normalize=normalize)


def _fake_backward(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor,
    group_offsets: Tensor | None,
    known_offsets: Sequence[int] | None,
    tensors: Optionals,
    scalings: Sequence[float],
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    return empty_grads((x, *tensors), needs)


def _check_count(shape: tuple[int, ...], groups: int) -> None:
    """Raises unless offsets of that shape are one more than groups."""
    if shape != (groups + 1,):
        raise ValueError(
            f"group_offsets must have shape ({groups + 1},) for {groups} groups, "
            f"but they have {shape}"
        )


def _check_rising(offsets: Sequence[int], rows: int) -> None:
    """Raises unless offsets rise from 0 to the number of rows."""
    if offsets[0] != 0 or offsets[-1] != rows or sorted(offsets) != list(offsets):
        raise ValueError(
            f"group_offsets must rise from 0 to the {rows} rows of x, but they are {list(offsets)}"
        )


def _check(
    x: Tensor,
    group_offsets: Tensor | None,
    known_offsets: Sequence[int] | None,
    tensors: Optionals,
    scalings: Sequence[float],
    *_: Any,
) -> None:
    """Raises unless there are tensors and offsets for every group, and these rise where known."""
    groups = len(scalings)
    if len(tensors) != TENSORS * groups:
        raise ValueError(
            f"tensors must hold {TENSORS} for each of {groups} groups, but they are {len(tensors)}"
        )
    if group_offsets is None and known_offsets is None:
        raise ValueError("group_offsets or known_offsets must be given, but both are None")
    if known_offsets is None and group_offsets is not None:
        _check_count(tuple(group_offsets.shape), groups)
        known_offsets = group_offsets.tolist() if group_offsets.is_cpu else None
    elif known_offsets is not None:
        _check_count((len(known_offsets),), groups)
    if known_offsets is not None:
        _check_rising(known_offsets, x.shape[0])


def _check_backward(
    grad_y: Tensor | None, grad_normed: Tensor | None, x: Tensor, *others: Any
) -> None:
    _check(x, *others)


def _located(function: Callable[..., Any], x_at: int = 0) -> Callable[..., Any]:
    """Hands a backend one argument for both kinds of offsets: a list where the host knows them.

    x is argument number ``x_at``; the offsets follow it.
    """

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        offsets, known = arguments[x_at + 1 : x_at + 3]
        if known is None:
            known = offsets.tolist() if offsets.is_cpu else offsets
        return function(*arguments[: x_at + 1], known, *arguments[x_at + 3 :])

    return run


def _groups(
    group_offsets: Tensor | list[int], tensors: Optionals, scalings: Sequence[float]
) -> Iterator[tuple[int, slice, StitchGroup]]:
    """Number, rows and parameters of every group that has rows. Waits for a GPU's offsets."""
    offsets = group_offsets if isinstance(group_offsets, list) else group_offsets.tolist()
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if start < stop:
            own = (*tensors[i * TENSORS : (i + 1) * TENSORS], scalings[i])
            yield i, slice(start, stop), StitchGroup._make(own)


@without_autocast
def _torch(
    x: Tensor,
    group_offsets: Tensor | list[int],
    tensors: Optionals,
    scalings: Sequence[float],
    out_features: int,
    normalize: bool,
    eps: float,
) -> Outputs:
    """One group after another, by the reference."""
    y, normed, mean, rstd = native.norm_outputs(x, out_features, normalize=normalize)
    for _, rows, group in _groups(group_offsets, tensors, scalings):
        if group.weight is None:
            y[rows] = x[rows]
        else:
            y[rows] = reference.stitch(x[rows], *_of_stitch(group))
        if normalize:
            norm = group.norm_weight, group.norm_bias
            normed[rows], mean[rows], rstd[rows] = reference.layer_norm(y[rows], *norm, eps)
    return y, normed, mean, rstd


@without_autocast
def _torch_backward(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor,
    group_offsets: Tensor | list[int],
    tensors: Optionals,
    scalings: Sequence[float],
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    grad_x = x.new_zeros(x.shape) if needs[0] else None
    grads: list[Tensor | None] = [grad_x, *[None] * len(tensors)]
    for i, rows, group in _groups(group_offsets, tensors, scalings):
        stitch = slice(1 + i * TENSORS, 5 + i * TENSORS)
        norm = slice(5 + i * TENSORS, 7 + i * TENSORS)
        grad = None if grad_y is None else grad_y[rows]
        if grad_normed is not None:
            assert y is not None and mean is not None and rstd is not None
            through_norm, *grads[norm] = reference.layer_norm_backward(
                grad_normed[rows], y[rows], mean[rows], rstd[rows], group.norm_weight
            )
            grad = through_norm if grad is None else through_norm + grad
        assert grad is not None
        if group.weight is not None:
            wanted = [needs[0], *needs[stitch]]
            found = reference.stitch_backward(grad, x[rows], *_of_stitch(group), wanted)
            grad, *grads[stitch] = spread(found, wanted)
        if grad_x is not None and grad is not None:
            grad_x[rows] = grad
    # A gradient is owed for all that is needed, also of a group that had no rows.
    return [
        tensor.new_zeros(tensor.shape) if grad is None else grad.to(tensor.dtype)
        for tensor, grad, need in zip((x, *tensors), grads, needs, strict=True)
        if need and tensor is not None
    ]


def _of_stitch(
    group: StitchGroup,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float]:
    assert group.weight is not None
    return group.weight, group.bias, group.lora_A, group.lora_B, group.scaling


_triton = triton_kernel("multi_stitch", "multi_stitch_forward")
_triton_backward = triton_kernel("multi_stitch_backward", "multi_stitch_backward")


@without_autocast
def _cuda(
    x: Tensor,
    group_offsets: Tensor | list[int],
    tensors: Optionals,
    scalings: Sequence[float],
    out_features: int,
    normalize: bool,
    eps: float,
) -> Outputs:
    done = None
    if normalize and tensors:
        done = native.cuda_multi_stitch_layer_norm(x, group_offsets, tensors, scalings, eps)
    if done is None:
        done = _triton(x, group_offsets, tensors, scalings, out_features, normalize, eps)
    return done


_forward_op = register(
    # One of the offsets is given: a tensor, or where the host knows them, integers.
    "multi_stitch(Tensor x, Tensor? group_offsets, int[]? known_offsets, Tensor?[] tensors,"
    " float[] scalings, int out_features, bool normalize, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    implementations={
        "torch": _located(_torch),
        "cpu": _located(native.multi_stitch_forward),
        "triton": _located(_triton),
        "cuda": _located(_cuda),
    },
    check=_check,
)
_backward_op = register(
    "multi_stitch_backward(Tensor? grad_y, Tensor? grad_normed, Tensor x, Tensor? group_offsets,"
    " int[]? known_offsets, Tensor?[] tensors, float[] scalings, Tensor? y, Tensor? mean,"
    " Tensor? rstd, bool[] needs) -> Tensor[]",
    fake=_fake_backward,
    implementations={
        "torch": _located(_torch_backward, 2),
        "cpu": _located(native.multi_stitch_backward, 2),
        "triton": _located(_triton_backward, 2),
        # Only the forward is in CUDA C++, and the residuals of all backends are the same.
        "cuda": _located(_triton_backward, 2),
    },
    check=_check_backward,
)


class _MultiStitch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group_offsets: Tensor | None,
        known_offsets: Sequence[int] | None,
        scalings: Sequence[float],
        out_features: int,
        normalize: bool,
        eps: float,
        plain: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        offsets = group_offsets, known_offsets
        y, normed, mean, rstd = _forward_op(
            x, *offsets, tensors, scalings, out_features, normalize, eps, plain=plain
        )
        of_norm = (y, mean, rstd) if normalize else (None, None, None)
        ctx.save_for_backward(x, group_offsets, *of_norm, *tensors)
        ctx.known_offsets, ctx.scalings, ctx.normalize = known_offsets, scalings, normalize
        ctx.set_materialize_grads(False)
        if not normalize:
            ctx.mark_non_differentiable(normed)
        return y, normed

    @staticmethod
    @differentiable_once("multi_stitch")
    def backward(ctx: Any, grad_y: Tensor | None, grad_normed: Tensor | None) -> Any:
        x, group_offsets, y, mean, rstd, *tensors = ctx.saved_tensors
        if not ctx.normalize:
            grad_normed = None  # compiled code hands in zeros, of the empty output
        if grad_y is None and grad_normed is None:
            return (None,) * len(ctx.needs_input_grad)
        need_x, need_tensors = ctx.needs_input_grad[0], ctx.needs_input_grad[8:]
        used = [True] * (TENSORS - 2) + [grad_normed is not None] * 2
        needs = [need_x, *(need and used[i % TENSORS] for i, need in enumerate(need_tensors))]
        offsets = group_offsets, ctx.known_offsets
        grads = _backward_op(
            grad_y, grad_normed, x, *offsets, tensors, ctx.scalings, y, mean, rstd, needs
        )
        grad_x, *grad_tensors = spread(grads, needs)
        return grad_x, *[None] * 7, *grad_tensors


_apply = applied(_MultiStitch)


def _multi_stitch(
    x: Tensor,
    group_offsets: Tensor | Sequence[int],
    groups: Sequence[StitchGroup],
    normalize: bool,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    groups = list(groups)
    out_features = native.width_of_stitches(x, groups) if tries_kernel("multi_stitch") else 0
    plain = out_features > 0 and x.dim() == 2
    if not plain:
        out_features = _check_groups(x, groups)
    check_number("eps", eps, 0.0)
    offsets, known, groups = _where_rows_are(group_offsets, x, groups)
    tensors: list[Tensor | None] = []
    for group in groups:
        tensors += _without_rank_zero(group)[:TENSORS]
    x = x if plain else autocast(x)
    scalings = [float(group.scaling) for group in groups]
    how = out_features, normalize, float(eps)
    if needs_grad(x, *tensors):
        return _apply(x, offsets, known, scalings, *how, plain, *tensors)
    return _forward_op(x, offsets, known, tensors, scalings, *how, plain=plain)[:2]


def _check_groups(x: Tensor, groups: Sequence[StitchGroup]) -> int:
    """Raises unless the parameters of all groups fit x and each other; returns the output width."""
    check_input(x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape (rows, in), but it has {tuple(x.shape)}")
    if len(groups) == 0:
        raise ValueError("groups must hold at least one group, but it is empty")
    widths = {x.shape[1] if g.weight is None else g.weight.shape[0] for g in groups}
    if len(widths) > 1:
        raise ValueError(f"groups must agree in their output width, but have {sorted(widths)}")
    (out_features,) = widths
    for i, group in enumerate(groups):
        try:
            if group.weight is not None:
                check_stitch(x, group.weight, group.bias, group.lora_A, group.lora_B, group.scaling)
            elif any(tensor is not None for tensor in group[1:4]):
                raise ValueError("weight must be given where bias, lora_A or lora_B is")
            else:
                check_number("scaling", group.scaling)
            check_tensor("norm_weight", group.norm_weight, x, (out_features,))
            check_tensor("norm_bias", group.norm_bias, x, (out_features,))
        except (TypeError, ValueError) as error:
            raise type(error)(f"groups[{i}]: {error}") from None
    return out_features


def _without_rank_zero(group: StitchGroup) -> StitchGroup:
    if group.lora_A is None or group.lora_A.shape[0]:
        return group
    return group._replace(lora_A=None, lora_B=None)


def _where_rows_are(
    group_offsets: Tensor | Sequence[int], x: Tensor, groups: Sequence[StitchGroup]
) -> tuple[Tensor | None, list[int] | None, Sequence[StitchGroup]]:
    """The offsets, as a tensor or as integers, and the groups.

    Where the host can tell, only of groups with rows. Compiled code has them as a tensor.
    """
    if isinstance(group_offsets, Tensor):
        if group_offsets.dtype != torch.int64:
            raise TypeError(f"group_offsets must be int64, but they are {group_offsets.dtype}")
        if not group_offsets.is_cpu and group_offsets.device != x.device:
            raise ValueError(
                f"group_offsets must be on {x.device}, where x is, or in CPU memory, "
                f"but they are on {group_offsets.device}"
            )
        shape = tuple(group_offsets.shape)
    else:
        if not all(isinstance(offset, numbers.Integral) for offset in group_offsets):
            raise TypeError(
                f"group_offsets must be an int64 tensor or integers, but are {group_offsets!r}"
            )
        shape = (len(group_offsets),)
    _check_count(shape, len(groups))
    compiling = torch.compiler.is_compiling()
    if not isinstance(group_offsets, Tensor):
        known = list(group_offsets) if compiling else [int(offset) for offset in group_offsets]
    elif group_offsets.is_cpu and not compiling:
        known = group_offsets.tolist()
    else:
        return group_offsets, None, groups  # a GPU's kernels stay within the rows whatever they say
    _check_rising(known, x.shape[0])
    if len(set(known)) < len(known):
        present = [i for i, (start, stop) in enumerate(itertools.pairwise(known)) if start < stop]
        known = [0, *(known[i + 1] for i in present)]
        groups = [groups[i] for i in present]
    return (torch.tensor(known, device="cpu"), None, groups) if compiling else (None, known, groups)


def multi_stitch(
    x: Tensor, group_offsets: Tensor | Sequence[int], groups: Sequence[StitchGroup]
) -> Tensor:
    """Projects each group of rows by its own stitch; see :func:`snkernels.ops.stitch`.

    Args:
        x: tokens, (rows, in), float16, bfloat16, float32 or float64, the rows of a group adjacent.
        group_offsets: groups + 1 integers, or an int64 tensor of them in CPU memory or where x is:
            group i has rows offsets[i] up to, but not including, offsets[i + 1]. Groups may be
            empty. The kernels do not look at values in a GPU's memory before they run, as that
            would wait for it (the torch backend, a loop, has to): a captured graph may change them
            between replays. Wrong ones leave the outputs undefined, but are never followed outside
            the rows of x.
        groups: the parameters of each, all of one input and one output width.

    Returns:
        y, (rows, out), in the dtype of x; under autocast in autocast's dtype.

    The parameters of a group without rows get no gradient, None and not zero, so that an optimizer
    skips them. Where only a GPU knows the offsets, or compiled code has them as a tensor, they get
    zeros: give integers, which also compiled code knows, where parameters are trained.

    Raises:
        TypeError, ValueError: arguments that do not fit together.
    """
    return _multi_stitch(x, group_offsets, groups, normalize=False)[0]


def multi_stitch_layer_norm(
    x: Tensor,
    group_offsets: Tensor | Sequence[int],
    groups: Sequence[StitchGroup],
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Projects and normalises each group of rows; see :func:`snkernels.ops.stitch_layer_norm`.

    Args:
        x: as for :func:`multi_stitch`.
        group_offsets: as for :func:`multi_stitch`.
        groups: as for :func:`multi_stitch`, and each with a norm weight and bias of its own.
        eps: added to every variance.

    Returns:
        y and LN(y), both (rows, out), in the dtype of x; under autocast in autocast's dtype.

    Gradients are as for :func:`multi_stitch`.

    Raises:
        TypeError, ValueError: arguments that do not fit together.
    """
    return _multi_stitch(x, group_offsets, groups, normalize=True, eps=eps)
