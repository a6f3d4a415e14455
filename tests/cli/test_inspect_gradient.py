"""`anybatch inspect gradient`: the table, and what it needs."""

from __future__ import annotations

import re
import shutil

import pytest

from anybatch.core.errors import AnybatchError

from .test_cli import run
from .test_inspect_plan import mined  # noqa: F401 - a fixture


def test_a_run_folder(mined, heard):  # noqa: F811
    run("inspect", "gradient", str(mined))
    said = heard()
    for line in (
        "error of an epoch: infonce, mask_suspects=True on plan batches",
        "direction: infonce",
        "0.95 or more",
    ):
        assert line in said
    assert "error of an epoch: infonce, mask_suspects=True on random" not in said
    assert re.search(r"Small batches (hardly )?change what plain InfoNCE learns here: the mean gradient", said)
    assert "Not taken into account" not in said


def test_a_plan_alone(mined, tmp_path, heard):  # noqa: F811
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(mined / "plan.safetensors", alone)
    with pytest.raises(AnybatchError, match="--embeddings ANCHORS"):
        run("inspect", "gradient", str(alone))
    run("inspect", "gradient", str(alone), "--embeddings", str(tmp_path / "a.npy"), str(tmp_path / "p.npy"))
    assert "Not taken into account: Repeated texts" in heard()


def test_the_direction_is_the_runs(mined, heard):  # noqa: F811
    config = (mined / "config.yaml").read_text(encoding="utf-8")
    changed, number = re.subn(r"\bdirection: \w+", "direction: both", config)
    assert number == 1
    (mined / "config.yaml").write_text(changed, encoding="utf-8")
    run("inspect", "gradient", str(mined))
    assert "over all data, both directions" in heard()
    (mined / "config.yaml").write_text(config.replace("hardness: 0.0", "hardness: 1.0"), encoding="utf-8")
    run("inspect", "gradient", str(mined))
    assert "Not taken into account: loss.hardness" in heard()
