"""Files that are whole or absent: atomic writes and digests. Imports only errors."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from anybatch.errors import AnybatchError


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it onto `path`.

    A crash, a kill or a full disk leaves either the old file or the new one, never half of one.

    Args:
        path: The final file. Its folder must exist.
        write: Called with the temporary file's path; must create it.

    Raises:
        AnybatchError: The file could not be written (disk full, no permission); the old file, if any, is intact.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise AnybatchError(
            f"Cannot write {path}: {error.strerror or error}. Check that its folder exists and is writable."
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        kept = "the file that was there is unchanged" if path.exists() else "nothing was written"
        raise AnybatchError(
            f"Cannot write {path}: {error.strerror or error}; {kept}. Free some space or choose another folder."
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content`, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def digest_of(parts: Iterable[bytes]) -> str:
    """A short digest of a sequence of byte strings; boundaries between the parts count.

    Cost: one pass of BLAKE2b, about 1 GB a second.
    """
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
    """Refuse what cannot be the name of one file or folder in a given folder.

    Args:
        name: To be a file's or a folder's.
        what: Whose name it is, e.g. "data set", for the message.

    Raises:
        AnybatchError: It is empty, "." or "..", longer than 200 bytes (file systems take 255), or holds a separator or a control character.
    """
    size = len(name.encode("utf-8", "surrogatepass"))
    if not name or name in (".", "..") or size > 200 or any(sign in "/\\" or ord(sign) < 32 for sign in name):
        shown = repr(name if size <= 200 else name[:40] + "...")
        raise AnybatchError(
            f"A {what} is called {shown}; expected a plain file name, because files are called after it: 1 to 200 bytes, no '/' or '\\', no control "
            "characters, not '.' or '..'. Give it another name."
        )
