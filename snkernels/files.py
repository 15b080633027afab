"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write a file to that takes the place of ``path`` when the block ends.

    It does so when it is complete and on disk.  Until then, and if the block or the disk fails,
    whatever was there stays.  What a link leads to is replaced, not the link; what is there and no
    file, such as /dev/stdout, is written to.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial = Path(folder, path.name)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
