"""The pages: short, whole, with links that lead somewhere, commands that exist and code that runs."""

from __future__ import annotations

import logging
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
from torch import nn

from anybatch.cli.app import app
from anybatch.losses import InfoNCE, SoftmaxLoss
from anybatch.losses.denominators import WithPositive
from anybatch.run.settings import settings_of

ROOT = Path(__file__).parents[1]
WRITTEN = ("settings.md", *runpy.run_path(str(ROOT / "tools" / "reference.py"))["PAGES"])  # from the source
GUIDES = sorted(page for page in ROOT.glob("docs/*.md") if page.name not in (*WRITTEN, "log.md"))
PAGES = [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/benchmarks/*.md"))]
WORDS, README_WORDS = 10_000, 1_000
WIDTH = 120
UNBREAKABLE = re.compile(r"\s*(\||\S*\[[^\]]*\]\(\S+\)\S*$|\S+$)")  # a table, a link or a word alone
by_name = pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_narrow_and_whole(page):
    lines = text_of(page).splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > WIDTH and not UNBREAKABLE.match(line)]
    assert not wide
    assert not [line for line in lines if re.match(r"(<{7}|>{7}) |={7}$", line)]


def test_pages_are_few_words():
    """All but what is written from the source, the log and the tables. Bars of tables and signs are no words."""
    words = {page.name: len(re.findall(r"\S*\w\S*", text_of(page))) for page in [*GUIDES, ROOT / "README.md"]}
    assert words.pop("README.md") <= README_WORDS
    assert sum(words.values()) < WORDS, words


@by_name
def test_a_page_says_first_what_it_is_for(page):
    """And stands in the navigation."""
    assert re.match(r"# .+\n\n(No\. )?[^\n]*\bpage (shows|says|takes|explains|lists|is for)\b", text_of(page)), page
    assert f": {page.name}" in text_of(ROOT / "mkdocs.yml")


@pytest.mark.parametrize("name", WRITTEN[1:])
def test_what_is_written_from_the_source_is_current(name):
    pages = runpy.run_path(str(ROOT / "tools" / "reference.py"))["PAGES"]
    assert text_of(ROOT / "docs" / name) == pages[name](), "run: python tools/reference.py"


def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as mkdocs and GitHub make them."""
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text_of(page)):
        linked = (page.parent / target) if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


def test_pages_that_the_source_names_exist():
    """In messages, docstrings and comments."""
    sources = [
        path
        for folder in ("src", "tests", "examples", "tools", "benchmarks")
        for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    named = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in sources
        for name in re.findall(r"docs/(?:benchmarks/)?\w+\.md", text_of(path))
    }
    assert named
    missing = {(path, name) for path, name in named if not (ROOT / name).exists() and "gpu.md" not in name}
    assert not missing


@pytest.mark.parametrize("page", [*GUIDES, ROOT / "README.md"], ids=lambda page: page.name)
def test_commands_exist_with_their_options_and_settings(page):
    keys = {re.sub(r"\[\]", "", setting.key) for setting in settings_of()}
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "anybatch" not in words or words[0] == "pip":
                continue
            command: Any = typer.main.get_command(app)
            rest = words[words.index("anybatch") + 1 :]
            while hasattr(command, "commands"):
                command, rest = command.commands[rest[0]], rest[1:]
            context = command.make_context("anybatch", rest)  # which refuses unknown options
            for assignment in context.params.get("sets") or ():
                assert assignment.partition("=")[0] in keys, assignment


@by_name
def test_settings_that_a_page_names_exist(page):
    keys = {re.sub(r"\[\]", "", setting.key) for setting in settings_of()}
    named = re.findall(
        r"`((?:data|teacher|mining|model|loss|train|evaluation)\.[a-z0-9_.\[\]]+)(?![a-z0-9_.(])", text_of(page)
    )
    named = {re.sub(r"\[\]", "", name) for name in named if not name.endswith((".py", ".json", ".jsonl", ".NAME"))}
    assert not {name for name in named if not any(f"{name}.".startswith(f"{key}.") for key in keys)}


def encoder_and_sides(rows: int = 8) -> dict[str, Any]:
    """What the code of a guide finds at hand: an encoder, inputs, ids, embeddings."""
    generator = torch.Generator().manual_seed(0)
    anchors, positives = torch.randn(2, rows, 12, generator=generator)
    encoder = nn.Linear(12, 8)
    embeddings = torch.randn(2, 64, 8, generator=generator).numpy()
    return {
        "torch": torch,
        "encoder": encoder,
        "model": encoder,
        "optimizer": torch.optim.SGD(encoder.parameters(), lr=0.1),
        "anchors": anchors,
        "positives": positives,
        "num_rows": 64,
        "anchor_id": np.arange(64),
        "positive_id": np.arange(64),
        "anchor_embeddings": embeddings[0],
        "positive_embeddings": embeddings[1],
    }


def test_the_code_for_growing_runs():
    names = encoder_and_sides()
    step, memory = blocks(ROOT / "docs/grow.md", "python")
    exec(step, names)
    assert names["encoder"].weight.grad.abs().sum() > 0
    exec(memory, names)
    assert names["value"].isfinite()


def test_the_code_for_outliving_runs():
    names = encoder_and_sides()
    first, table = blocks(ROOT / "docs/outlive.md", "python")
    exec(first, names)
    assert names["encoder"].weight.grad.abs().sum() > 0
    exec(table, names)


def test_the_code_for_inspection_runs():
    from anybatch import BatchPlan

    names: dict[str, Any] = encoder_and_sides() | {"plan": BatchPlan.random(64, 8)}
    (code,) = blocks(ROOT / "docs/inspect.md", "python")
    exec(code, names)
    assert names["error"].epoch_error > 0


def test_what_the_architecture_page_adds_works():
    """Its mask removes pairs, its schedule moves, counts training steps only and resumes, its loss halves negatives."""
    names: dict[str, Any] = {"anchor_id": np.arange(4), "positive_id": np.arange(4), "author": np.array([0, 0, 0, 1])}
    for block in blocks(ROOT / "docs/architecture.md", "python"):
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

    one, other = (nn.functional.normalize(side.detach(), dim=1) for side in sides)
    logits = one @ other.T / 0.05
    halved = torch.where(torch.eye(4, dtype=torch.bool), logits, logits - torch.tensor(2.0).log())
    both = [nn.functional.cross_entropy(scores, torch.arange(4)) for scores in (halved, halved.T)]
    assert names["loss"](one, other).item() == pytest.approx(float(sum(both)) / 2, abs=1e-5)


def test_the_readme_opens_with_a_script_that_runs(tmp_path, monkeypatch, caplog):
    """As it stands, in at most 15 lines; the first page has the same script, and what it prints."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="anybatch")
    script = blocks(ROOT / "README.md", "python")[0]
    assert len(script.splitlines()) <= 15
    start = ROOT / "docs/index.md"
    assert blocks(start, "python") == [script]
    names: dict[str, Any] = {}
    exec(script, names)
    assert names["trainer"].state.global_step == 2
    assert (tmp_path / "out/model/model.safetensors").exists()
    assert " ".join(blocks(start, "text")[0].split()) in caplog.messages
