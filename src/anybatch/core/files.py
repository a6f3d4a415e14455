"""Files that are whole, or absent, or named as damaged: atomic writes, digests, one writer per folder.

What a later run reads back is written in one of two ways:

    one file    `write_sealed`: the file carries a digest of all its own bytes, so that it can be moved and copied
    a folder    `seal_folder`: a list of sizes and digests of all its files, written last

A digest finds what a disk, a cut connection or a careless hand changed; it is no signature against forging.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from anybatch.core.errors import AnybatchError

CONTENTS = "anybatch_contents.json"
CARD = "README.md"  # a model's page, its owner's to edit; no run reads it
LOCK = ".lock"
_MARK, _DIGITS = b"anybatch-digest:", 32
SEAL = _MARK.decode() + "0" * _DIGITS  # stands in what `write_sealed` is given; the digest takes the zeros' place


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it onto `path`: never half of a file."""
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise AnybatchError(
            f"Cannot write {path}: {error.strerror or error}. Check that its folder exists and is writable."
        ) from error
    os.close(handle)
    try:
        write(Path(temporary))
        _sync(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        kept = "the file that was there is unchanged" if path.exists() else "nothing was written"
        raise AnybatchError(
            f"Cannot write {path}: {error.strerror or error}; {kept}. Free some space or choose another folder."
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content`, atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_sealed(path: str | os.PathLike[str], content: bytes) -> str:
    """Write `content`, atomically, with a digest of all its bytes, which is returned, in the place of its `SEAL`."""
    start = content.index(SEAL.encode()) + len(_MARK)
    digest = digest_of([content]).encode()
    write_bytes(path, content[:start] + digest + content[start + _DIGITS :])
    return digest.decode()


def read_sealed(path: str | os.PathLike[str], remedy: str) -> bytes:
    """The content of a file of `write_sealed`, if every bit is as it was written; `remedy` ends the message if not."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise AnybatchError(f"Cannot read {path}: {error.strerror or error}. {remedy}") from error
    start = content.find(_MARK) + len(_MARK)
    if start < len(_MARK):
        raise AnybatchError(f"{path} is damaged, or was not written by this version: it carries no digest. {remedy}")
    unsealed = content[:start] + b"0" * _DIGITS + content[start + _DIGITS :]
    if content[start : start + _DIGITS] != digest_of([unsealed]).encode():
        raise AnybatchError(f"{path} is damaged: its content does not have the digest that it carries. {remedy}")
    return content


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write a mapping as sealed JSON, atomically; the digest stands under "digest"."""
    write_sealed(path, json.dumps({"digest": SEAL, **value}, indent=2).encode())


def read_json(path: str | os.PathLike[str], remedy: str, *keys: str) -> dict[str, Any]:
    """What `write_json` wrote, without the digest; `keys` tell this kind of file from the others that are sealed."""
    content, value = read_sealed(path, remedy), None
    with contextlib.suppress(ValueError):
        value = json.loads(content)
    if not isinstance(value, dict) or not {"digest", *keys} <= value.keys():
        raise AnybatchError(f"{path} is whole, but another kind of file has taken its place. {remedy}")
    del value["digest"]
    return value


def tensors_metadata(content: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file whose bytes are known to be whole."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})


def seal_folder(folder: Path, **facts: Any) -> None:
    """Sync all files in `folder`, give them the modes of new files, and list sizes and digests in `CONTENTS`, last.

    Its model card is not listed. `facts` are further entries of the list, which is sealed JSON.

    Cost: one pass over the files, about 1 GB a second, and their way to the disk.
    """
    listed: dict[str, Any] = {}
    try:
        for path in sorted(folder.rglob("*")):
            if path.is_dir():
                sync_folder(path)
            elif path != folder / CONTENTS:
                _sync(path)
                os.chmod(path, 0o666 & ~_umask())  # some libraries write weights for their owner alone
                if path.name != CARD:
                    listed[path.relative_to(folder).as_posix()] = [path.stat().st_size, file_digest(path)]
    except OSError as error:
        raise AnybatchError(f"Cannot write {folder}: {error.strerror or error}. Free some space.") from error
    write_json(folder / CONTENTS, {**facts, "files": listed})
    sync_folder(folder.parent)


def flaw_of(folder: Path, **facts: Any) -> str | None:
    """What is wrong with a folder of `seal_folder` of these facts, in words that end a sentence; None if nothing is."""
    if not (folder / CONTENTS).exists():
        return f"was cut short: it has no {CONTENTS}"
    try:
        kept = read_json(folder / CONTENTS, "", "files")
    except AnybatchError:
        return f"is damaged in {CONTENTS}"
    for fact, value in facts.items():
        if kept.get(fact) != value:
            return f"belongs to another {fact}"
    for path, (size, digest) in kept["files"].items():
        try:
            if (folder / path).stat().st_size != size or file_digest(folder / path) != digest:
                return f"is damaged in {path}"
        except OSError as error:
            return f"has a file that cannot be read, {path} ({error.strerror})"
    return None


def file_digest(path: str | os.PathLike[str]) -> str:
    """A short digest of a file's bytes. Cost: about 1 GB a second."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder onto the disk, as far as its file system can."""
    with contextlib.suppress(OSError):
        _sync(folder)


def _sync(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only writer of `folder`, between processes and machines on NFS (Linux): hold the lock of its file `.lock`.

    The system releases it however a process ends. Warns where the file system has no locks.
    """
    path = folder / LOCK
    descriptor = _lock(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _lock(path: Path) -> int:
    import fcntl

    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise AnybatchError(f"Cannot write {path}: {error.strerror or error}. Choose another folder.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise AnybatchError(
                f"{path.parent} is in use: {holder} writes there. Wait until that run ends, or choose another output "
                "folder."
            ) from None
        except OSError as error:
            warnings.warn(
                f"{path.parent} cannot be locked ({error.strerror}). Take care that no other run writes there.",
                stacklevel=5,
            )
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                with contextlib.suppress(OSError):  # on a full disk the message to others is shorter
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        os.close(descriptor)  # the last holder removed the file between our two calls


def digest_of(parts: Iterable[bytes]) -> str:
    """A short digest of a sequence of byte strings; boundaries between the parts count. Cost: about 1 GB a second."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def check_name(name: str, what: str) -> None:
    """Refuse what cannot be the name of one file or folder in a given folder. File systems take 255 bytes."""
    size = len(name.encode("utf-8", "surrogatepass"))
    if not name or name in (".", "..") or size > 200 or any(sign in "/\\" or ord(sign) < 32 for sign in name):
        shown = repr(name if size <= 200 else name[:40] + "...")
        raise AnybatchError(
            f"A {what} is called {shown}; expected a plain file name, because files are called after it: 1 to 200 "
            "bytes, no '/' or '\\', no control characters, not '.' or '..'. Give it another name."
        )
