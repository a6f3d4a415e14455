"""Which room may import which (docs/architecture.md): read from the source, imports inside functions included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import anybatch

SOURCE = Path(anybatch.__file__).parent
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "data": {"core"},
    "plans": {"core"},
    "caching": {"core"},
    "losses": {"core", "plans"},
    "mining": {"core", "plans"},
    "evaluation": {"core"},
    "vision": {"core", "data", "plans", "losses"},
    "family": {"core", "plans", "losses"},
    "integrations": {"core", "data", "plans", "caching", "losses", "mining", "evaluation", "vision"},
}
ALLOWED["run"] = ALLOWED["integrations"] | {"integrations"}
ALLOWED["insight"] = ALLOWED["run"] | {"run", "family"}
ALLOWED["cli"] = ALLOWED["insight"] | {"insight"}
MOST_ROOMS, MOST_FILES = 13, 15


def imported(path: Path) -> set[str]:
    """Modules of anybatch that a file imports, as dotted names below `anybatch`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("anybatch.") for name in names if name.startswith("anybatch.")}


def files(room: str) -> list[Path]:
    return sorted((SOURCE / room).rglob("*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_those_below(room):
    wrong = {
        f"{path.relative_to(SOURCE)} imports {name}"
        for path in files(room)
        for name in imported(path)
        if name.split(".")[0] in ALLOWED and name.split(".")[0] not in ALLOWED[room] | {room}
    }
    assert not wrong


def test_every_room_is_in_the_table_and_the_arrows_have_no_circle():
    rooms = {path.name for path in SOURCE.iterdir() if any(path.rglob("*.py"))}
    assert rooms == set(ALLOWED)
    assert len(rooms) <= MOST_ROOMS
    above = set(ALLOWED)
    while above:  # take away rooms that need none of the rest
        lowest = {room for room in above if not ALLOWED[room] & above}
        assert lowest, f"a circle among {above}"
        above -= lowest


@pytest.mark.parametrize("room", ALLOWED)
def test_no_room_is_flat_beyond_some_files(room):
    folders = {path.parent for path in files(room)}
    crowded = {folder.name: count for folder in folders if (count := len(list(folder.glob("*.py")))) > MOST_FILES + 1}
    assert not crowded  # one more: __init__.py
