"""The faults of `benchmarks.faults`, a few of each kind: nothing silent, nothing crashed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_no_fault_is_silent_and_none_crashes(tmp_path):
    """In a process of its own: it forks, and what forks should have no threads of other tests."""
    script = (
        "import json, sys; from pathlib import Path; from benchmarks.faults import Faults\n"
        "print(json.dumps(Faults(Path(sys.argv[1])).few()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(rows) == 9
    for name, ends in rows.items():
        assert set(ends) <= {"same", "refused"}, (name, ends)
    assert rows["two writers"] == {"refused": 1}
    assert rows["kill -9, mine"]["same"] == 2
    assert rows["kill -9, train"]["same"] == 2
