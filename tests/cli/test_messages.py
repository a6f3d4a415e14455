"""What the library says is printed by the command line: warnings and information, each once, in one line."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest

from anybatch.cli import progress


@pytest.fixture
def printed(monkeypatch, capsys):
    """A logger with our handler; and what it printed."""
    logger = logging.Logger("anybatch-test")
    logger.addHandler(progress.Messages())
    return logger, lambda: capsys.readouterr().err.splitlines()


def test_each_message_once_and_unbroken(printed):
    logger, lines = printed
    for _ in range(2):
        logger.info("columns [a] and %s", "b" * 300)
        logger.warning("a doubt")
        logger.debug("nothing")
    assert lines() == ["columns [a] and " + "b" * 300, "a doubt"]


def test_only_the_first_rank_informs(printed, monkeypatch):
    logger, lines = printed
    monkeypatch.setenv("RANK", "1")
    logger.info("columns")
    logger.warning("a doubt")
    assert lines() == ["a doubt"]


def test_a_verb_says_columns_and_prompts(tiny_model_folder, tmp_path):
    rows = [{"query": f"mata {n}", "pos": f"nodis {n}", "neg": "grao", "id": n} for n in range(4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", str(tiny_model_folder), "--data", str(tmp_path / "p.jsonl"), "--anchor-prompt", "sofa "]
    environment = {**os.environ, "COLUMNS": "60"}
    done = subprocess.run([sys.executable, "-m", "anybatch", *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "p.jsonl: 4 pairs; anchor 'query', positive 'pos', no negatives; not used: 'neg', 'id'." in done.stderr
    assert "reads queries with the prompt 'sofa ' (given); documents without a prompt." in done.stderr
