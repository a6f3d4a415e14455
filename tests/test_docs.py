"""Pages keep to 120 columns, and no merge leaves its marks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
WIDTH = 120
UNBREAKABLE = re.compile(r"\s*(\||\S*\[[^\]]*\]\(\S+\)\S*$|\S+$)")  # a table, a link or a word alone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_narrow_and_whole(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > WIDTH and not UNBREAKABLE.match(line)]
    assert not wide
    assert not [line for line in lines if re.match(r"(<{7}|>{7}) |={7}$", line)]
