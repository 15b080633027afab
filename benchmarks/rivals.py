"""Other ways to run one route, in plain torch: what plans are measured against."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snkernels import StitchedViT
from snkernels.models.blocks import Block
from snkernels.ops import linear, residual_layer_norm
from snkernels.routing.space import Route, Stitch

Projection = Callable[[StitchedViT, Stitch, Tensor], Tensor]


def release_block(block: Block, x: Tensor) -> Tensor:
    """A block as the SN-Netv2 release runs it, the N × N matrix of its attention in memory."""
    attention, normed = block.attn, block.norm1(x)
    B, N, C = normed.shape
    qkv = attention.qkv(normed).reshape(B, N, 3, attention.num_heads, C // attention.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    attended = attention.proj((weights @ v).transpose(1, 2).reshape(B, N, C))
    x = x + block.drop_path1(block.ls1(attended))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def called_block(block: Block, x: Tensor) -> Tensor:
    """A block as the module that it is."""
    return block(x)


class Merged:
    """The release's stitches at evaluation, low-rank parts merged ahead."""

    def __init__(self, model: StitchedViT) -> None:
        with torch.no_grad():
            self._weights = {
                layer: t.weight + t.lora_B @ t.lora_A / len(t.lora_A)
                for layers in model.stitch_layers
                for layer in layers
                for t in [layer.transform]
            }

    def __call__(self, model: StitchedViT, stitch: Stitch, x: Tensor) -> Tensor:
        layer = model.stitch_layers[stitch.direction][stitch.index]
        return F.linear(x, self._weights[layer], layer.transform.bias)


def unmerged(model: StitchedViT, stitch: Stitch, x: Tensor) -> Tensor:
    """The release's stitches in training."""
    t = model.stitch_layers[stitch.direction][stitch.index].transform
    return F.linear(x, t.weight, t.bias) + (x @ t.lora_A.t() @ t.lora_B.t()) / len(t.lora_A)


def along(
    model: StitchedViT,
    route: Route,
    images: Tensor,
    block: Callable[[Block, Tensor], Tensor],
    project: Projection,
) -> Tensor:
    """Logits of a route, block after block, all tokens in every block and norm."""
    vit = model.anchors[route.segments[0].anchor]
    x = vit._pos_embed(vit.patch_embed(images))
    for i, segment in enumerate(route.segments):
        vit = model.anchors[segment.anchor]
        if i:
            x = project(model, route.stitches[i - 1], x)
        for j in range(segment.start, segment.stop):
            x = block(vit.blocks[j], x)
    return vit.head(vit.norm(x)[:, 0])


def fused_loop(model: StitchedViT, route: Route, images: Tensor) -> Tensor:
    """Logits of a route by a loop that one would write by hand around this library's ops.

    The last block computes the class token alone, as a plan does.
    """
    vit = model.anchors[route.segments[0].anchor]
    h = vit._pos_embed(vit.patch_embed(images))
    normed = vit.blocks[0].norm1(h)
    for i, segment in enumerate(route.segments):
        vit = model.anchors[segment.anchor]
        if i:
            stitch = route.stitches[i - 1]
            layer = model.stitch_layers[stitch.direction][stitch.index]
            h, normed = layer.forward_norm(h, vit.blocks[segment.start].norm1)
        for j in range(segment.start, segment.stop):
            block = vit.blocks[j]
            last = j + 1 == len(vit.blocks)
            following = vit.norm if last else vit.blocks[j + 1].norm1
            if last:
                branch, h = _class_token(block.attn, normed), h[:, :1]
            else:
                branch = _attention(block.attn, normed)
            h, normed = _add(h, branch, block.ls1.gamma, block.norm2)
            h, normed = _add(h, _mlp(block.mlp, normed), block.ls2.gamma, following)
    return vit.head(normed[:, 0])


def _add(h: Tensor, branch: Tensor, gamma: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return residual_layer_norm(h, branch, gamma, None, norm.weight, norm.bias, norm.eps)


def _attention(attention: nn.Module, x: Tensor) -> Tensor:
    qkv = _linear(attention.qkv, x).unflatten(-1, (3, attention.num_heads, -1))
    attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
    return _linear(attention.proj, attended.transpose(1, 2).flatten(2))


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    return _linear(mlp.fc2, mlp.act(_linear(mlp.fc1, x)))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _class_token(attention: nn.Module, x: Tensor) -> Tensor:
    width, heads = x.shape[-1], (attention.num_heads, -1)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    q = linear(x[:, :1], weight[:width], bias[:width]).unflatten(-1, heads).transpose(1, 2)
    kv = linear(x, weight[width:], bias[width:]).unflatten(-1, (2, *heads))
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(q, k, v)
    return _linear(attention.proj, attended.transpose(1, 2).flatten(2))
