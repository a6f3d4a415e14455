"""Pages keep to 120 columns, no merge leaves its marks, and what the page on the architecture adds works."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from anybatch.losses import InfoNCE, SoftmaxLoss
from anybatch.losses.denominators import WithPositive

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
WIDTH = 120
UNBREAKABLE = re.compile(r"\s*(\||\S*\[[^\]]*\]\(\S+\)\S*$|\S+$)")  # a table, a link or a word alone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_narrow_and_whole(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > WIDTH and not UNBREAKABLE.match(line)]
    assert not wide
    assert not [line for line in lines if re.match(r"(<{7}|>{7}) |={7}$", line)]


def test_what_the_architecture_page_adds_works():
    """Its mask by author removes pairs, its schedule moves, counts training steps only and resumes."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    names = {"anchor_id": np.arange(4), "positive_id": np.arange(4), "author": np.array([0, 0, 0, 1])}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(4, 8, generator=generator).requires_grad_() for _ in range(2)]
    loss = InfoNCE()
    loss(*sides, **names["rows"].arguments(torch.arange(4)))
    assert loss.last_stats["num_negatives"] == (1 + 1 + 1 + 3) / 4
    scheduled, resumed = (SoftmaxLoss(names["LinearTemperature"](0.1, 0.05, num_steps=4), WithPositive()) for _ in "ab")
    for _ in range(2):
        scheduled(*sides).backward()
        scheduled.eval()(*sides)
        scheduled.train()
    assert scheduled.temperature == pytest.approx(0.075)
    resumed.load_state_dict(scheduled.state_dict())
    assert torch.equal(resumed(*sides), scheduled(*sides))


def test_the_readme_opens_with_a_script_that_runs(tmp_path, monkeypatch):
    """As it stands, in at most 15 lines."""
    monkeypatch.chdir(tmp_path)
    script = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    assert len(script.splitlines()) <= 15
    names = {}
    exec(script, names)
    assert names["trainer"].state.global_step == 2
    assert (tmp_path / "out/model/model.safetensors").exists()
