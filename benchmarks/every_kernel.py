"""Every kernel for GPUs once, forward and backward, at sizes that suit compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.every_kernel

It tells what ran, not whether it was right: that is for the tests.
"""

import sys

import torch

from benchmarks.gpu import kernels
from benchmarks.subject import Shape, Subject, subjects
from snkernels.backends import use_backend

# Ragged in every direction, narrow and wide rows, with and without a low-rank part.
SHAPES = [
    Shape("narrow", {"M": 140, "K": 72, "N": 264, "r": 5, "groups": 3}),
    Shape("wide", {"M": 300, "K": 136, "N": 1024, "r": 64, "groups": 2}),
    Shape("full rank", {"M": 70, "K": 64, "N": 384, "r": 0, "groups": 1}),
]
DTYPES = (torch.bfloat16, torch.float32)


def run(
    subject: Subject, backend: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    """One forward and backward on a backend."""
    leaves = {
        name: t.to(device, dtype).requires_grad_() if t.is_floating_point() else t.to(device)
        for name, t in subject.make(shape).items()
    }
    with use_backend(backend):
        outputs = subject.ours(leaves)()
        sum(output.float().square().mean() for output in outputs).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    """Returns 1 where a kernel raised."""
    device, known, raised = torch.device("cuda"), subjects(), 0
    for op, backend in kernels():
        for shape in SHAPES:
            for dtype in DTYPES:
                what = f"{op}, {backend}, {shape}, {dtype}"
                try:
                    run(known[op], backend, shape, dtype, device)
                    print(f"{what}: ran", flush=True)
                except Exception as error:  # the others can still run
                    raised += 1
                    print(f"{what}: {type(error).__name__}: {error}", flush=True)
    return 1 if raised else 0


if __name__ == "__main__":
    sys.exit(main())
