"""Write docs/settings.md, every name that a user can set with its type and default: what `anybatch config` prints.

    python tools/settings.py [--check]

With `--check` nothing is written; exit code 1 if the page is not what would be written.
"""

from __future__ import annotations

import sys
from pathlib import Path

from anybatch.run.settings import listing, settings_of

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"


def page() -> str:
    """The page as text."""
    settings = list(settings_of())
    return f"""# Every setting

Written by `python tools/settings.py` from the configuration classes; `anybatch config` prints the same, `anybatch train
--show-config` the values. {len(settings)} settings, of which single losses and data sets have their own.
{listing(settings)}"""


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
