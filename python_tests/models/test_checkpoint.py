import argparse
import json
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snkernels.models import checkpoint
from snkernels.models.stitched import StitchedViT
from snkernels.models.vit import PlainViT

State = dict[str, Tensor]


def official_state(
    depths: tuple[int, int],
    widths: tuple[int, int] = (64, 128),
    rank: int = 2,
    classes: int = 5,
    patch: int = 4,
    side: int = 2,
    hidden: int = 4,
) -> State:
    """Return a state dict in the official layout in which every value matters."""
    state: State = {}

    def linear(name: str, rows: int, columns: int) -> None:
        state[f"{name}.weight"] = torch.randn(rows, columns) / columns**0.5
        state[f"{name}.bias"] = torch.randn(rows) / 2

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 0.5 + torch.rand(width)
        state[f"{name}.bias"] = torch.randn(width) / 2

    for a, (depth, d) in enumerate(zip(depths, widths, strict=True)):
        state[f"anchors.{a}.cls_token"] = torch.randn(1, 1, d)
        state[f"anchors.{a}.pos_embed"] = torch.randn(1, side * side, d)
        state[f"anchors.{a}.patch_embed.proj.weight"] = torch.randn(d, 3, patch, patch) / 7
        state[f"anchors.{a}.patch_embed.proj.bias"] = torch.randn(d)
        for i in range(depth):
            block = f"anchors.{a}.blocks.{i}"
            norm(f"{block}.norm1", d)
            linear(f"{block}.attn.qkv", 3 * d, d)
            linear(f"{block}.attn.proj", d, d)
            norm(f"{block}.norm2", d)
            linear(f"{block}.mlp.fc1", hidden * d, d)
            linear(f"{block}.mlp.fc2", d, hidden * d)
            state[f"{block}.gamma_1"] = 0.5 + torch.rand(d)
            state[f"{block}.gamma_2"] = 0.5 + torch.rand(d)
        norm(f"anchors.{a}.norm", d)
        linear(f"anchors.{a}.head", classes, d)
    for direction, count in enumerate((depths[0], depths[0] - 1)):
        source, target = widths[direction], widths[1 - direction]
        for i in range(count):
            transform = f"stitch_layers.{direction}.{i}.transform"
            linear(transform, target, source)
            if rank:
                state[f"{transform}.lora_A"] = torch.randn(rank, source) / source**0.5
                state[f"{transform}.lora_B"] = torch.randn(target, rank)
    return state


class Official:
    """The forward of the release, from the published description, over its own key names."""

    def __init__(self, state: State, depths: tuple[int, int]) -> None:
        self.state, self.depths = state, depths

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

    def embed(self, images: Tensor, a: int) -> Tensor:
        name = f"anchors.{a}"
        weight = self.state[f"{name}.patch_embed.proj.weight"]
        bias = self.state[f"{name}.patch_embed.proj.bias"]
        patches = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).mT
        first = self.state[f"{name}.cls_token"].expand(len(images), -1, -1)
        return torch.cat((first, patches + self.state[f"{name}.pos_embed"]), dim=1)

    def block(self, x: Tensor, a: int, i: int) -> Tensor:
        name = f"anchors.{a}.blocks.{i}"
        n, tokens, d = x.shape
        qkv = self.linear(self.norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv.view(n, tokens, 3, d // 64, 64).permute(2, 0, 3, 1, 4)
        attended = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).reshape(n, tokens, d)
        x = x + self.state[f"{name}.gamma_1"] * self.linear(attended, f"{name}.attn.proj")
        hidden = F.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + self.state[f"{name}.gamma_2"] * self.linear(hidden, f"{name}.mlp.fc2")

    def stitch(self, x: Tensor, direction: int, i: int) -> Tensor:
        name = f"stitch_layers.{direction}.{i}.transform"
        y = self.linear(x, name)
        if f"{name}.lora_A" not in self.state:
            return y
        lora_A, lora_B = self.state[f"{name}.lora_A"], self.state[f"{name}.lora_B"]
        return y + x @ lora_A.T @ lora_B.T / lora_A.shape[0]

    def routes(self) -> dict[int, tuple[list[tuple[int, int, int]], list[int]]]:
        """Return per id the (anchor, first, last block) parts, and the stitch after each."""
        small, large = self.depths
        ratio = large // small
        nearest = [i * small // large for i in range(large)]
        s_to_l = [(i, (i + 1) * ratio, i) for i in range(small)]
        l_to_s = [
            (i, nearest[i] + 1, i // ratio)
            for i in range(large - 1)
            if small == large or i % 2 == 1
        ]
        paths: list[Any] = [([(0, 0, small - 1)], []), ([(1, 0, large - 1)], [])]
        paths += [([(0, 0, i), (1, j, large - 1)], [stitch]) for i, j, stitch in s_to_l]
        paths += [([(1, 0, i), (0, j, small - 1)], [stitch]) for i, j, stitch in l_to_s]
        paths += [
            ([(1, 0, i), (0, j, k), (1, m, large - 1)], [out, back])
            for i, j, out in l_to_s
            for k, m, back in s_to_l
            if k >= j and k != small - 1
        ]
        paths += [
            ([(0, 0, i), (1, j, k), (0, m, small - 1)], [out, back])
            for i, j, out in s_to_l
            for k, m, back in l_to_s
            if k >= j
        ]
        numbered = dict(enumerate(paths))
        del numbered[1 + small]  # S complete, then a stitch: never used
        return numbered

    def logits(self, images: Tensor, route: int) -> Tensor:
        parts, stitches = self.routes()[route]
        x = self.embed(images, parts[0][0])
        for at, (a, first, last) in enumerate(parts):
            if at:
                x = self.stitch(x, 1 - a, stitches[at - 1])
            for i in range(first, last + 1):
                x = self.block(x, a, i)
        last_anchor = f"anchors.{parts[-1][0]}"
        return self.linear(self.norm(x, f"{last_anchor}.norm")[:, 0], f"{last_anchor}.head")


@pytest.mark.parametrize(("depths", "rank"), [((3, 6), 2), ((3, 3), 2), ((2, 4), 0)])
def test_official_logits_of_every_route(depths: tuple[int, int], rank: int) -> None:
    state = official_state(depths, rank=rank)
    exact = Official({key: value.double() for key, value in state.items()}, depths)
    rounded = Official(state, depths)
    images = torch.randn(2, 3, 8, 8)
    model = StitchedViT.from_snnetv2(state).eval()
    wide = StitchedViT.from_snnetv2(state).double().eval()
    assert [route.id for route in model.routes] == list(exact.routes())
    for route in exact.routes():
        expected = exact.logits(images.double(), route)
        ours = wide(images.double(), stitch=route)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
        # In float32 we may be no further from the truth than twice the release's own formula.
        allowed = 2 * (rounded.logits(images, route) - expected).abs().max() + 1e-6
        for training in (False, True):
            ours = model.train(training)(images, stitch=route)
            assert (ours - expected).abs().max() <= allowed


@pytest.mark.parametrize("widths", [(64, 128), (128, 64)])
def test_the_shape_is_inferred(widths: tuple[int, int]) -> None:
    state = official_state((2, 4), widths, rank=3, classes=7, patch=2, side=3)
    model = StitchedViT.from_snnetv2(state)
    assert [len(vit.blocks) for vit in model.anchors] == [2, 4]
    assert [vit.embed_dim for vit in model.anchors] == list(widths)
    assert [vit.blocks[0].attn.num_heads for vit in model.anchors] == [w // 64 for w in widths]
    assert model.rank == 3
    assert model.large.num_classes == 7
    assert model.large.patch_embed.patch_size == (2, 2)
    assert model.large.patch_embed.img_size == (6, 6)


def test_biases_and_hidden_widths_are_inferred() -> None:
    state = official_state((2, 2), hidden=2)
    for key in [key for key in state if key.endswith("attn.qkv.bias")]:
        del state[key]
    model = StitchedViT.from_snnetv2(state)
    assert model.small.blocks[0].attn.qkv.bias is None
    assert model.large.blocks[0].mlp.fc1.out_features == 2 * 128
    assert model.to_snnetv2().keys() == state.keys()


def test_heads_can_be_given() -> None:
    state = official_state((2, 2), (48, 64))
    with pytest.raises(ValueError, match=r"num_heads must be given: anchors.0 is 48 wide"):
        StitchedViT.from_snnetv2(state)
    model = StitchedViT.from_snnetv2(state, num_heads=(3, 2))
    assert [vit.blocks[0].attn.num_heads for vit in model.anchors] == [3, 2]


@pytest.mark.parametrize(
    ("num_heads", "error", "message"),
    [
        (2, TypeError, "num_heads must be two integers, got 2"),
        ((1.0, 2.0), TypeError, "each of num_heads must be an integer, got 1.0, a float"),
        ((2,), ValueError, "num_heads must be two integers, got 1"),
        ((), ValueError, "num_heads must be two integers, got 0"),
        ((3, 2), ValueError, "multiple of num_heads, got 64 and 3"),
    ],
)
def test_heads_must_be_two_that_fit(num_heads: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StitchedViT.from_snnetv2(official_state((2, 2)), num_heads)


def test_the_official_layout_comes_back_bit_for_bit() -> None:
    state = official_state((2, 4))
    back = StitchedViT.from_snnetv2(state).to_snnetv2()
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value)


def test_what_the_official_layout_cannot_hold_is_named(make_vit: Callable[..., PlainViT]) -> None:
    model = StitchedViT(make_vit(), make_vit())
    model.small.reg_token = nn.Parameter(torch.zeros(1, 1, 12))
    with pytest.raises(ValueError, match=r"no place for anchors\.0\.reg_token$"):
        model.to_snnetv2()


@pytest.mark.parametrize("wrapped", [False, True])
def test_official_files_load(tmp_path: Path, wrapped: bool) -> None:
    state = official_state((2, 2))
    arguments = argparse.Namespace(lr=0.1, output_dir="", betas=(0.9, 0.99), mixup=None)
    content = {"model": state, "epoch": 3, "args": arguments} if wrapped else state
    torch.save(content, tmp_path / "official.pth")
    model = StitchedViT.from_snnetv2(tmp_path / "official.pth")
    for key, value in model.to_snnetv2().items():
        assert torch.equal(value, state[key])
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


class Evil:
    """Runs a command when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["beside", "in the namespace", "legacy"])
def test_nothing_in_a_file_is_executed(tmp_path: Path, place: str) -> None:
    evil, file = Evil(tmp_path / "executed"), tmp_path / "official.pth"
    content: dict[str, Any] = {"model": official_state((2, 2)), "args": argparse.Namespace()}
    if place == "in the namespace":
        content["args"].output_dir = evil
    else:
        content["more"] = evil
    torch.save(content, file, _use_new_zipfile_serialization=place != "legacy")
    with pytest.raises(ValueError, match=r"(?s)plain values and an argparse.Namespace: .*mkdir"):
        StitchedViT.from_snnetv2(file)
    assert not evil.path.exists()
    torch.load(file, weights_only=False)  # the file is as evil as the test says
    assert evil.path.exists()


@pytest.mark.parametrize("kind", ["truncated", "text", "plain pickle", "empty"])
def test_files_of_another_kind_are_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "official.pth"
    torch.save({"model": official_state((2, 2))}, file)
    whole = file.read_bytes()
    file.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "text": b"not a checkpoint at all",
            "plain pickle": pickle.dumps({"model": {}}, protocol=2),
            "empty": b"",
        }[kind]
    )
    with pytest.raises(ValueError, match=r"official\.pth must be a torch\.save file"):
        StitchedViT.from_snnetv2(file)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        StitchedViT.from_snnetv2(tmp_path / "none.pth")


def drop(key: str) -> Callable[[State], Any]:
    return lambda state: {k: v for k, v in state.items() if k != key}


def put(**tensors: Tensor) -> Callable[[State], Any]:
    return lambda state: {**state, **{k.replace("__", "."): v for k, v in tensors.items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "no official SN-Netv2 checkpoint: it is empty"),
        (lambda state: {"model": 3}, "must hold a state dict"),
        (lambda state: {"model": {"a": 3}}, "must hold a state dict"),
        (lambda state: [state], "must hold a mapping, got list"),
        (put(anchors__0__dist_token=torch.zeros(1)), r"unknown anchors\.0\.dist_token$"),
        (drop("anchors.1.pos_embed"), r"lacks anchors\.1\.pos_embed"),
        (drop("anchors.1.blocks.3.gamma_2"), r"lacks anchors\.1\.blocks\.3\.ls2\.gamma$"),
        (drop("stitch_layers.1.0.transform.lora_B"), "lacks stitch_layers.1.0.transform.lora_B"),
        (
            put(stitch_layers__1__1__transform__bias=torch.zeros(64)),
            r"has stitch_layers\.1\.1\.transform\.bias that the model lacks",
        ),
        (
            put(anchors__0__norm__weight=torch.zeros(65)),
            r"anchors\.0\.norm\.weight must have shape \(64,\), got \(65,\)",
        ),
        (put(anchors__0__pos_embed=torch.zeros(1, 5, 64)), "square grid, got 5 patches"),
        (put(anchors__0__pos_embed=torch.zeros(())), r"0\.pos_embed must have 3 dim.* shape \(\)"),
        (put(anchors__1__pos_embed=torch.zeros(4, 128)), r"1\.pos_embed must have 3 .*\(4, 128\)"),
        (put(anchors__0__head__weight=torch.zeros(())), r"0\.head\.weight must have 2 dimensions"),
        (
            put(anchors__1__blocks__0__mlp__fc1__weight=torch.zeros(())),
            r"1\.blocks\.0\.mlp\.fc1\.weight must have 2 dimensions",
        ),
        (
            put(anchors__0__patch_embed__proj__weight=torch.zeros(64, 48)),
            r"0\.patch_embed\.proj\.weight must have 4 dimensions",
        ),
        (
            put(anchors__0__patch_embed__proj__weight=torch.zeros(0, 3, 4, 4)),
            r"0\.patch_embed\.proj\.weight must have 4 dimensions, none of them 0",
        ),
        (
            put(stitch_layers__0__0__transform__lora_A=torch.zeros(())),
            r"0\.0\.transform\.lora_A must have 2 dimensions",
        ),
        (
            put(anchors__0__blocks__1000000000__norm1__weight=torch.zeros(64)),
            r"blocks of anchors\.0 must be numbered without gaps, got 1000000000 but not 2$",
        ),
        (
            put(anchors__0__norm__weight=torch.ones(64, dtype=torch.int64)),
            r"anchors\.0\.norm\.weight must be floating point, got torch\.int64",
        ),
    ],
)
def test_damaged_official_state_is_named(
    tmp_path: Path, change: Callable[[State], Any], message: str
) -> None:
    damaged = change(official_state((2, 4)))
    if isinstance(damaged, list):
        torch.save(damaged, tmp_path / "official.pth")
        damaged = tmp_path / "official.pth"
    with pytest.raises(ValueError, match=message):
        StitchedViT.from_snnetv2(damaged)


@pytest.fixture
def make(
    make_vit: Callable[..., PlainViT], randomise: Callable[[nn.Module], None]
) -> Callable[..., StitchedViT]:
    def build(**options: Any) -> StitchedViT:
        small = make_vit(init_values=None, mlp_ratio=2.0, drop_path_rate=0.1)
        large = make_vit(depth=4, embed_dim=24)
        model = StitchedViT(small, large, np.int64(3), **options).eval()
        randomise(model)
        return model

    return build


Make = Callable[..., StitchedViT]


def assert_equal_states(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype
        assert torch.equal(value, b[key])


def test_our_file_builds_the_same_model(make: Make, tmp_path: Path) -> None:
    model = make(seed=np.int64(3), gap=1.0, tilt=True, draws="equal_cost")
    for _ in range(5):
        model.sampler.draw()
    model.save(tmp_path / "model.safetensors")
    again = StitchedViT.load(tmp_path / "model.safetensors")
    assert_equal_states(again.state_dict(), model.state_dict())
    assert again.routes == model.routes
    assert again.small.config == model.small.config
    assert again.sampler.probabilities() == model.sampler.probabilities()
    assert [again.sampler.draw() for _ in range(20)] == [model.sampler.draw() for _ in range(20)]
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.eval()(images, stitch=2), model(images, stitch=2))
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_dtypes_come_back(make: Make, tmp_path: Path) -> None:
    model = make()
    model.anchors.to(torch.bfloat16)
    model.small.patch_embed.proj.to(memory_format=torch.channels_last)
    model.save(tmp_path / "model.safetensors")
    again = StitchedViT.load(tmp_path / "model.safetensors")
    assert_equal_states(again.state_dict(), model.state_dict())


def test_restoring_keeps_the_model_s_dtypes(make: Make, tmp_path: Path) -> None:
    model = make()
    model.save(tmp_path / "model.safetensors")
    wide = make().double()
    wide.restore(tmp_path / "model.safetensors")
    assert_equal_states(wide.state_dict(), model.double().state_dict())


def test_given_anchors_are_filled(make: Make, tmp_path: Path) -> None:
    model, other = make(), make()
    del model.small.config  # as of a ViT that is not ours
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(TypeError, match=r"anchors must be given: .* PlainViT and PlainViT"):
        StitchedViT.load(tmp_path / "model.safetensors")
    again = StitchedViT.load(tmp_path / "model.safetensors", (other.small, other.large))
    assert again.small is other.small
    assert_equal_states(again.state_dict(), model.state_dict())


def test_saving_replaces_a_file_whole_or_not_at_all(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = make(), tmp_path / "model.safetensors"
    model.save(path)
    before = path.read_bytes()

    def breaks(tensors: State, filename: Path, metadata: dict[str, str]) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", breaks)
    with pytest.raises(OSError, match="No space left"):
        make(seed=9).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def truncated(path: Path, make: Make) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def text(path: Path, make: Make) -> None:
    path.write_text("not a checkpoint at all")


def foreign(path: Path, make: Make) -> None:
    checkpoint.save_file({"weight": torch.zeros(3)}, path)


def other_rank(path: Path, make: Make) -> None:
    model = make()
    StitchedViT(model.small, model.large, rank=4).save(path)


def other_heads(path: Path, make: Make) -> None:
    model = make()
    for block in model.large.blocks:
        block.attn.num_heads = 6
    model.save(path)


def other_depth(path: Path, make: Make) -> None:
    model = make()
    large = PlainViT(8, 4, num_classes=5, embed_dim=24, depth=3, num_heads=3)
    StitchedViT(model.small, large, rank=3).save(path)


def integers(path: Path, make: Make) -> None:
    tensors, config = checkpoint.read(path)
    tensors["anchors.0.norm.weight"] = tensors["anchors.0.norm.weight"].long()
    checkpoint.write(path, tensors, config)


def without_config(path: Path, make: Make) -> None:
    metadata = {"format": checkpoint._FORMAT}
    checkpoint.save_file(checkpoint.read(path)[0], path, metadata)


def half_a_config(path: Path, make: Make) -> None:
    tensors, config = checkpoint.read(path)
    metadata = {"format": checkpoint._FORMAT, "config": json.dumps(config)[:-9]}
    checkpoint.save_file(tensors, path, metadata)


_MISSING = object()


def config_with(*where: str | int, value: Any) -> Callable[[Path, Make], None]:
    """Return a damage that puts ``value`` into the config of a file, in place of what is there."""

    def damage(path: Path, make: Make) -> None:
        tensors, config = checkpoint.read(path)
        at: Any = {"": config}
        for key in (keys := ["", *where])[:-1]:
            at = at[key]
        if value is _MISSING:
            del at[keys[-1]]
        else:
            at[keys[-1]] = value
        checkpoint.write(path, tensors, config if where else at[""])

    return damage


def sampling(path: Path, make: Make, **options: Any) -> None:
    make(**options).save(path)


BAD_CONFIGS = [
    (integers, r"0\.norm\.weight must be floating point, got torch\.int64"),
    (without_config, "holds no config in JSON"),
    (half_a_config, "holds no config in JSON"),
    (config_with(value=[]), r"the config of .* must be dict, got \[\]"),
    (config_with("anchors", value=_MISSING), "the config of .* lacks 'anchors'"),
    (config_with("anchors", value=3), "'anchors' in .* must be list, got 3"),
    (config_with("anchors", value=[]), "'anchors' in .* must hold 2 items, got 0"),
    (config_with("anchors", value=[1, 2]), "item 0 of 'anchors' .* must be dict, got 1"),
    (config_with("anchors", 1, "act", value=_MISSING), "item 1 of 'anchors' .* lacks 'act'"),
    (config_with("anchors", 0, "num_heads", value=3), "'num_heads' in item 0 .* must be list"),
    (config_with("anchors", 0, "norm_eps", value=["a"]), r"'norm_eps' .* must be int \| float"),
    (config_with("anchors", 0, "arguments", value=[8]), r"must be dict \| None, got \[8\]"),
    (config_with("rank", value=None), "'rank' in .* must be int, got None"),
    (config_with("sampler", value=_MISSING), "lacks 'sampler'"),
    (config_with("sampler", value={"seed": 0}), "'sampler' in .* lacks 'draws'"),
    (config_with("sampler", "draws", value=-1), "draws must be zero or more, got -1"),
    (config_with("sampling", value=_MISSING), "lacks 'sampling'"),
    (config_with("sampling", "gap", value="1"), "'gap' in 'sampling' .* got '1'"),
    (config_with("notes", value=[]), r"'notes' in .* must be dict, got \[\]"),
]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *BAD_CONFIGS,
        (partial(sampling, gap=1.0), r"gap of its sampling is 1\.0, here it is None"),
        (partial(sampling, tilt=True), "tilt of its sampling is True, here it is False"),
        (partial(sampling, draws="shared"), "draws of its sampling is 'shared', here it is 'own'"),
        (truncated, "model.safetensors is truncated or no safetensors file"),
        (text, "model.safetensors is truncated or no safetensors file"),
        (foreign, "is no checkpoint of ours: .* got None"),
        (other_rank, r"lora_A must have shape \(3, 12\), got \(4, 12\)"),
        (other_heads, r"num_heads of its large anchor is \[6, 6, 6, 6\], here it is \[3"),
        (other_depth, r"num_heads of its large anchor is \[3, 3, 3\], here it is \[3, 3, 3, 3\]"),
    ],
)
def test_a_bad_file_leaves_the_model_as_it_was(
    make: Make, tmp_path: Path, damage: Callable[[Path, Make], None], message: str
) -> None:
    path = tmp_path / "model.safetensors"
    make(seed=4).save(path)
    damage(path, make)
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sampler = model.sampler.state_dict()
    with pytest.raises(ValueError, match=message) as refusal:
        model.restore(path)
    assert str(path) in str(refusal.value)
    assert_equal_states(model.state_dict(), before)
    assert model.sampler.state_dict() == sampler


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *BAD_CONFIGS,
        (config_with("anchors", 0, "arguments", "width", value=3), "argument 'width'"),
        (config_with("anchors", 0, "arguments", "embed_dim", value="12"), "no model can have"),
        (config_with("anchors", 0, "arguments", "mlp_ratio", value=float("inf")), "infinity"),
        (config_with("anchors", 1, "arguments", "num_heads", value=5), "multiple of num_heads"),
        (config_with("rank", value=-1), "no model can have: .*rank"),
        (config_with("sampling", "gap", value=float("nan")), "gap must be zero or more"),
        (config_with("sampling", "draws", value="none"), "draws must be one of"),
    ],
)
def test_no_model_is_built_from_a_bad_file(
    make: Make, tmp_path: Path, damage: Callable[[Path, Make], None], message: str
) -> None:
    path = tmp_path / "model.safetensors"
    make().save(path)
    damage(path, make)
    with pytest.raises(ValueError, match=message) as refusal:
        StitchedViT.load(path)
    assert str(path) in str(refusal.value)


def test_a_bad_file_leaves_given_anchors_as_they_were(make: Make, tmp_path: Path) -> None:
    path, other = tmp_path / "model.safetensors", make()
    make().double().save(path)
    integers(path, make)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"must be floating point"):
        StitchedViT.load(path, (other.small, other.large))
    assert_equal_states(other.state_dict(), before)
    with pytest.raises(TypeError, match=r"large \(Linear\) must be a plain ViT"):
        StitchedViT.load(path, (other.small, nn.Linear(2, 2)))


def test_a_folder_is_no_checkpoint(make: Make, tmp_path: Path) -> None:
    for read in (StitchedViT.load, make().restore):
        with pytest.raises(IsADirectoryError, match="is a folder; name the file in it"):
            read(tmp_path)


def test_reading_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        StitchedViT.load(tmp_path / "none.safetensors")
