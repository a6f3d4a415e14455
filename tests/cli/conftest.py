"""What a verb prints."""

from __future__ import annotations

import pytest
from rich.console import Console

from anybatch.cli import progress


@pytest.fixture
def heard(monkeypatch):
    """What the commands of a test print."""
    console = Console(width=500, record=True, force_terminal=False, stderr=True)
    monkeypatch.setattr(progress, "console", console)
    return lambda: console.export_text(clear=False)
