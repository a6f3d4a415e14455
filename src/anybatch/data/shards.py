"""Samples of webdataset's tar files: read where they lie, and numbered by their keys. `000012.jpg` is the column
`image`, any other member of its sample a column named by its extension (`txt`, `json`, `cls`), its key `__key__`.
"""

from __future__ import annotations

import functools
import hashlib
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anybatch.core.errors import AnybatchError

KEY, IMAGE = "__key__", "image"
PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
PART = re.compile(r"(?P<file>.+\.tar)#(?P<start>\d+)\+(?P<size>\d+)", re.DOTALL)  # bytes within a tar, as a path
# Files of other kinds (features, archives) stay unread.
TEXTS = ("txt", "json", "cls", "caption", "text", "index", "id", "url")


def tar_dataset(path: Path) -> Any:
    """The samples of an uncompressed tar as a `datasets.Dataset`; images as places in the file, not read.

    Raises:
        AnybatchError: No tar, one cut short, or packed; a sample with two images.

    Cost: one pass over the headers, once while the file stays as it is; texts are read.
    """
    state = path.stat()
    return _dataset(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4096)
def _dataset(path: Path, *state: int) -> Any:
    from datasets import Dataset, Features, Image, Value

    samples: dict[str, dict[str, Any]] = {}
    names: dict[str, None] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, kind = file.partition(".")
                if not stem or not kind:
                    continue
                kind, key = kind.lower(), f"{folder}/{stem}" if folder else stem
                name = IMAGE if kind in PICTURES else kind
                if name != IMAGE and name not in TEXTS:
                    continue
                sample = samples.setdefault(key, {})
                if name in sample:
                    raise AnybatchError(f"The sample '{key}' of {path} has two members '{name}'. Keep one of them.")
                names[name] = None
                place = f"{path}#{member.offset_data}+{member.size}"
                content: Any = tar.extractfile(member) if name != IMAGE else None
                sample[name] = {"bytes": None, "path": place} if name == IMAGE else content.read().decode("utf-8-sig")
    except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError) as error:
        raise AnybatchError(
            f"Cannot read {path} as a webdataset shard: {error}. Expected an uncompressed tar with members such as "
            "000012.jpg and 000012.txt."
        ) from error
    stored: Any = {"bytes": Value("binary"), "path": Value("string")}  # made as an Image, it would need Pillow
    features = Features({KEY: Value("string")} | {name: stored if name == IMAGE else Value("string") for name in names})
    columns = {name: [sample.get(name) for sample in samples.values()] for name in names}
    dataset = Dataset.from_dict({KEY: list(samples), **columns}, features=features)
    return dataset.cast_column(IMAGE, Image(decode=False)) if IMAGE in names else dataset


def read_part(path: str) -> bytes:
    """The bytes of a file, or of a place in a tar that `tar_dataset` names."""
    part = PART.fullmatch(path)
    if part is None:
        return Path(path).read_bytes()
    with open(part["file"], "rb") as file:
        file.seek(int(part["start"]))
        return file.read(int(part["size"]))


class KeyMap:
    """The row of a sample by its key, for pipelines (webdataset, open_clip) that give keys and no row numbers.

    Args:
        keys: Of all samples, in row order; `of_shards` reads them. Two of the same are refused.

    Cost: 16 bytes a sample; a look-up is a binary search.

    >>> KeyMap(["000012", "000007"]).row_of("000007")
    1
    """

    def __init__(self, keys: Sequence[str]) -> None:
        hashes = np.array([_hash_of(key) for key in keys], np.int64)
        self.order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.order]
        if (self.hashes[1:] == self.hashes[:-1]).any():
            twice = keys[int(self.order[np.flatnonzero(self.hashes[1:] == self.hashes[:-1])[0]])]
            raise AnybatchError(
                f"The key '{twice}' occurs twice. Keys must be unique over all shards: put the shard's name before it."
            )

    @classmethod
    def of_shards(cls, paths: Sequence[Path | str]) -> KeyMap:
        """The samples of tars, in the order in which a run reads them: file by file, by name."""
        return cls([key for path in sorted(map(Path, paths)) for key in tar_dataset(path)[KEY]])

    def row_of(self, key: str) -> int:
        """The row; a key that was not there when the map was made is refused."""
        place, wanted = int(np.searchsorted(self.hashes, _hash_of(key))), _hash_of(key)
        if place == len(self.hashes) or self.hashes[place] != wanted:
            raise AnybatchError(f"There is no sample '{key}' in the {len(self.hashes)} of this map. Make it anew.")
        return int(self.order[place])


def _hash_of(key: str) -> int:
    """63 bits of a digest; Python's own hash() differs between processes."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
