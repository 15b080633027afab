from pathlib import Path
from typing import Any

import pytest

from snkernels.journal import Journal

HEADER = {"work": 1, "routes": [0, 1]}
PIECES = [{"batch": 0, "loss": 0.1}, {"batch": 1, "loss": 1e-17}]


def written(path: Path, *pieces: dict[str, Any]) -> bytes:
    journal = Journal(path, HEADER)
    for piece in pieces:
        journal.append([piece])
    journal.close()
    return path.read_bytes()


def entries(path: Path) -> list[dict[str, Any]]:
    journal = Journal(path, HEADER)
    journal.close()
    return journal.entries


def test_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path, PIECES[0])
    assert entries(path) == PIECES[:1]
    written(path, PIECES[1])
    assert entries(path) == PIECES


def test_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, HEADER)
    journal.append(PIECES)
    assert path.read_bytes().count(b"\n") == 3
    journal.close()


def test_torn_anywhere_it_goes_on_from_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    whole = written(path, *PIECES)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        pieces = max(sum(end <= size for end in ends) - 1, 0)
        assert entries(path) == PIECES[:pieces], size
        assert path.read_bytes() == whole[: ends[pieces]], size
        assert written(path, *PIECES[pieces:]) == whole, size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"notes\n", "not a file to resume from"),
        (b"not", "not a file to resume from"),
        (b"\xff\xfe\n", "not a file to resume from"),
        (b'{"work": 1}\n', "not a file to resume from"),
        (b'{"work": 2, "routes": [0, 1]}\n', "work was 2 there, here it is 1"),
        (b'{"work": 1, "routes": [0]}\n', r"routes was \[0\] there, here it is \[0, 1\]"),
        (b'{"work": 1, "routes": [0, 1]}\n{"batch": \n{"batch": 1}\n', "damaged: line 2"),
        (b'{"work": 1, "routes": [0, 1]}\n[]\n', "damaged: line 2"),
    ],
)
def test_another_file_is_refused_and_left_alone(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Journal(path, HEADER)
    assert path.read_bytes() == content


def test_a_folder_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        Journal(tmp_path, HEADER)
