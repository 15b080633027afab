"""``snkernels demo``: from nothing to a measured stitched ViT, on scikit-learn's digits.

Two small plain ViTs are trained, stitched by least squares and fine-tuned on routes drawn by cost;
then every route is measured on images that nothing before has seen.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snkernels
from snkernels.evaluation import Evaluation, evaluate
from snkernels.models import checkpoint
from snkernels.models.stitched import StitchedViT
from snkernels.models.vit import PlainViT
from snkernels.progress import progress_bar

Labelled = tuple[Tensor, Tensor]

RECORD = "demo.json"
TABLE = "table.txt"
CSV = "pareto.csv"
PLOT = "pareto.png"
CHECKPOINT = "model.safetensors"
FILES = (TABLE, CSV, PLOT, CHECKPOINT, RECORD)

_WRITER = "snkernels demo"
_EXTRA = "pip install 'snkernels[demo]'"


@dataclass(frozen=True)
class AnchorRecipe:
    """Shape of one anchor, and how long it is trained before stitching."""

    embed_dim: int
    depth: int
    num_heads: int
    steps: int
    drop_path_rate: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """What the demo trains, and for how long.

    Training is AdamW on randomly moved digits, with a linear warm-up over the first twentieth of
    the steps and a cosine down to zero.

    Attributes:
        small: The small anchor.
        large: The large anchor.
        rank: Rank of the stitches.
        finetune_steps: Steps of the stitched model, each on one drawn route.
        batch_size: Images per step.
        learning_rate: Its peak.
        weight_decay: Of AdamW.
    """

    small: AnchorRecipe = AnchorRecipe(10, 4, 2, steps=600)
    large: AnchorRecipe = AnchorRecipe(48, 8, 4, steps=600, drop_path_rate=0.1)
    rank: int = 8
    finetune_steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05


@dataclass(frozen=True)
class HeldOut:
    """Which digits are held out, and in what batches they are measured; a checkpoint carries it."""

    images: int = 600
    split_seed: int = 1234
    batch_size: int = 100


def digits(held_out: HeldOut) -> tuple[Labelled, Labelled]:
    """Split scikit-learn's 1,797 handwritten digits, which come with the package.

    Returns:
        Training and held-out images, (n, 1, 8, 8) of float32 in [-1, 1] with background -1, each
        with labels (n,) in 0–9.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"the digits need scikit-learn: {_EXTRA}") from error
    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(classes)
    generator = torch.Generator().manual_seed(held_out.split_seed)
    out, into = torch.randperm(len(images), generator=generator).tensor_split([held_out.images])
    return (images[into], labels[into]), (images[out], labels[out])


def new_anchor(recipe: AnchorRecipe) -> PlainViT:
    """Make an untrained anchor for the digits: 16 patches of 2×2 pixels and a class token.

    ``PlainViT`` begins with weights and positions of 0.02, which suits widths of hundreds. An
    anchor tens of channels wide hardly learns from there, so here all begin at unit scale.
    """
    vit = PlainViT(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=recipe.embed_dim,
        depth=recipe.depth,
        num_heads=recipe.num_heads,
        init_values=1.0,
        drop_path_rate=recipe.drop_path_rate,
    )
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
    nn.init.trunc_normal_(vit.pos_embed)
    nn.init.trunc_normal_(vit.cls_token)
    return vit


def moved(images: Tensor) -> Tensor:
    """Rotate, scale and shift each image at random, by up to 11°, 7.5 % and ¾ pixel."""
    n = len(images)
    angle = torch.empty(n).uniform_(-0.1875, 0.1875)
    scale = torch.empty(n).uniform_(0.925, 1.075)
    shift = torch.empty(n, 2, 1).uniform_(-0.1875, 0.1875)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    turn = torch.stack((cos, -sin, sin, cos), dim=1).view(n, 2, 2)
    grid = F.affine_grid(torch.cat((turn, shift), dim=2), list(images.shape), align_corners=False)
    # What comes in from outside is 0 to grid_sample, and the background is -1.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train(
    model: nn.Module, data: Labelled, steps: int, recipe: Recipe, name: str, progress: bool
) -> None:
    """Train what of a model is trainable, and leave the model in eval mode.

    Args:
        model: Maps images to logits; a ``StitchedViT`` draws a route in each step.
        data: Images and labels.
        steps: Steps of one batch each.
        recipe: How to train.
        name: Name of the progress bar.
        progress: Whether to show it.
    """
    images, labels = data
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(20 * (i + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * i / steps)),
    )
    model.train()
    for _ in progress_bar(range(steps), name, progress):
        batch = torch.randperm(len(labels))[: recipe.batch_size]
        loss = F.cross_entropy(model(moved(images[batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def batches(data: Labelled, held_out: HeldOut) -> list[Labelled]:
    """Cut held-out images and labels into the batches in which they are measured."""
    images, labels = (tensor.split(held_out.batch_size) for tensor in data)
    return list(zip(images, labels, strict=True))


def run(
    out: str | os.PathLike[str],
    seed: int = 0,
    recipe: Recipe | None = None,
    *,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Evaluation:
    """Train, stitch, fine-tune and measure, and write the results into a folder.

    The same seed and recipe give the same results. The caller's random numbers are left alone.

    Args:
        out: Folder for the files named in ``FILES``; see ``claim``.
        seed: Seed of all that is random but the split.
        recipe: What to train; None for the usual one.
        say: Takes the report, piece by piece.
        progress: Whether to show progress bars.

    Raises:
        ImportError: If scikit-learn or matplotlib is not installed.
        OSError: If the results cannot be written there.
    """
    recipe, held_out = recipe or Recipe(), HeldOut()
    require_extra()
    folder = claim(out)
    train_data, held_out_data = digits(held_out)
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str, text: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 1)
        say(f"{name:<12} {text}: {seconds[name]} s")

    say(
        f"{'data':<12} handwritten digits of 8×8 pixels: {len(train_data[1]):,} to train, "
        f"{len(held_out_data[1])} held out (seed {seed})"
    )
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small, large = new_anchor(recipe.small), new_anchor(recipe.large)
        for name, vit, shape in (
            ("anchor S", small, recipe.small),
            ("anchor L", large, recipe.large),
        ):
            with phase(name, f"{shape.depth} blocks {shape.embed_dim} wide, {shape.steps} steps"):
                train(vit, train_data, shape.steps, recipe, name, progress)
        model = StitchedViT(small, large, recipe.rank, seed=seed)
        with phase(
            "stitches", f"{sum(model.space.num_stitches)} of rank {recipe.rank}, least squares"
        ):
            model.init_stitches(train_data[0], progress=progress)
        with phase("fine-tuning", f"{recipe.finetune_steps} steps, each on one drawn route"):
            train(model, train_data, recipe.finetune_steps, recipe, "fine-tuning", progress)
        with phase("evaluation", f"{len(model.routes)} routes on the held-out images"):
            result = evaluate(model, batches(held_out_data, held_out), progress=progress)

    record = {
        "written_by": _WRITER,
        "snkernels": snkernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": seed,
        "recipe": asdict(recipe),
        "held_out": asdict(held_out),
        "seconds": seconds,
    }
    report = f"{result.table()}\n\n{result.summary()}\n"
    # First, so that a run that ends while writing can be repeated into the same folder.
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / TABLE).write_text(report, encoding="utf-8")
    result.save_csv(folder / CSV)
    result.plot(folder / PLOT, "Handwritten digits: every route of one stitched model")
    model.save(folder / CHECKPOINT, {"evaluation": {"data": "digits", **asdict(held_out)}})
    say(f"\n{report}\n{folder}{os.sep} now holds {', '.join(FILES)}.")
    say(f"To measure that model again: snkernels eval {folder / CHECKPOINT}")
    return result


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, and after the ``with`` block on as many as before.

    Nets of this size gain little from more, lose much where others use the processors too, and
    would differ in their last bits from one number of threads to another.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load(path: str | os.PathLike[str]) -> tuple[StitchedViT, list[Labelled]]:
    """Read a checkpoint of the demo, and the held-out batches that it was measured on.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is no checkpoint of ours, or says nothing of how it is evaluated.
        TypeError: If its anchors are no ``PlainViT``.
        ImportError: If scikit-learn is not installed.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the {CHECKPOINT} in it")
    settings: dict[str, Any] = dict(checkpoint.read(path)[1]["notes"].get("evaluation", {}))
    if settings.pop("data", None) != "digits":
        raise ValueError(
            f"{path} does not say what to evaluate it on, as those of snkernels demo do; "
            "on images of your own use snkernels.evaluate(model, loader)"
        )
    held_out = HeldOut(**settings)
    return StitchedViT.load(path), batches(digits(held_out)[1], held_out)


def require_extra() -> None:
    """Check that what the demo needs beside the package itself is there.

    Raises:
        ImportError: If it is not.
    """
    needed = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"the demo needs {' and '.join(missing)}: {_EXTRA}")


def claim(out: str | os.PathLike[str]) -> Path:
    """Return the folder for the results, made if need be, in which only own files are replaced.

    Raises:
        OSError: If it is no folder that can be written to, or if it holds files of the same names
            that the demo did not write.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; --out must name a folder")
    taken = [name for name in FILES if (folder / name).exists()]
    if taken and not _written_by_demo(folder):
        raise FileExistsError(
            f"{folder} holds {', '.join(taken)} that snkernels demo did not write; "
            "name another folder by --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


def _written_by_demo(folder: Path) -> bool:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("written_by") == _WRITER
