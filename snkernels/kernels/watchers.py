"""What torch may do with a call besides computing it: transform, trace, count or cast it.

One list for Python and for the compiled module, which asks in a third of the time.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Final

from torch import compiler
from torch._C import (
    _are_functorch_transforms_active,
    _is_any_autocast_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad

Question = Callable[[], int]  # 0 or False where nothing is going on

# Torch's own dispatcher has to see the call.
TRANSFORMS: Final[tuple[Question, ...]] = (
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _are_functorch_transforms_active,
    _is_tracing,
)

# Any of these closes the quick ways in.
WATCHERS: Final[tuple[Question, ...]] = (*TRANSFORMS, _profiler_enabled, _is_any_autocast_enabled)

# The same of variables: the module, its variable, and the value where nothing is going on.
VARIABLES: Final[tuple[tuple[ModuleType, str, object], ...]] = (
    (compiler, "_is_compiling_flag", False),
    (forward_ad, "_current_level", -1),
)
