"""The synthetic folder in MMEB's layout that `examples/synthetic_mmeb.py` writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "synthetic_mmeb.py"


def write_mmeb(folder: Path, num_rows: int) -> Path:
    """The folder itself, with train, eval and images in it."""
    spec = importlib.util.spec_from_file_location("synthetic_mmeb", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_mmeb(folder, num_rows)
    return folder
