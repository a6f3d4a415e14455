"""docs/settings.md holds every name that a user can set, as the configuration classes and the constructors of the losses have it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools" / "settings.py"
MOST = 90


def test_the_page_of_settings_is_current_and_short():
    spec = importlib.util.spec_from_file_location("settings_tool", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run: python tools/settings.py"
    keys = [setting.key for setting in tool.settings_of(tool.RunConfig)]
    assert len(keys) == len(set(keys))
    assert len(keys) <= MOST
    assert {f"loss.{name}" for method in tool.METHODS for name in tool.options_of(method)} <= set(keys)
