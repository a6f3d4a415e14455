"""Arrays filled block by block: in memory, or in files that a killed run resumes and several ranks fill together."""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.files import digest_of, read_json, write_json

RECORD = 16  # bytes of a block's digest
Shapes = Mapping[str, tuple[tuple[int, ...], type]]


class BlockArrays:
    """Named arrays and a record of which blocks of them are finished.

    In a folder each array is `NAME.npy`, `finished.npy` holds a digest of each finished block (zeros for the others),
    and `identity.json` says of which inputs the work is. Damaged blocks are done again. Ranks write different rows of
    the same files: their file system must map files coherently (one machine always does). The space is taken from the
    disk at once, because a full disk under a mapped file kills.

    Args:
        shapes: Name to (shape, dtype) of each array.
        num_blocks: Blocks to finish.
        folder: Where the files are; made if absent. None: in memory, in one process only.
        identity: Digest of everything that decides the numbers. Work of another identity is discarded, with a warning.
        rows: The rows of the arrays that make up a block, as an index; None where the one block is all rows.

    Cost: two barriers under several ranks, one here and one in `wait`; one digest of all numbers, about 1 GB a second,
        and one more of what is found.

    >>> work = BlockArrays({"squares": ((4,), np.int64)}, num_blocks=4, rows=lambda block: [block])
    >>> for block in work.mine():
    ...     work.arrays["squares"][block] = block**2
    ...     work.finish(block)
    >>> work.wait()
    >>> work.arrays["squares"].tolist()
    [0, 1, 4, 9]
    """

    def __init__(
        self,
        shapes: Shapes,
        num_blocks: int,
        *,
        folder: Path | None = None,
        identity: str = "",
        rows: Callable[[int], Any] | None = None,
    ) -> None:
        shapes = {**shapes, "finished": ((num_blocks, RECORD), np.uint8)}
        self._identity, self._rows = identity, rows or (lambda block: slice(None))
        self._in_files = folder is not None
        if folder is None:
            if distributed.is_active():
                raise AnybatchError("Several processes search through files; give a folder that they all reach.")
            self.arrays: dict[str, Any] = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        else:
            with distributed.alone() as chosen:
                if chosen:
                    _prepare(folder, shapes, identity)
            self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in shapes}
        self._records = self.arrays.pop("finished")
        found = [block for block in self.share() if self.finished[block]]
        damaged = [block for block in found if not np.array_equal(self._records[block], self._digest(block))]
        if damaged:
            self._records[damaged] = 0
            warnings.warn(
                f"{len(damaged)} of {num_blocks} finished blocks in {folder} are damaged; they are done again.",
                stacklevel=3,
            )

    @property
    def finished(self) -> np.ndarray:
        """(num_blocks,) bool."""
        return np.asarray(self._records.any(axis=1))

    def share(self) -> range:
        """This rank's blocks: every world_size-th."""
        return range(distributed.rank(), len(self.finished), distributed.world_size())

    def mine(self) -> list[int]:
        """The unfinished blocks of this rank's share."""
        return [block for block in self.share() if not self.finished[block]]

    def finish(self, block: int) -> None:
        """Record that the numbers of `block` are in the arrays, once they are on the disk."""
        if not self._in_files:
            self._records[block] = 1
            return
        try:
            for array in self.arrays.values():
                array.flush()
            self._records[block] = self._digest(block)
            self._records.flush()
        except OSError as error:
            raise AnybatchError(f"Cannot write the results of a search: {error.strerror or error}.") from error

    def _digest(self, block: int) -> np.ndarray:
        def parts() -> Iterator[bytes]:
            yield f"{self._identity} {block}".encode()
            rows = self._rows(block)
            for array in self.arrays.values():
                yield np.ascontiguousarray(array[rows]).tobytes()

        return np.frombuffer(bytes.fromhex(digest_of(parts())), np.uint8)

    def wait(self) -> None:
        """Until every rank is here; then all blocks are finished. One barrier."""
        distributed.barrier()
        if not self.finished.all():  # on a file system that does not map files coherently this is how it shows
            raise AnybatchError(
                f"{int((~self.finished).sum())} of {len(self.finished)} blocks were finished by other processes but do "
                "not show here. The folder must be on a file system that all processes see alike; use a local disk "
                "with all processes on one machine."
            )


def _prepare(folder: Path, shapes: Shapes, identity: str) -> None:
    """Make the files anew unless they are of this identity; `identity.json` is removed first and written last."""
    label = folder / "identity.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if label.exists():
            with contextlib.suppress(AnybatchError):
                same = read_json(label, "", "identity")["identity"] == identity
                if same and all(_fits(folder / f"{name}.npy", *kind) for name, kind in shapes.items()):
                    return
            warnings.warn(
                f"{folder} holds work on other inputs or of another version, or is damaged; it starts again.",
                stacklevel=4,
            )
            label.unlink()
        for name, (shape, dtype) in shapes.items():
            path = folder / f"{name}.npy"
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        for name in shapes:  # what was made of them would keep the disk full
            with contextlib.suppress(OSError):
                (folder / f"{name}.npy").unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()
        size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
        raise AnybatchError(
            f"Cannot write {size / 2**30:.3g} GiB to {folder}: {error.strerror or error}. Free some space or choose "
            "another folder."
        ) from error
    write_json(label, {"identity": identity})


def _fits(path: Path, shape: tuple[int, ...], dtype: type) -> bool:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # of a damaged header NumPy says it in many ways
        return False
    return array.shape == shape and array.dtype == np.dtype(dtype) and array.flags.c_contiguous


def release_pages(*arrays: object) -> None:
    """Drop the pages of mapped files, which count against a container's limit; they are read again when needed."""
    for array in arrays:
        mapped = array
        while isinstance(mapped, np.ndarray):  # a part of a mapped array leads to it, and that to the map
            if isinstance(mapped, np.memmap) and mapped.mode == "c":
                break  # what was changed in memory alone would be lost
            mapped = mapped.base
        if isinstance(mapped, mmap.mmap):
            mapped.madvise(mmap.MADV_DONTNEED)
