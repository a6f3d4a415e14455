"""`anybatch inspect gradient`: the table, the page, and what it needs."""

from __future__ import annotations

import re
import shutil

import pytest

from anybatch.core.errors import AnybatchError

from .test_cli import run
from .test_inspect_plan import mined  # noqa: F401 - a fixture


def test_a_run_folder(mined, tmp_path, heard):  # noqa: F811
    page = tmp_path / "gradient.html"
    run("inspect", "gradient", str(mined), "--html", str(page))
    said = heard()
    assert "count_corrected, weights=inclusion" in said
    assert re.search(r"There is (little )?bias to remove: the mean gradient of plain InfoNCE on random", said)
    assert re.search(r"Nearest to the gradient over all 97 rows: loss\.name=\w+", said)
    assert "Not taken into account" not in said
    text = page.read_text(encoding="utf-8")
    assert "count_corrected, weights=inclusion" in text
    assert "temperature 0.2" in text
    assert not re.search(r"(src|href)=", text)
    with pytest.raises(AnybatchError, match=r"gradient\.html exists"):
        run("inspect", "gradient", str(mined), "--html", str(page))


def test_a_plan_alone(mined, tmp_path, heard):  # noqa: F811
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(mined / "plan.safetensors", alone)
    with pytest.raises(AnybatchError, match="--embeddings ANCHORS"):
        run("inspect", "gradient", str(alone))
    files = [str(tmp_path / "a.npy"), str(tmp_path / "p.npy")]
    run("inspect", "gradient", str(alone), "--direction", "both", "--embeddings", *files)
    assert "over all data, both directions" in heard()
    assert "Not taken into account: Repeated texts" in heard()


def test_the_direction_is_the_runs(mined, tmp_path, heard):  # noqa: F811
    """By default that of the run's configuration, which the page says."""
    config = (mined / "config.yaml").read_text(encoding="utf-8")
    changed, number = re.subn(r"\bdirection: \w+", "direction: both", config)
    assert number == 1
    (mined / "config.yaml").write_text(changed, encoding="utf-8")
    page = tmp_path / "gradient.html"
    run("inspect", "gradient", str(mined), "--html", str(page))
    assert "over all data, both directions" in heard()
    assert "the loss in both directions" in " ".join(page.read_text(encoding="utf-8").split())
    with pytest.raises(AnybatchError, match="expected one_way or both"):
        run("inspect", "gradient", str(mined), "--direction", "two_way")
