"""Arrays filled block by block: in memory, or in files that a killed run goes on with and several ranks fill together.

Imports errors, files, distributed.
"""

from __future__ import annotations

import json
import mmap
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from anybatch import distributed
from anybatch.errors import AnybatchError
from anybatch.files import write_text


class BlockArrays:
    """Named arrays and a record of which blocks of them are finished.

    In a folder each array is `NAME.npy`, the record is `finished.npy` (one byte a block) and `identity.json` says of which inputs the work
    is. A block is recorded only after its numbers were flushed, so that whatever is recorded is whole after a kill. Ranks write
    different rows of the same files: they need one shared file system that maps files coherently (one machine always does).

    Args:
        shapes: Name to (shape, dtype) of each array.
        num_blocks: Blocks to finish.
        folder: Where the files are; made if absent. None: in memory, in one process only.
        identity: Digest of everything that decides the numbers. Work of another identity is not resumed.

    Attributes:
        arrays: The arrays by name; writable, memory-mapped where they are files.
        finished: (num_blocks,) bool.

    Raises:
        AnybatchError: Several ranks without a folder, or a folder that cannot be written.

    Warns:
        UserWarning: The folder holds work of other inputs, which is discarded.

    Cost: two barriers under several ranks, one here and one in `wait`.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[tuple[int, ...], type]],
        num_blocks: int,
        *,
        folder: Path | None = None,
        identity: str = "",
    ) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        everything = {**shapes, "finished": ((num_blocks,), np.bool_)}
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
            for name in everything:
                self.arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r+")
        self.finished = self.arrays.pop("finished")

    def share(self) -> range:
        """This rank's blocks: every world_size-th."""
        return range(distributed.rank(), len(self.finished), distributed.world_size())

    def mine(self) -> list[int]:
        """The unfinished blocks of this rank's share."""
        return [block for block in self.share() if not self.finished[block]]

    def finish(self, block: int) -> None:
        """Record that the numbers of `block` are in the arrays."""
        for array in self.arrays.values():
            _flush(array)
        self.finished[block] = True
        _flush(self.finished)

    def wait(self) -> None:
        """Until every rank is here; then all blocks are finished. One barrier."""
        distributed.barrier()
        if not self.finished.all():  # on a file system that does not map files coherently this is how it shows
            raise AnybatchError(
                f"{int((~self.finished).sum())} of {len(self.finished)} blocks were finished by other processes but do not show here. "
                "The folder must be on a file system that all processes see alike; use a local disk with all processes on one machine."
            )


def _prepare(folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], type]], identity: str) -> None:
    """Make the files anew unless they are of this identity; `identity.json` is removed first and written last."""
    label = folder / "identity.json"
    wanted = json.dumps(
        {
            "identity": identity,
            "shapes": {name: [list(shape), np.dtype(dtype).str] for name, (shape, dtype) in shapes.items()},
        }
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = label.read_text(encoding="utf-8") if label.exists() else None
        if found == wanted and all((folder / f"{name}.npy").exists() for name in shapes):
            return
        if found is not None:
            warnings.warn(f"{folder} holds work on other inputs or of another version; it starts again.", stacklevel=4)
            label.unlink()
        for name, (shape, dtype) in shapes.items():
            array = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
            array.flush()
    except OSError as error:
        raise AnybatchError(
            f"Cannot write to {folder}: {error.strerror or error}. Free some space or choose another folder."
        ) from error
    write_text(label, wanted)


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
