"""docs/settings.md is what the configuration classes say, and they say no more than they have to."""

from __future__ import annotations

import runpy
from pathlib import Path

from anybatch.run.settings import settings_of

ROOT = Path(__file__).parents[2]
MOST = 90


def test_the_page_is_up_to_date():
    made = runpy.run_path(str(ROOT / "tools" / "settings.py"))
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == made["page"](), (
        "run: python tools/settings.py"
    )
    settings = list(settings_of())
    assert len({setting.key for setting in settings}) == len(settings) <= MOST
    assert all(setting.meaning for setting in settings)
