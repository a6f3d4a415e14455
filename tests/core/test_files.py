from __future__ import annotations

import errno
import os
import stat

import pytest

from anybatch.core.errors import AnybatchError
from anybatch.core.files import check_name, digest_of, write_atomically, write_text


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(tmp_path) == ["a.txt"]
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR


def test_disk_full_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fill(temporary):
        temporary.write_text("half of the new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(AnybatchError, match=r"No space left.*unchanged"):
        write_atomically(path, fill)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_interrupt_leaves_nothing_behind(tmp_path):
    def stop(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.txt", stop)
    assert os.listdir(tmp_path) == []


def test_missing_folder(tmp_path):
    with pytest.raises(AnybatchError, match="Cannot write"):
        write_text(tmp_path / "absent" / "a.txt", "x")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../../out", "/tmp", "a/b", "a\\b", "a\0b", "a\nb", "x" * 201, "\u00e9" * 101]
)
def test_names_that_are_no_file_names_are_refused(name):
    with pytest.raises(AnybatchError, match=r"A data set is called .*expected a plain file name"):
        check_name(name, "data set")


@pytest.mark.parametrize("name", ["a", "...", ".a", "a b", "v1:train", "\u00e9" * 100, "x" * 200])
def test_names_that_are_file_names(name, tmp_path):
    check_name(name, "data set")
    (tmp_path / name).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_digest_counts_boundaries():
    assert digest_of([b"ab", b"c"]) != digest_of([b"a", b"bc"])
    assert digest_of([b"ab", b"c"]) == digest_of(iter([b"ab", b"c"]))


def test_pages_of_parts_of_mapped_arrays_are_released_and_changes_in_memory_are_kept(tmp_path):
    import numpy as np

    from anybatch.core.blocks import release_pages

    np.save(tmp_path / "a.npy", np.arange(10.0))
    read, changed = np.load(tmp_path / "a.npy", mmap_mode="r"), np.load(tmp_path / "a.npy", mmap_mode="c")
    changed *= 2
    release_pages(read[2:5], changed[1:], np.ones(3), None)
    assert read[2:5].tolist() == [2.0, 3.0, 4.0]
    assert changed[1:3].tolist() == [2.0, 4.0]
