"""The cache of compiled loops is a convenience: without a place, or with damaged files, mining gives the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import anybatch

PROGRAM = """
import zlib
import numpy as np
from anybatch.mining import exact_neighbors
from anybatch.mining.top import _gather
rows = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
ids = np.arange(200)
found = exact_neighbors(rows, rows[::-1], 12, anchor_id=ids, positive_id=ids).ids
print(zlib.crc32(found.tobytes()), _gather._cache.__class__.__name__)
"""


def mined(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """The neighbours found by the package in `folder` without a home, and which cache was used."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), "HOME": "/dev/null/nowhere", "OMP_NUM_THREADS": "1",
        **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A copy of the package in which, even for root, no cache can be made: files are where the folders would be."""
    folder = tmp_path_factory.mktemp("installed")
    source = Path(anybatch.__file__).parent
    shutil.copytree(source, folder / "anybatch", ignore=shutil.ignore_patterns("__pycache__"))
    for package in [folder / "anybatch", *(path for path in (folder / "anybatch").rglob("*") if path.is_dir())]:
        (package / "__pycache__").touch()
    return folder


@pytest.mark.slow
def test_mining_works_where_nothing_can_be_cached_or_the_cache_is_damaged(installed, tmp_path):
    usual, kind = mined(installed, "-c", PROGRAM, NUMBA_CACHE_DIR=str(tmp_path))
    assert kind == "_Cache"
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert len(files) >= 4, "the cache was used"
    assert mined(installed, "-c", PROGRAM) == [usual, "NullCache"]
    for path in files:
        path.write_bytes(path.read_bytes()[:50])
    assert mined(installed, "-c", PROGRAM, NUMBA_CACHE_DIR=str(tmp_path)) == [usual, "_Cache"]


def test_the_command_line_answers_without_a_home(installed):
    assert "Contrastive" in mined(installed, "-m", "anybatch", "--help")
