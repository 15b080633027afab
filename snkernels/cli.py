"""The ``snkernels`` command: ``info``, ``demo``, ``eval`` and ``profile``.

What a person can put right ends in one line on standard error and exit code 1; wrong usage has
exit code 2, an interruption 130. Anything else is a fault of ours and shows its traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import snkernels


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code.

    Args:
        argv: Arguments without the program's name; None takes those of the process.
    """
    options = _parser().parse_args(argv)
    try:
        # A backend that does not exist is refused on import, one that cannot run when chosen.
        with _expected(ValueError):
            from snkernels import backends  # noqa: F401
        with _expected(OSError, ImportError):
            options.run(options)
    except KeyboardInterrupt:
        print("snkernels: interrupted", file=sys.stderr)
        return 130
    except _Stop as stop:
        print(f"snkernels: {stop}", file=sys.stderr)
        return 1
    return 0


class _Stop(Exception):
    """An error that was to be expected, as text for a person."""


@contextmanager
def _expected(*errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise _Stop(str(error)) from error


def _info(options: argparse.Namespace) -> None:
    from snkernels import info

    print(info.report())


def _demo(options: argparse.Namespace) -> None:
    from snkernels import demo

    _check_backend()
    demo.run(options.out, options.seed)


def _eval(options: argparse.Namespace) -> None:
    from snkernels import demo
    from snkernels.evaluation import evaluate

    _check_backend()
    with _expected(ValueError, TypeError):
        model, batches = demo.load(options.checkpoint)
        routes = [model.space.route(i).id for i in options.routes or ()]
    # Weights that are not finite, or that no longer fit the data, are a fault of the file, and so
    # is a file to resume from that is of something else.
    with demo.one_thread(), _expected(ValueError):
        result = evaluate(model, batches, routes or "all", resume=options.resume)
    print(result.table())
    if result.has_anchors:
        print(f"\n{result.summary()}")
    if options.csv:
        result.save_csv(options.csv)
    if options.plot:
        result.plot(options.plot)


def _profile(options: argparse.Namespace) -> None:
    import torch

    from snkernels.models.stitched import StitchedViT
    from snkernels.profiling import profile

    if options.device == "cuda" and not torch.cuda.is_available():
        raise _Stop("there is no GPU that torch can use here")
    _check_backend(options.device)
    with _expected(ValueError, TypeError):
        model = StitchedViT.load(options.checkpoint).to(options.device)
        result = profile(model, options.batch_sizes)
    print(result)
    if options.out:
        result.save(options.out)


def _check_backend(device: str = "cpu") -> None:
    """Refuse a forced backend that cannot run here before any work is done."""
    import torch

    import snkernels.ops  # noqa: F401  (importing them fills OFFERED)
    from snkernels.backends import choose
    from snkernels.ops.library import OFFERED

    with _expected(RuntimeError):
        for op, offered in OFFERED.items():
            choose(op, offered, device, torch.float32)


def _ids(text: str) -> list[int]:
    ids = [int(part) for part in text.split(",")]
    if len(set(ids)) < len(ids):
        raise argparse.ArgumentTypeError(f"an id is named twice in {text!r}")
    return ids


def _sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


_ids.__name__ = "comma-separated ids"  # what argparse calls a value that does not convert
_sizes.__name__ = "comma-separated sizes"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="snkernels", description="Stitched vision transformers: fused kernels and a model."
    )
    parser.add_argument("--version", action="version", version=f"snkernels {snkernels.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    info = commands.add_parser(
        "info", help="what is installed, and which backend runs each op here, and why"
    )
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo", help="train, stitch and measure two small ViTs on handwritten digits, in minutes"
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("snkernels-demo"),
        metavar="FOLDER",
        help="where table, plot and checkpoint go (default: %(default)s)",
    )
    demo.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the same seed gives the same table (default: %(default)s)",
    )
    demo.set_defaults(run=_demo)

    evaluation = commands.add_parser("eval", help="measure the routes of a demo's checkpoint again")
    evaluation.add_argument("checkpoint", type=Path, help="model.safetensors of the demo")
    evaluation.add_argument("--routes", type=_ids, metavar="ID,ID", help="only these routes")
    evaluation.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="keep finished batches there, and go on from it after an interruption",
    )
    evaluation.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    evaluation.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy over cost")
    evaluation.set_defaults(run=_eval)

    profile = commands.add_parser(
        "profile", help="measure the parts of a model, which predict the latency of every route"
    )
    profile.add_argument("checkpoint", type=Path, help="a file that StitchedViT.save wrote")
    profile.add_argument(
        "--batch-sizes",
        type=_sizes,
        default=[1],
        metavar="N,N",
        help="images per call (default: 1)",
    )
    profile.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where to measure (default: %(default)s)",
    )
    profile.add_argument("--out", type=Path, metavar="FILE", help="write it as JSON")
    profile.set_defaults(run=_profile)
    return parser


if __name__ == "__main__":
    sys.exit(main())
