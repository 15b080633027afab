"""StitchedViT: two anchors, the stitches between them, and every route through both."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from snkernels import collectives
from snkernels.integers import integer, is_one
from snkernels.layers import StitchingLayer
from snkernels.models import checkpoint, model_file
from snkernels.models.anchors import Anchor, check_images, check_pair, image_shape
from snkernels.models.capture import CapturedForward
from snkernels.models.executor import execute
from snkernels.models.least_squares import fit
from snkernels.models.model_route import ModelRoute, priced
from snkernels.models.modes import eval_mode, uncached_autocast
from snkernels.models.selection import Selection, check_scores, select
from snkernels.models.setting import shapes_of
from snkernels.models.vit import PlainViT
from snkernels.routing.budget import Budget
from snkernels.routing.latency import Profile
from snkernels.routing.plan import plan
from snkernels.routing.sampling import Draws, RouteSampler
from snkernels.routing.space import LARGE, SMALL, Route, Stitch, StitchingSpace

# A forward of more than a few hundred images gains nothing from more, and its memory grows.
_MAX_ROWS = 256


class StitchedViT(nn.Module):
    """Two plain ViTs of one task, joined so that any route through both classifies an image.

    State-dict keys are ``anchors.{0,1}.…`` (small, large) and
    ``stitch_layers.{0,1}.{i}.transform.…`` (0 = small to large, 1 = large to small).

    Args:
        small: The small anchor: a ``PlainViT`` or a timm ``VisionTransformer``.
        large: The large anchor; same image size, patch grid, prefix tokens and classes.
        rank: Rank of the stitches' low-rank part; 0 leaves it out.
        seed: Seed of the routes drawn in training.
        gap: Multiply-adds that a group of routes of about equal cost spans; None fits it to the
            anchors.  See ``snkernels.routing.sampling.cost_groups``.
        tilt: Whether costly groups are drawn more often.
        draws: How the routes of data-parallel ranks relate: "own", "shared" or "equal_cost"; see
            ``snkernels.routing.sampling.RouteSampler``.  The rank is that in the default process
            group when a route is drawn.

    Attributes:
        anchors: The two anchors.
        stitch_layers: The stitches per direction, each a list over the cuts.
        space: The routes as such, from the depths alone.
        routes: A ``ModelRoute`` for every route, in the order of ids.
        sampler: The ``RouteSampler`` that training draws from.
        default_route: Id of the route that runs in eval mode when none is named; at first that of
            the large anchor.  It is saved with the model.
        last_route: Id of the route that the last call ran; None before the first call and after
            one with several routes.
        scores: How good each measured route is, from ids to numbers, more being better; None at
            first.  Set it to a mapping or to what ``snkernels.evaluate`` gives, whose top-1 it
            keeps.  It is saved with the model, and holds for the weights it was measured with.
        profile: The ``Profile`` of ``snkernels.profile``, for budgets of time; None at first.  It
            must be of a model with these shapes, may be of another device until such a budget is
            used, and is saved with the model.

    Raises:
        TypeError: If an anchor lacks a part; the message names it.
        ValueError: If the anchors do not fit together, ``rank`` is negative, or ``draws`` is none
            of the three.

    Source: Pan, Liu, He, Cai, Zhuang, "Stitched ViTs are Flexible Vision Backbones", ECCV 2024.
    """

    def __init__(
        self,
        small: Anchor,
        large: Anchor,
        rank: int = 16,
        *,
        seed: int = 0,
        gap: float | None = None,
        tilt: bool = False,
        draws: Draws = "own",
    ) -> None:
        super().__init__()
        check_pair(small, large)
        self.anchors = nn.ModuleList([small, large])
        self.rank = rank = integer("rank", rank, 0)
        self.space = StitchingSpace(len(small.blocks), len(large.blocks))
        widths = (small.embed_dim, large.embed_dim)
        like = next(small.parameters())
        self.stitch_layers = nn.ModuleList(
            nn.ModuleList(
                StitchingLayer(
                    widths[direction],
                    widths[1 - direction],
                    rank,
                    device=like.device,
                    dtype=like.dtype,
                )
                for _ in range(count)
            )
            for direction, count in enumerate(self.space.num_stitches)
        )
        self.routes: tuple[ModelRoute, ...] = tuple(
            priced(route, (small, large), self._stitch) for route in self.space
        )
        self._sampling: dict[str, Any] = {
            "gap": None if gap is None else float(gap),
            "tilt": bool(tilt),
            "draws": draws,
        }
        self.sampler = RouteSampler(
            {route.id: route.flops for route in self.routes},
            seed=seed,
            rank=collectives.rank,
            **self._sampling,
        )
        self._default_route = LARGE
        self.last_route: int | None = None
        self._scores: dict[int, float] | None = None
        self._profile: Profile | None = None

    @property
    def small(self) -> Anchor:
        """The small anchor."""
        return self._anchor(SMALL)

    @property
    def large(self) -> Anchor:
        """The large anchor."""
        return self._anchor(LARGE)

    @property
    def default_route(self) -> int:
        """The id of the default route."""
        return self._default_route

    @default_route.setter
    def default_route(self, route_id: int) -> None:
        self._default_route = self.space.route(route_id).id

    @property
    def scores(self) -> dict[int, float] | None:
        """A copy of the scores."""
        return None if self._scores is None else dict(self._scores)

    @scores.setter
    def scores(self, scores: Any) -> None:
        self._scores = None if scores is None else check_scores(scores, self.space)

    @property
    def profile(self) -> Profile | None:
        """The profile."""
        return self._profile

    @profile.setter
    def profile(self, profile: Profile | None) -> None:
        if profile is not None:
            if not isinstance(profile, Profile):
                raise TypeError(f"profile must be a Profile, got {type(profile).__name__}")
            profile.check_model(shapes_of(self))
        self._profile = profile

    def forward(
        self,
        images: Tensor,
        stitch: int | Sequence[int] | None = None,
        *,
        routes: Literal["all"] | Sequence[int] | None = None,
        budget: float | str | Budget | Sequence[float | str | Budget] | None = None,
        max_rows: int | None = None,
        without_grad: Sequence[int] = (),
    ) -> Tensor:
        """Classify images: all along one route, each along its own, or all along several.

        Whatever is asked for, samples run together where they are in the same block, and what
        several routes of a sample begin with is computed once.

        Args:
            images: (batch, channels, height, width), of the anchors' dtype.
            stitch: Id of the route, or one id per image.  None draws a route in training, and
                takes ``default_route`` in eval mode.
            routes: Ids of the routes that every image takes, in place of ``stitch``; "all" for
                every route of the model.  Ids may repeat.
            budget: What may be spent, in place of ``stitch``: the route is then the one that
                ``select`` gives for it and this batch size.  Or one budget per image; a budget of
                time is for the call as if all of its images took that route.
            max_rows: Most images that may be under way at a time, an image counting once for each
                of the ways it takes; at least 3.  It bounds the memory of inference and changes no
                result.  None lets all run together up to 256, or the batch if that is more.
            without_grad: Ids of routes whose logits nobody differentiates, such as a teacher's:
                what only they run keeps nothing for a backward pass and gets no gradient.  Their
                rows of the logits may still require grad; detach them.

        Returns:
            Logits (batch, classes); with ``routes`` (routes, batch, classes).

        Raises:
            TypeError: If images hold no floats, an id is no integer, or a budget is neither a
                number nor a text.
            RuntimeError: If a budget needs scores or a profile that are not there.
            ValueError: If no route has an id, their number is wrong, more than one of ``stitch``,
                ``routes`` and ``budget`` are given, no route fits a budget, a budget other than a
                share comes with images of a size that no cost is known of, ``max_rows`` is too
                small, or images are none, of another shape or device than the anchors' or, in CPU
                memory and where the model is not compiled as a whole, not finite.  Nothing is drawn
                then.
        """
        self._check_batch(images)
        if is_one(without_grad):
            raise TypeError(f"without_grad must hold route ids, got {without_grad!r:.80}")
        ungraded = [self.space.route(route_id).id for route_id in without_grad]
        batch = len(images)
        limit = max(batch, _MAX_ROWS) if max_rows is None else integer("max_rows", max_rows, 3)
        if sum(choice is not None for choice in (stitch, routes, budget)) > 1:
            raise ValueError("only one of stitch, routes and budget must be given")
        if budget is not None:
            stitch = self._afford(budget, images)
        if routes is not None:
            chosen = self.space.named(routes, "routes")
            rows = [(i, route) for route in chosen for i in range(batch)]
        else:
            if stitch is None:
                stitch = self.draw(1)[0] if self.training else self.default_route
            chosen = self._one_each(stitch, batch)
            rows = list(enumerate(chosen))
        self.last_route = chosen[0].id if len({route.id for route in chosen}) == 1 else None
        schedule = plan(rows, self.space, limit, ungraded)
        logits = execute(schedule, (self.small, self.large), self._stitch, images)
        return logits if routes is None else logits.unflatten(0, (len(chosen), batch))

    def select(self, budget: float | str | Budget, batch_size: int = 1) -> Selection:
        """Pick the best-scoring route that a budget buys.

        Args:
            budget: A share of the large anchor's multiply-adds in (0, 1], or a text such as
                ``"50 %"``, ``"20 GFLOPs"`` (for one image) or ``"8 ms"`` (for one call); see
                ``snkernels.routing.budget.Budget.parse``.
            batch_size: Images of the call that a budget of time is for.

        Returns:
            The route and why it was chosen; ``str`` of it is a sentence.

        Raises:
            RuntimeError: If ``scores`` are not set, or ``profile`` is not and the budget is a time.
            TypeError: If the budget is neither a number nor a text.
            ValueError: If the budget is none, or reaches for no route; if it is a time, and the
                profile is of another device, dtype or torch, or of smaller or larger batches.
        """
        return select(self, budget, batch_size)

    def draw(self, count: int) -> list[int]:
        """Draw the ids of ``count`` routes for one training step, each as a step alone would.

        Run them in one pass with ``model(images, routes=ids)`` and average their losses.  An id may
        come twice; it is then computed once and counts twice.

        Raises:
            ValueError: If ``count`` is below 1.
        """
        return [self.sampler.draw() for _ in range(integer("count", count, 1))]

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield what fine-tuning trains: the anchors, and bias, A and B of every stitch.

        The least-squares weights of the stitches are frozen, as is what the caller has frozen.
        """
        yield from (parameter for parameter in self.parameters() if parameter.requires_grad)

    def capture(
        self,
        batch_size: int,
        stitch: int | Sequence[int] | None = None,
        *,
        routes: Literal["all"] | Sequence[int] | None = None,
        max_rows: int | None = None,
    ) -> CapturedForward:
        """Capture a forward of the model in eval mode as a CUDA graph.

        What is captured runs in inference mode, under the autocast of the moment.  Graphs of one
        model share one pool of memory.

        Args:
            batch_size: Images of every call.
            stitch: See ``forward``; None takes ``default_route``.
            routes: See ``forward``.
            max_rows: See ``forward``.

        Returns:
            A callable from images to logits; see ``CapturedForward``.

        Raises:
            ValueError: If ``batch_size`` is below 1, or for what ``forward`` refuses.
            RuntimeError: If the model is in training mode, or on a device without CUDA graphs.
        """
        arguments = {"stitch": stitch, "routes": routes, "max_rows": max_rows}
        return CapturedForward.of(self, batch_size, arguments)

    def compile_blocks(self, *, dynamic: bool | None = True, **options: Any) -> None:
        """Compile attention and MLP of every block, in place, when each is first called.

        Blocks of one anchor share what is compiled, so a route that was never run compiles nothing
        new.  By default neither does another number of images or tokens, but for a single one.
        What lies between attention and MLP stays the fused pass that it is.

        Args:
            dynamic: See ``torch.compile``.
            options: Further arguments of ``torch.compile``.
        """
        for vit in self.anchors:
            for block in cast(Anchor, vit).blocks:
                block.attn.compile(dynamic=dynamic, **options)
                block.mlp.compile(dynamic=dynamic, **options)

    def init_stitches(
        self,
        images: Tensor | Iterable[Tensor | Sequence[Any]],
        *,
        batch_size: int = 32,
        progress: bool = True,
    ) -> None:
        """Set every stitch to the least-squares map between the boundaries it joins.

        Both anchors run once over the images, in eval mode and without gradients; the training
        flags of all modules are restored.  B of every low-rank part is set to zero, so that each
        stitch is the least-squares map and nothing else.  Under ``torch.distributed`` every rank
        must call this, with images of its own: the maps fit the images of all ranks, and all ranks
        end with the same bits in all stitches.

        Args:
            images: One tensor (n, channels, height, width), or an iterable, such as some batches of
                a data loader, of such tensors or of sequences that begin with one, such as (images,
                labels).  All of it is read; the paper takes 100 images.
            batch_size: Images per forward where ``images`` is one tensor.
            progress: Whether to show a progress bar when it takes more than seconds; needs tqdm.

        Raises:
            TypeError: If an item holds no images.
            ValueError: If ``batch_size`` is below 1, images have a wrong shape or there are none,
                or tokens are not finite; the stitches are then as they were.
            RuntimeError: If another rank failed so; the message names it and says how.
        """
        with eval_mode(self), uncached_autocast(next(self.parameters()).device.type):
            maps = fit(self.small, self.large, self.space, images, batch_size, progress)
        for stitch, (weight, bias) in maps.items():
            layer = self._stitch(stitch)
            layer.set_base(weight, bias)
            if layer.transform.lora_B is not None:
                nn.init.zeros_(layer.transform.lora_B)
            # The last bits of a solver may differ from rank to rank.
            collectives.broadcast(layer.parameters())

    @classmethod
    def from_snnetv2(
        cls,
        path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
        num_heads: tuple[int, int] | None = None,
    ) -> StitchedViT:
        """Build a model from a checkpoint of the official SN-Netv2 release.

        Widths, depths, rank, classes, patch and image size are inferred.  Nothing in the file is
        executed: beside tensors and plain values only an ``argparse.Namespace`` is let in.

        Args:
            path_or_state_dict: The file, or the state dict, itself or under ``"model"``.
            num_heads: Attention heads of the small and the large anchor, which the file does not
                hold; None means one per 64 channels.

        Raises:
            OSError: If the file cannot be opened.
            TypeError: If ``num_heads`` holds no integers.
            ValueError: If it is not such a checkpoint, or ``num_heads`` does not fit it; the
                message says what is wrong.
        """
        official = checkpoint.read_snnetv2(path_or_state_dict, num_heads)
        small, large = (PlainViT(**config) for config in official.anchors)
        model = cls(small, large, official.rank)
        checkpoint.check_tensors("the official checkpoint", official.state, model.state_dict())
        model.load_state_dict(official.state)
        return model

    def to_snnetv2(self) -> dict[str, Tensor]:
        """Return the state dict under the names of the official release.

        Raises:
            ValueError: If a tensor has no place in that layout; the message names it.
        """
        return checkpoint.to_snnetv2(self.state_dict())

    def save(self, path: str | os.PathLike[str], notes: Mapping[str, Any] | None = None) -> None:
        """Write the model into one safetensors file.

        That is weights, shape, sampler state, default route, scores and profile.  The file appears
        when it is complete; until then whatever was there stays.

        Args:
            path: Where to write.
            notes: What else belongs to the model, such as how it is evaluated, in values that JSON
                can hold; ``checkpoint.read`` gives it back as ``"notes"`` of the config.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If the profile is of other shapes than the model has now.
        """
        model_file.save(self, path, notes)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Load a file that ``save`` wrote into this model; dtypes and devices stay.

        Raises:
            OSError: If the file cannot be opened.
            ValueError: If it is truncated, foreign, or of another model or one that samples
                otherwise (``gap``, ``tilt``, ``draws``); this model is then as it was.
        """
        model_file.restore(self, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], anchors: tuple[Anchor, Anchor] | None = None
    ) -> StitchedViT:
        """Build a model from a file that ``save`` wrote, on the CPU, in the dtypes of the file.

        Args:
            path: The file.
            anchors: Small and large anchor of the saved architecture, to be filled.  None builds
                them, which needs ``PlainViT`` anchors.

        Raises:
            OSError: If the file cannot be opened.
            TypeError: If the anchors are not ``PlainViT`` and were not given, or if what was given
                is no anchor.
            ValueError: If the file is truncated, foreign, or does not fit the anchors, which are
                then as they were.
        """
        return model_file.load(cls, path, anchors)

    def _anchor(self, index: int) -> Anchor:
        return self.anchors[index]

    def _stitch(self, stitch: Stitch) -> StitchingLayer:
        layers: Any = self.stitch_layers[stitch.direction]
        return layers[stitch.index]

    def _check_batch(self, images: Tensor) -> None:
        check_images(self.small, images)
        if len(images) == 0:
            raise ValueError("images must hold at least one image, got none")
        # A GPU would have to wait for the answer, and a graph that is compiled would break here.
        looked_at = images.device.type == "cpu" and not torch.compiler.is_compiling()
        # A sum shows what is not finite and takes no memory; it may also overflow by itself.
        if looked_at and not images.sum().isfinite() and not images.isfinite().all():
            raise ValueError("images must be finite, got NaN or infinity")

    def _one_each(self, stitch: Any, batch: int) -> list[Route]:
        """Return the route of each image, from one id for all or one per image."""
        if is_one(stitch):
            return [self.space.route(stitch)] * batch
        chosen = [self.space.route(route_id) for route_id in stitch]
        if len(chosen) != batch:
            raise ValueError(
                f"stitch must hold one route id for each of the {batch} images, got {len(chosen)}"
            )
        return chosen

    def _afford(self, budget: Any, images: Tensor) -> int | list[int]:
        """Return the id of the route that a budget buys, or of one per budget."""
        batch = len(images)
        budgets = [Budget.parse(one) for one in ([budget] if is_one(budget) else budget)]
        known = image_shape(self.small)
        if images.shape[1:] != known and any(one.kind != "share" for one in budgets):
            raise ValueError(
                f"budget must be a share for images of {tuple(images.shape[1:])}: what routes cost "
                f"is known for {known}"
            )
        if is_one(budget):
            return self.select(budgets[0], batch).route.id
        if len(budgets) != batch:
            raise ValueError(
                f"budget must be one, or one for each of the {batch} images, got {len(budgets)}"
            )
        ids = {one: self.select(one, batch).route.id for one in set(budgets)}
        return [ids[one] for one in budgets]
