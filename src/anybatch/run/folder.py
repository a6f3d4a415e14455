"""The folder of a run: one writer, the configuration it was begun with, nothing left by a failed start; its records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from anybatch.core import distributed
from anybatch.core.configuration import differences
from anybatch.core.errors import AnybatchError
from anybatch.core.files import SEAL, file_digest, locked, read_json, write_sealed
from anybatch.core.yaml_files import to_yaml
from anybatch.run.config import RunConfig, read_config, resolved

LITTER = ("desktop.ini", "Thumbs.db")  # beside hidden files, what file managers leave in folders


@contextmanager
def open_run(config: RunConfig, *, resume: bool = False) -> Iterator[Path]:
    """The run's folder with the resolved configuration in it, for as long as this is open held against all others.

    A start that fails with nothing done leaves nothing: the folder can be used by the next. Refused are a folder that
    holds a run (and `resume` is off), something else or a run of another configuration, or is in use.
    """
    folder = Path(config.output)
    with ExitStack() as stack:
        with distributed.alone() as chosen:
            if chosen:
                stack.enter_context(_held(folder, config, resume))
        yield folder


@contextmanager
def _held(folder: Path, config: RunConfig, resume: bool) -> Iterator[None]:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnybatchError(f"Cannot make the folder {folder}: {error.strerror}. Choose another --output.") from error
    try:
        with locked(folder):
            _begin(folder, config, resume)
            try:
                yield
            except Exception:
                if not _names(folder) - {"config.yaml"} and not resume:
                    (folder / "config.yaml").unlink(missing_ok=True)
                raise
    finally:
        for path in made:  # those that are empty
            with suppress(OSError):
                path.rmdir()


def check_vacant(config: RunConfig) -> None:
    """Refuse, before a new run reads anything, a folder that `open_run` would refuse."""
    folder = Path(config.output)
    with distributed.alone() as chosen:
        if chosen and folder.is_dir():
            with locked(folder):
                _refuse_taken(folder, resume=False)


def _refuse_taken(folder: Path, *, resume: bool) -> None:
    names = _names(folder)
    if names and "config.yaml" not in names:
        raise AnybatchError(f"{folder} exists and is not empty, and is no run of anybatch. Choose another --output.")
    if names - {"config.yaml"} and not resume:
        raise AnybatchError(f"{folder} already holds a run. Choose another --output, or add --resume to go on with it.")


def _names(folder: Path) -> set[str]:
    """What is in a run's folder but the lock, what a killed run was about to write, and what file managers leave."""
    return {
        path.name
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.suffix != ".tmp" and path.name not in LITTER
    }


def _begin(folder: Path, config: RunConfig, resume: bool) -> None:
    written = folder / "config.yaml"
    _refuse_taken(folder, resume=resume)
    for path in folder.glob(".*.tmp"):
        path.unlink()
    if _names(folder) - {"config.yaml"}:
        changed = [
            line
            for line in differences(resolved(read_config(folder)), resolved(config))
            if not line.startswith("output:")
        ]
        if changed:
            model = folder / "model"
            further = (
                f" To train the model further, start a new run from it: --model {model}." if model.exists() else ""
            )
            raise AnybatchError(
                f"{folder} holds a run of another configuration; it differs in {'; '.join(changed)}. Resume with the "
                f"configuration in {written}, or choose another output folder.{further}"
            )
        return
    write_sealed(written, f"{to_yaml(resolved(config))}# {SEAL}\n".encode())


def run_digest(folder: Path) -> str:
    """Tells a run from all others: the digest of its configuration."""
    return file_digest(folder / "config.yaml")


def read_record(path: Path, run: str, *keys: str) -> dict[str, Any]:
    """Figures that a run left, as it left them, or a message."""
    remedy = f"Delete {path} and go on with --resume: it is made anew."
    kept = read_json(path, remedy, "run", *keys)
    if kept.pop("run") != run:
        raise AnybatchError(f"{path} belongs to another run. {remedy}")
    return kept
