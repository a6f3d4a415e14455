from __future__ import annotations

from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from anybatch.data.pairs import PairData
from anybatch.insight import Curves, markdown_table
from anybatch.insight.charts import METHODS, as_file, bar_chart, colour_of, error_chart
from anybatch.insight.curves import NOISE
from anybatch.insight.demo_page import BASELINE, METHOD, quality_chart, render_demo_page
from anybatch.mining.inspection import inspect_plan
from anybatch.plans.plan import BatchPlan

# Means .30 and .40 of the baseline, .42 and .405 of the method; standard deviation .01 everywhere, so an error of
# .01 / sqrt(3), and noise up to 2 sqrt(2) of it, .0163.
SPREAD = (-0.01, 0.0, 0.01)
CURVES = Curves(
    figures={
        name: {size: [mean + step for step in SPREAD] for size, mean in means.items()}
        for name, means in {BASELINE: {16: 0.30, 64: 0.40}, METHOD: {16: 0.42, 64: 0.405}}.items()
    }
)


class Checker(HTMLParser):
    """Every element that is opened is closed, in order; collects what is loaded from outside."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self):
        super().__init__()
        self.stack, self.external, self.scripts = [], [], 0

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):
            self.stack.append(tag)
        self.scripts += tag == "script"
        self.external += [value for name, value in attributes if name in ("src", "href")]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def check_page(page):
    """It is whole and stands alone."""
    checker = Checker()
    checker.feed(page)
    assert (checker.stack, checker.external, checker.scripts) == ([], [], 0)


def test_what_is_within_noise_is_no_gain():
    assert CURVES.error == pytest.approx(0.01 / 3**0.5)
    assert CURVES.verdict((METHOD, 16), (BASELINE, 16)) == "+.120"
    assert CURVES.verdict((BASELINE, 16), (METHOD, 16)) == "-.120"
    assert CURVES.verdict((METHOD, 64), (BASELINE, 64)) == NOISE
    header, lines = CURVES.rows(METHOD, BASELINE)
    assert header == ["batch size", BASELINE, METHOD, "difference"]
    assert lines == [
        ["16", ".300 ± .006", ".420 ± .006", "+.120"],
        ["64", ".400 ± .006", ".405 ± .006", NOISE],
    ]
    assert CURVES.sentences(METHOD, BASELINE) == [
        "InfoNCE: .100 lower in batches of 16 than in batches of 64.",
        "recommended: batches of 16 and 64 differ within noise.",
        "recommended is above InfoNCE at batches of 16 (+.120).",
        "recommended and InfoNCE differ within noise at batches of 64.",
    ]


@pytest.mark.parametrize("errors", [1.99, 2.01])
def test_noise_ends_at_two_standard_errors_of_the_difference(errors):
    difference = errors * 2**0.5 * CURVES.error
    figures = {name: {16: [mean + step for step in SPREAD]} for name, mean in (("a", 0.3), ("b", 0.3 + difference))}
    verdict = Curves(figures=figures).verdict(("b", 16), ("a", 16))
    assert (verdict == NOISE) == (errors < 2)


def test_the_page_of_the_demo():
    texts = [f"<script>text {row}</script>" for row in range(16)]
    pairs = PairData(anchors=texts, positives=[f"{text} & more" for text in texts])
    plan = BatchPlan(
        num_rows=16, batch_size=8, cluster_size=4, cluster=np.repeat(np.arange(4), 4).astype(np.int32), seed=0,
        data_digest="", suspects=np.array([[0, 1], [0, 2], [5, 4]], np.int32),
    )  # fmt: skip
    seen = inspect_plan(plan, *np.random.default_rng(0).normal(size=(2, 16, 8)))[""]
    memory = {
        "without caching": SimpleNamespace(train_peak_bytes=3 * 2**30, train_seconds=8),
        "with caching": SimpleNamespace(train_peak_bytes=2**30, train_seconds=11),
    }
    page = render_demo_page(CURVES, intro=["One & two"], memory=memory, plan=plan, seen=seen, pairs=pairs)
    check_page(page)
    assert page.count("<svg") == 2
    assert "<script>" not in page
    for text in (
        "One &amp; two",
        "8 seconds without caching and",
        "11 seconds with caching.",
        *CURVES.sentences(METHOD, BASELINE),
    ):
        assert text in page
    assert page.index("Suspected false negatives") < page.index("sit together in mined batches")


def test_a_chart_with_error_bars():
    chart = error_chart("A & b", "x", "y", CURVES.means, error=CURVES.error)
    drawing = ElementTree.fromstring(chart)
    kinds = [element.tag.rpartition("}")[2] for element in drawing.iter()]
    assert (kinds.count("polyline"), kinds.count("path")) == (2, 4)
    words = [element.text for element in drawing.iter() if element.tag.endswith("text")]
    assert {"16", "64", BASELINE, METHOD, "x", "y"} <= set(words)
    _, _, width, height = map(float, drawing.attrib["viewBox"].split())
    for element in drawing.iter():
        for name, most in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            assert 0 <= float(element.get(name, 0)) <= most


def test_a_chart_that_stands_alone():
    chart = as_file(quality_chart(CURVES))
    ElementTree.fromstring(chart)
    assert "prefers-color-scheme:dark" in chart
    assert "recommended: batches of 16 and 64 differ within noise." in chart  # for screen readers


def test_one_colour_a_method_throughout():
    assert len({colour_of(method) for method in METHODS}) == len(METHODS)
    assert colour_of("infonce") == colour_of("InfoNCE")
    assert colour_of("cross_batch, weights=inclusion") == colour_of("cross-batch")
    bars = bar_chart("Errors", [("infonce (plan)", "infonce", 1.0), ("infonce (random)", "infonce", 2.0)])
    assert bars.count(colour_of("infonce")) == 2


def test_markdown():
    assert markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n"
