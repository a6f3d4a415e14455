"""The pages in a real browser, at three widths, in light, dark and print: nothing sticks out, is cut, or is faint."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from anybatch.data.images import ImageColumn
from anybatch.data.pairs import PairData
from anybatch.insight.demo_page import render_demo_page
from anybatch.insight.gradient_error import FrozenPairs
from anybatch.insight.gradient_methods import compare_methods, gradient_figures
from anybatch.insight.plan_figures import set_figures
from anybatch.insight.plan_page import render_plan_page
from anybatch.losses.registry import LossConfig
from anybatch.mining.inspection import inspect_plan
from tests.browser import CHROMIUM, PRINTED, WIDTHS, look
from tests.images import caption, image
from tests.mining.test_mining import embeddings

from .test_gradient_error import clusters
from .test_report import CURVES

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


def pages(folder):
    """All pages, with texts that no line break helps, and with images in `folder`."""
    anchors, positives = embeddings(120, width=32)
    positives[1] = positives[16]
    meta = {"method": "anybatch", "windows": {"a" * 70: [5, 32]}, "inputs": {"the settings": "0123456789abcdef" * 4}}
    plan = clusters(120, 8, 16, suspects=np.array([[0, 15], [1, 16], [16, 1]], np.int32), meta=meta)
    texts = [f"What is {row}? " + "word " * (row % 60) + "x" * (row % 90) for row in range(120)]
    pairs = PairData(anchors=texts, positives=[f"{text} & more" for text in texts])
    seen = inspect_plan(plan, anchors, positives)[""]
    methods = [LossConfig(name="infonce"), LossConfig(name="count_corrected", weights="inclusion")]
    comparison = compare_methods(FrozenPairs.prepare(anchors, positives), plan, methods=methods, num_batches=16)
    figures = set_figures(seen, plan)
    for line in comparison.lines:
        figures += gradient_figures(line.method, line.error, "random batches", comparison.plain)
    figures += [replace(figure, passed=passed) for figure, passed in zip(figures, (True, False, None))]
    memory = {
        "without caching": SimpleNamespace(train_peak_bytes=3 * 2**30, train_seconds=8),
        "with caching": SimpleNamespace(train_peak_bytes=2**30, train_seconds=11),
    }
    for row in range(120):
        (folder / f"{row}.png").write_bytes(image(row))
    images = ImageColumn.of_paths([f"{row}.png" for row in range(120)], folder, "'image' of pairs.csv")
    of_images = PairData(anchors=images, positives=[caption(row) for row in range(120)])
    title = f"Plan /a/{'long/' * 20}plan.safetensors"
    return {
        "demo": render_demo_page(CURVES, intro=["One " * 80], memory=memory, plan=plan, seen=seen, pairs=pairs),
        "plan": render_plan_page(
            plan, title=title, tables={"Figures": figures}, warnings=["Look twice."],
            inspections={"": seen}, pairs=pairs, missing=["Texts: give --data."],
        ),
        "images": render_plan_page(
            plan, title="Plan of images", tables={}, warnings=[], inspections={"": seen}, pairs=of_images
        ),
    }  # fmt: skip


def test_pages_in_a_browser(tmp_path):
    made = pages(tmp_path)
    assert made["images"].count("<img") == 2
    report = look(made, tmp_path)
    ways = [f"{width} {way}" for width in WIDTHS for way in ("light", "dark")] + [f"{PRINTED} print"]
    assert set(report) == {f"{name} {way}" for name in made for way in ways}
    for place, seen in report.items():
        assert seen["found"] == [], place
        assert (sum(seen["ground"]) < 200) == place.endswith("dark"), place  # the colours are those of the scheme
        assert seen["height"] >= 800, place


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("<p style='width:2000px'>wide</p>", "wide in"),
        ("<p style='width:20px;overflow:hidden;white-space:nowrap'>a text that is cut</p>", "cut: P"),
        ("<p style='color:#999'>hardly seen</p>", "faint: P"),
        ("<svg viewBox='0 0 99 99' width='99'><text x='90' y='50'>out of it</text></svg>", "out of its frame"),
        ("<svg viewBox='0 0 99 99' width='99'><text y='50'>one</text><text y='52'>two</text></svg>", "over another"),
    ],
)
def test_what_is_wrong_is_found(tmp_path, fault, words):
    page = f"<!doctype html><body style='background:#fff;margin:0'>{fault}</body>"
    report = look({"bad": page}, tmp_path)
    assert any(words in line for line in report["bad 400 light"]["found"])
