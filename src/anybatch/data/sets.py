"""Which data sets a path names: one file, a folder of files, a folder of folders (one a task), a pattern."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from anybatch.core.errors import AnybatchError
from anybatch.data.records import FORMATS, KINDS

_TESTS = "(test|testing|dev|devel|development|val|valid|validation|eval|evaluation)"
# Names of splits not to train on.
HELD_OUT = re.compile(rf"{_TESTS}(?![a-z])|.*(?<![a-z]){_TESTS}(?=$|\.|[-_]\d)", re.IGNORECASE)
SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-(?P<total>\d{5})(?P<kind>\..+)")  # one of the files of a data set
# Splits of MMEB's tasks: the same rows with one instruction a task, with many, and as first released.
WORDINGS = ("original", "diverse_instruction", "train")
IMAGES = re.compile(r"\.|images?\b|images?_", re.IGNORECASE)  # folders beside those of the tasks that hold no data


def find_sets(path: str | os.PathLike[str]) -> dict[str, Path]:
    """The data sets that a path names, by their names; empty for one file or one saved data set.

    Of a folder its files and saved data sets, those of its folders (one a task), or the splits of a `DatasetDict`; of a
    pattern such as data/*.jsonl what matches it. Splits that are meant for testing are refused. Files such as
    train-00000-of-00002.parquet are one data set, for which a pattern stands. Of MMEB's splits of a task `original` is
    used; a pattern such as MMEB-train/*/diverse_instruction-* names another.
    """
    path = Path(path)
    if is_plain_folder(path):
        sets = list(_sets_of(path))
        if not sets:
            raise AnybatchError(f"{path} is a folder without data sets. Expected files or folders of these: {FORMATS}.")
    else:
        sets = [] if path.exists() else list(_matching(path))
    tests = [test for name, file in sets if (test := _held_out(name, file)) is not None]
    if tests:
        example = next((f", such as {file}" for name, file in sets if _held_out(name, file) is None), "")
        raise AnybatchError(
            f"{path} holds {', '.join(name for name, _ in sets)}; {', '.join(tests)} would be trained on. Give one "
            f"of them{example}, a pattern of those to train on, or name them in data.sets."
        )
    found: dict[str, Path] = {}
    for name, file in sets:
        if name in found:
            clash = f"{found[name].name} and {file.name}"
            raise AnybatchError(f"Two data sets are called '{name}': {clash}. Rename one, or name them in data.sets.")
        found[name] = file
    return found


def files_of(path: Path) -> list[Path]:
    """The files of one data set, in order: itself; those that a pattern matches, or that are all in a folder."""
    if is_plain_folder(path):
        inner = _one_wording(_sets_in(path))
        if len(inner) > 1:
            names = ", ".join(name for name, _ in inner)
            raise AnybatchError(f"{path} holds the data sets {names}; expected one. Name its file.")
        path = inner[0][1] if inner else path
    if path.parts[:1] == ("hf:",) or path.exists():
        return [path]
    return sorted(map(Path, glob.glob(str(path), recursive=True))) or [path]


def _held_out(name: str, path: Path) -> str | None:
    """What of a data set is meant for testing: all of it, by its name, or one of its tars."""
    if HELD_OUT.match(path.name):
        return name
    tars = files_of(path) if path.suffix == ".tar" else []
    return next((tar.name for tar in tars if HELD_OUT.match(tar.name)), None)


def is_plain_folder(path: Path) -> bool:
    """Whether it is a folder, and no saved data set."""
    return path.is_dir() and not (path / "state.json").exists()


def _matching(pattern: Path) -> Iterator[tuple[str, Path]]:
    files = sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    sets = _grouped(files, pattern.name if pattern.suffix == ".tar" else "*.tar")
    matched = set(files)
    for name, path in sets:
        of_set = [] if path.exists() else files_of(path)
        if left := [file for file in of_set if file not in matched]:
            raise AnybatchError(
                f"{pattern} matches {len(of_set) - len(left)} of the {len(of_set)} files of the data set '{name}', and "
                f"not {left[0].name}. Match all of them, or name the pattern in data.sets, as the path of one set."
            )
    names = [name for name, _ in sets]
    one_a_folder = len(set(names)) < len(names)
    yield from ((file.parent.name if one_a_folder else name, file) for name, file in sets)


def _sets_of(path: Path) -> Iterator[tuple[str, Path]]:
    """The data sets of a folder that is none itself, with their names."""
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        yield from ((name, path / name) for name in splits)
        return
    yield from _one_wording(_sets_in(path))
    for folder in sorted(path.iterdir()):
        if not is_plain_folder(folder):
            continue
        inner = _one_wording(_sets_in(folder))  # one folder a task
        if not inner and not IMAGES.match(folder.name):
            found = f"{path} holds the folder {folder.name}, which is no data set"
            raise AnybatchError(f"{found}. Name the data sets in data.sets.")
        yield from ((folder.name if len(inner) == 1 else f"{folder.name}-{name}", file) for name, file in inner)


def _one_wording(sets: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    kept, names = WORDINGS[0], [name for name, _ in sets]
    if len(names) < 2 or kept not in names or not set(WORDINGS).issuperset(names):
        return sets
    return [(name, file) for name, file in sets if name == kept]


def _sets_in(folder: Path) -> list[tuple[str, Path]]:
    def is_data(path: Path) -> bool:
        a_file = path.is_file() and path.name.removesuffix(".gz").lower().endswith(KINDS)
        return a_file or (path / "state.json").exists()

    return _grouped(filter(is_data, sorted(folder.iterdir())))


def _grouped(files: Iterable[Path], tars: str = "*.tar") -> list[tuple[str, Path]]:
    """Data sets with their names; the files of one as a pattern. A folder's tars, named by `tars`, are one set."""
    sets: dict[Path, str] = {}
    for file in files:
        if file.suffix.lower() == ".tar":
            sets[Path(glob.escape(str(file.parent))) / tars] = file.parent.name or "shards"
            continue
        shard = SHARD.fullmatch(file.name)
        if shard is None:
            sets[file] = file.name if file.is_dir() else Path(file.name.removesuffix(".gz")).stem
        elif shard["total"] == "00001":
            sets[file] = shard["split"]
        else:
            folder = Path(glob.escape(str(file.parent)))
            sets[folder / f"{glob.escape(shard['split'])}-*-of-{shard['total']}{shard['kind']}"] = shard["split"]
    return [(name, file) for file, name in sets.items()]
