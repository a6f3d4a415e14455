"""The lowest versions that pyproject.toml claims, one requirement a line: `pip install $(python tools/lowest.py)`.

Without torch, whose build each machine chooses. `make test-lowest` runs tests in such an environment.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lowest(requirements: list[str]) -> list[str]:
    """Lower bounds as pins.

    >>> lowest(["torch>=2.6", "numpy>=1.26", "sentence-transformers[train]>=6.2"])
    ['numpy==1.26', 'sentence-transformers[train]==6.2']
    """
    return [re.sub(">=", "==", one) for one in requirements if not one.startswith("torch>")]


if __name__ == "__main__":
    print("\n".join(lowest(tomllib.loads(PROJECT.read_text())["project"]["dependencies"])))
