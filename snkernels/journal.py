"""A file of finished pieces of work, from which an interrupted run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any


class Journal:
    """An append-only file of JSON lines: a header that says what the work is, then its pieces.

    Every line is on the disk before ``append`` returns.  A last line that an interruption tore is
    dropped; a file that says anything else than what was asked for is refused and left alone.

    Args:
        path: The file; made if need be.
        header: What must be equal for the pieces to belong to this work, in values that JSON holds.

    Attributes:
        entries: The pieces that the file held when it was opened, in order.

    Raises:
        OSError: If the file cannot be read or written.
        ValueError: If it is no such file, is damaged before its last line, or belongs to other
            work; the message says what differs.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self.path = os.fspath(path)
        first = _line(header)
        try:
            with open(self.path, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            content = b""
        *lines, torn = content.split(b"\n")
        self.entries: list[dict[str, Any]] = []
        if lines:
            self._check_header(lines[0], header)
            self.entries = [self._parsed(line, n) for n, line in enumerate(lines[1:], start=2)]
        elif not first.startswith(torn):
            raise ValueError(f"{self.path} is not a file to resume from")
        self._file = open(self.path, "ab")  # noqa: SIM115 - open until close
        if torn:
            self._file.truncate(len(content) - len(torn))
        if not lines:
            self._write(first)

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Add finished pieces.

        Raises:
            OSError: If they cannot be written.
        """
        self._write(b"".join(map(_line, entries)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, lines: bytes) -> None:
        self._file.write(lines)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise ValueError(f"{self.path} is damaged: line {number} is no JSON object")
        return entry

    def _check_header(self, line: bytes, header: Mapping[str, Any]) -> None:
        try:
            found = self._parsed(line, 1)
        except ValueError:
            found = {}
        if found.keys() != header.keys():
            raise ValueError(f"{self.path} is not a file to resume from")
        for fact, value in header.items():
            if found[fact] != value:
                raise ValueError(
                    f"{self.path} does not fit: {fact} was {found[fact]!r} there, here it is "
                    f"{value!r}"
                )


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
