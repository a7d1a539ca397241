"""Files and folders are either whole or not there."""

import os

import pytest

from dpdiff._files import atomic_folder, atomic_write


def test_content_appears_at_the_end_only(tmp_path):
    path = tmp_path / "new" / "out.csv"
    with atomic_write(path) as tmp:
        assert tmp.parent == path.parent and tmp.suffix == ".csv"
        tmp.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["out.csv"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(type(error)):
        with atomic_write(path) as tmp:
            tmp.write_text("ha")
            raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").touch()
    with atomic_write(tmp_path / "ours"):
        pass
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_symbolic_link_is_kept(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_write(tmp_path / "link") as tmp:
        tmp.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_pipes_are_written_to_not_replaced(tmp_path):
    read, write = os.pipe()
    with atomic_write(f"/dev/fd/{write}") as tmp:
        tmp.write_text("whole")
    os.close(write)
    assert os.read(read, 99) == b"whole"
    os.close(read)

    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(fifo) as tmp:
        tmp.write_text("whole")
    assert os.read(read, 99) == b"whole"
    os.close(read)
    assert fifo.is_fifo() and os.listdir(tmp_path) == ["fifo"]


def test_a_folder_appears_at_the_end_only(tmp_path):
    path = tmp_path / "new" / "out"
    with atomic_folder(path) as tmp:
        assert tmp.parent == path.parent and tmp.name.startswith(".")
        (tmp / "file").write_text("whole")
        assert not path.exists()
    assert (path / "file").read_text() == "whole"
    assert os.listdir(path.parent) == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_no_folder(tmp_path, error):
    with pytest.raises(type(error)):
        with atomic_folder(tmp_path / "out") as tmp:
            (tmp / "file").write_text("ha")
            raise error
    assert os.listdir(tmp_path) == []


def test_of_two_that_make_a_folder_the_first_wins(tmp_path):
    path = tmp_path / "out"
    with atomic_folder(path) as second:
        (second / "file").write_text("second")
        with atomic_folder(path) as first:
            (first / "file").write_text("first")
    assert (path / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path):
    path = tmp_path / "out"
    path.write_text("theirs")
    with pytest.raises(OSError):
        with atomic_folder(path):
            pass
    assert path.read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"]


def test_permissions_are_those_of_an_ordinary_folder(tmp_path):
    (tmp_path / "ordinary").mkdir()
    with atomic_folder(tmp_path / "ours"):
        pass
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
