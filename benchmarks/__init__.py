"""Benchmarks: every op beside what one would write without it.

``pytest benchmarks/`` times op by op with pytest-benchmark; ``python -m benchmarks.record`` times
all of them interleaved and writes a record; ``python -m benchmarks.table`` makes Markdown and the
README's tables from records. README.md in this folder says how to read and to add them.
"""

import sys
from pathlib import Path

# Python and pytest put the repository first, where snkernels has no compiled module unless it was
# built in place: an installed package must come before its sources.
_root = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [*(path for path in sys.path if path != _root), _root]
