"""Every example runs, in its own process and folder, and is short enough to read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SLOW = ("mmeb_b3.py", "sentence_transformers_all.py", "two_towers_sogclr.py")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
        for name in sorted(path.name for path in EXAMPLES.glob("*.py"))
    ],
)
def test_example_runs(name, tmp_path, tiny_model_folder):
    if name.startswith("ray"):
        pytest.importorskip("ray")
    folder = str(tiny_model_folder)
    arguments = {"sentence_transformers_all.py": [folder, "256"], "ray_embed.py": [folder]}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments.get(name, [])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_examples_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) >= 4
    assert max(lengths.values()) <= 80, lengths
