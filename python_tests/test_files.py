import os
from pathlib import Path

import pytest

from snkernels.files import replacing


def test_takes_the_place_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.suffix == ".json", "a writer may go by the suffix"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("old", ["old", None])
def test_failing_leaves_what_was_there(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "record.json"
    if old is not None:
        path.write_text(old)

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if old is None else [old])


def test_writing_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "record.json"):
        pass
    assert not list(tmp_path.iterdir())


def test_behind_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "record.json", tmp_path / "link"
    path.write_text("old")
    link.symlink_to(path)
    with replacing(link) as partial:
        partial.write_text("new")
    assert link.is_symlink()
    assert path.read_text() == "new"


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with replacing(pipe) as partial:
        assert partial == pipe
    assert pipe.is_fifo()


def test_a_pipe_without_a_name_is_written_to() -> None:
    """As /dev/stdout is, before a pager."""
    end, start = os.pipe()
    with replacing(f"/dev/fd/{start}") as partial:
        partial.write_text("text")
    os.close(start)
    with os.fdopen(end) as file:
        assert file.read() == "text"


def test_into_the_folder_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with replacing("record.json") as partial:
        partial.write_text("new")
    assert (tmp_path / "record.json").read_text() == "new"
