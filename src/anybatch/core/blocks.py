"""Arrays filled block by block: in memory, or in files that a killed run goes on with and several ranks fill together.

Imports errors, files, distributed.
"""

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

    In a folder each array is `NAME.npy`, `finished.npy` holds a digest of each finished block (zeros for the others), and `identity.json` says of which
    inputs the work is. A block is recorded only after its numbers were flushed, and what is found in the folder is compared with its record: a block
    whose numbers are not those that were written is done again. Ranks write different rows of the same files: they need one shared
    file system that maps files coherently (one machine always does). The space is taken from the disk at once, because a full disk under a mapped file kills.

    Args:
        shapes: Name to (shape, dtype) of each array.
        num_blocks: Blocks to finish.
        folder: Where the files are; made if absent. None: in memory, in one process only.
        identity: Digest of everything that decides the numbers. Work of another identity is not resumed.
        rows: The rows of the arrays that make up a block, as an index; None where the one block is all rows.

    Attributes:
        arrays: The arrays by name; writable, memory-mapped where they are files.

    Raises:
        AnybatchError: Several ranks without a folder, or a folder that cannot be written.

    Warns:
        UserWarning: The folder holds work of other inputs, which is discarded, or damaged blocks, which are done again.

    Cost: two barriers under several ranks, one here and one in `wait`; one digest of all numbers, about 1 GB a second, and one more of what is found.
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
        everything = {**shapes, "finished": ((num_blocks, RECORD), np.uint8)}
        self._identity, self._rows = identity, rows or (lambda block: slice(None))
        self._in_files = folder is not None
        self.arrays: dict[str, np.ndarray] = {}
        if folder is None:
            if distributed.is_active():
                raise AnybatchError(
                    "Several processes search together through files; give a folder that all of them can reach."
                )
            self.arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in everything.items()}
        else:
            with distributed.alone() as chosen:
                if chosen:
                    _prepare(folder, everything, identity)
            self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in everything}
        self._records = self.arrays.pop("finished")
        damaged = [block for block in self.share() if self.finished[block] and self._changed(block)]
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
        """Record that the numbers of `block` are in the arrays.

        Raises:
            AnybatchError: They cannot be brought onto the disk.
        """
        try:
            for array in self.arrays.values():
                _flush(array)
            self._records[block] = self._digest(block) if self._in_files else 1
            _flush(self._records)
        except OSError as error:
            raise AnybatchError(f"Cannot write the results of a search: {error.strerror or error}.") from error

    def _digest(self, block: int) -> np.ndarray:
        def parts() -> Iterator[bytes]:
            yield f"{self._identity} {block}".encode()
            rows = self._rows(block)
            for array in self.arrays.values():
                yield np.ascontiguousarray(array[rows]).tobytes()

        return np.frombuffer(bytes.fromhex(digest_of(parts())), np.uint8)

    def _changed(self, block: int) -> bool:
        return not np.array_equal(self._records[block], self._digest(block))

    def wait(self) -> None:
        """Until every rank is here; then all blocks are finished. One barrier."""
        distributed.barrier()
        if not self.finished.all():  # on a file system that does not map files coherently this is how it shows
            raise AnybatchError(
                f"{int((~self.finished).sum())} of {len(self.finished)} blocks were finished by other processes but do not show here. "
                "The folder must be on a file system that all processes see alike; use a local disk with all processes on one machine."
            )


def _prepare(folder: Path, shapes: Shapes, identity: str) -> None:
    """Make the files anew unless they are of this identity; `identity.json` is removed first and written last."""
    label = folder / "identity.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if label.exists():
            if _is_of(label, identity) and all(
                _fits(folder / f"{name}.npy", shape, dtype) for name, (shape, dtype) in shapes.items()
            ):
                return
            warnings.warn(
                f"{folder} holds work on other inputs or of another version, or is damaged; it starts again.",
                stacklevel=4,
            )
            label.unlink()
        for name, (shape, dtype) in shapes.items():
            _allocate(folder / f"{name}.npy", shape, dtype)
    except OSError as error:
        for name in shapes:  # what was made of them would keep the disk full
            with contextlib.suppress(OSError):
                (folder / f"{name}.npy").unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()
        size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
        raise AnybatchError(
            f"Cannot write {size / 2**30:.3g} GiB to {folder}: {error.strerror or error}. Free some space or choose another folder."
        ) from error
    write_json(label, {"identity": identity})


def _is_of(label: Path, identity: str) -> bool:
    try:
        return read_json(label, "", "identity")["identity"] == identity
    except AnybatchError:
        return False


def _fits(path: Path, shape: tuple[int, ...], dtype: type) -> bool:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # of a damaged header NumPy says it in many ways
        return False
    return array.shape == shape and array.dtype == np.dtype(dtype) and array.flags.c_contiguous


def _allocate(path: Path, shape: tuple[int, ...], dtype: type) -> None:
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _flush(array: np.ndarray) -> None:
    if isinstance(array, np.memmap):
        array.flush()


def release_pages(*arrays: object) -> None:
    """Let the process drop the pages of mapped files, which it reads again when it needs them; other arrays are left alone.

    They would be reclaimed under pressure anyway, but count as the process's memory, and against a container's limit, until then.
    """
    for array in arrays:
        mapped = array
        while isinstance(mapped, np.ndarray):  # a part of a mapped array leads to it, and that to the map
            if isinstance(mapped, np.memmap) and mapped.mode == "c":
                break  # what was changed in memory alone would be lost
            mapped = mapped.base
        if isinstance(mapped, mmap.mmap):
            mapped.madvise(mmap.MADV_DONTNEED)
