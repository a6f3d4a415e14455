"""Look at pages in a real browser: chromium, headless, where one is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (400, 1024, 1920)
PRINTED = 680  # CSS pixels between the margins of a sheet of A4
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    "--virtual-time-budget=20000",
)
MEASURE = Path(__file__).with_suffix(".js")


def look(pages: Mapping[str, str], folder: Path) -> dict[str, dict[str, object]]:
    """What is wrong with each page at each width, in light, dark and print: by `name width way`."""
    frames = []
    for name, page in pages.items():
        ways = [(width, way, page) for width in WIDTHS for way in ("light", "dark")]
        for width, way, text in [*ways, (PRINTED, "print", page.replace("@media print", "@media all"))]:
            scheme = "dark" if way == "dark" else "light"
            style = f"width:{width}px;height:800px;border:0;color-scheme:{scheme}"
            frames.append(f'<iframe id="{name} {width} {way}" style="{style}" srcdoc="{html.escape(text)}"></iframe>')
    file = folder / "frames.html"
    script = f"<script>{MEASURE.read_text(encoding='utf-8')}</script>"
    start = '<!doctype html><meta charset="utf-8"><pre id="report"></pre>'
    file.write_text(start + "".join(frames) + script, encoding="utf-8")
    dumped = browse(folder, "--window-size=2000,1000", "--dump-dom", file.as_uri())
    (report,) = re.findall(r'<pre id="report">(.*?)</pre>', dumped, re.DOTALL)
    return json.loads(html.unescape(report))


def screenshot(
    page: Path, picture: Path, folder: Path, *, width: int, height: int = 1600, scheme: str = "light"
) -> None:
    """A picture of a page in a frame of this width."""
    framed = folder / f"{picture.stem}.frame.html"
    style = f"width:{width}px;height:{height}px;border:0;color-scheme:{scheme}"
    text = html.escape(page.read_text(encoding="utf-8"))
    framed.write_text(
        f'<!doctype html><meta charset="utf-8"><body style="margin:0"><iframe style="{style}" srcdoc="{text}">',
        encoding="utf-8",
    )
    browse(folder, f"--window-size={max(width, 500)},{height}", f"--screenshot={picture}", framed.as_uri())


def browse(folder: Path, *arguments: str) -> str:
    """What chromium prints."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
