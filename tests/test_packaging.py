"""What a user of the source archive, the image and the claimed versions relies on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from tools.lowest import lowest

import anybatch

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INCLUDED = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]


def in_archive(path: Path) -> bool:
    """Whether the source archive has it."""
    first = path.resolve().relative_to(ROOT).parts[0]
    return path.exists() and any(Path(first).match(pattern) for pattern in INCLUDED)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_what_a_page_links_to_is_in_the_source_archive(page):
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
    links = [link for link in links if "://" not in link]
    assert links or page != "README.md"
    assert [link for link in links if not in_archive(ROOT / link)] == []


def test_what_make_needs_is_in_the_source_archive():
    needed = re.findall(r"(?<![\w/$)])(?:tools|tests|\.ci)/[\w/.]+|constraints\.txt", (ROOT / "Makefile").read_text())
    assert {"constraints.txt", ".ci/wheel", "tools/lowest.py"} <= set(needed)
    assert [name for name in needed if not in_archive(ROOT / name.rstrip("."))] == []


def test_versions_are_said_once():
    assert PROJECT["project"]["version"] == anybatch.__version__


def test_every_dependency_has_a_lower_bound_that_the_pinned_version_meets():
    pins = dict(re.findall(r"^([\w.-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for pin in lowest([one for one in PROJECT["project"]["dependencies"] if not one.startswith("torch>")]):
        name, _, version = pin.partition("==")
        parts = [tuple(map(int, text.split("."))) for text in (version, pins[name.split("[")[0].lower()])]
        assert parts[0] <= parts[1], pin


def test_the_image_copies_files_that_exist_and_that_its_context_has():
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    context = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"pyproject.toml", "src", "constraints.txt"} <= set(names)
    assert [name for name in names if not (ROOT / name).exists() or f"!{name}" not in context] == []
