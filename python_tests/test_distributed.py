"""Data-parallel steps, in two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from snkernels.distributed import average_gradients, broadcast_parameters
from snkernels.models.stitched import StitchedViT
from snkernels.models.vit import PlainViT

# What each rank runs in a step; the model has the routes 0, 1, 2 (S→L) and 4 (L→S).
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two routes": ({"stitch": 0}, {"stitch": 4}),
    "one route": ({"stitch": 2}, {"stitch": 2}),
    "a route per image": ({"stitch": [0, 2, 2, 0]}, {"stitch": [2, 2, 2, 2]}),
    "several routes": ({"routes": [0, 2]}, {"routes": [1, 0, 0]}),
}


def small_model() -> StitchedViT:
    """A pair whose gradients are large and small, of two dtypes, with one frozen parameter."""
    sizes: dict[str, Any] = {"num_classes": 5, "num_heads": 2, "init_values": 0.7}
    model = StitchedViT(
        PlainViT(8, 4, embed_dim=64, depth=2, **sizes),
        PlainViT(8, 4, embed_dim=256, depth=4, **sizes),
        rank=2,
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.temperature = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    model.small.cls_token.requires_grad_(False)
    return model


def loss(model: StitchedViT, run: dict[str, Any], images: Tensor, labels: Tensor) -> Tensor:
    logits = model(images, **run) * model.temperature
    if logits.ndim == 2:
        return F.cross_entropy(logits, labels)
    return torch.stack([F.cross_entropy(each, labels) for each in logits]).mean()


def data() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(8, 3, 8, 8, generator=generator)
    labels = torch.randint(5, (8,), generator=generator)
    return images.split(4), labels.split(4)


def gradients(model: StitchedViT) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = small_model()
    broadcast_parameters(model)
    images, labels = data()
    sent = 0
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes
        return all_reduce(tensor, *arguments, **options)

    dist.all_reduce = counted
    results: dict[str, Any] = {"start": model.state_dict()}
    for name, runs in STEPS.items():
        model.zero_grad()
        loss(model, runs[rank], images[rank], labels[rank]).backward()
        sent = 0
        average_gradients(model)
        results[name] = gradients(model), sent
    torch.save(results, f"{folder}/{rank}.pt")
    # A large gradient whose memory is in another order than its dimensions.
    conv = nn.Conv2d(64, 512, 3, bias=False)
    values = torch.arange(conv.weight.numel()).view(conv.weight.shape).float()
    conv.weight.grad = ((1 + 2 * rank) * values).to(memory_format=torch.channels_last)
    average_gradients(conv)
    assert torch.equal(conv.weight.grad, 2 * values)
    other = nn.Linear(3, 2 + rank)
    with pytest.raises(ValueError, match=r"its weight is \(2, 3\) of .* 0 and \(3, 3\) of .* 1"):
        broadcast_parameters(other)
    dist.destroy_process_group()


def test_gradients_are_those_of_one_process_on_the_joined_batch(tmp_path: Path) -> None:
    mp.spawn(step_on_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = small_model()
    model.load_state_dict(first["start"])
    assert all(torch.equal(value, second["start"][key]) for key, value in first["start"].items())
    trainable = [p for p in model.parameters() if p.requires_grad]
    images, labels = data()
    for name, runs in STEPS.items():
        model.zero_grad()
        losses = [loss(model, *each) for each in zip(runs, images, labels, strict=True)]
        (sum(losses) / 2).backward()
        expected = gradients(model)
        (averaged, sent), (others, also_sent) = first[name], second[name]
        # What no rank used has no gradient, and nothing was sent for it.
        assert averaged.keys() == others.keys() == expected.keys()
        nbytes = sum(gradient.nbytes for gradient in expected.values())
        assert sent == also_sent == nbytes + len(trainable)
        for key, value in expected.items():
            assert torch.equal(averaged[key], others[key])
            torch.testing.assert_close(averaged[key], value)
    everything = sum(p.nbytes for p in trainable)
    assert first["two routes"][1] > everything / 2 > first["one route"][1]


def test_alone_it_does_nothing() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    broadcast_parameters(model)
    model(torch.ones(3)).sum().backward()
    average_gradients(model)
    assert torch.equal(model.weight, before)
    assert torch.equal(model.weight.grad, torch.ones(2, 3))
