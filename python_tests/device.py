"""Where the tests of the ops run: in CPU memory, or on the GPU that SNKERNELS_TEST_DEVICE names."""

import os

DEVICE = os.environ.get("SNKERNELS_TEST_DEVICE", "cpu")

if DEVICE == "cpu":
    # Triton reads it when it is first imported, and then runs kernels in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
