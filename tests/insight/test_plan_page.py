"""The page of a plan: whole, alone, escaped, and saying what it does not know."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from anybatch.data.pairs import PairData
from anybatch.insight import plan_sizes, render_plan_page, set_figures
from anybatch.insight.inspection import inspect_plan
from anybatch.mining import MiningConfig, mine_plan
from anybatch.plans.plan import BatchPlan
from tests.mining.test_mining import embeddings

from .test_report import Checker

EVIL = "<script>alert('x')</script> & \"quoted\""


@pytest.fixture(scope="module")
def mined():
    anchors, positives = embeddings(130)
    result = mine_plan(
        anchors,
        positives,
        config=MiningConfig(batch_size=16, cluster_size=8, window=(3, 12), conflict_weight=0.0),
        data_digest="d",
    )
    pairs = PairData(
        anchors=[f"anchor {row} {EVIL}" for row in range(130)],
        positives=[f"positive {row} {EVIL} {'long ' * 100}" for row in range(130)],
    )
    seen = inspect_plan(result.plan, anchors, positives)[""]
    return result.plan, pairs, seen, json.loads(json.dumps(result.report.as_dict()))


def check(page):
    checker = Checker()
    checker.feed(page)
    assert checker.stack == []
    assert checker.scripts == 0
    assert checker.external == []
    # The name of SVG's own vocabulary is no address that is fetched; nothing else may look like one.
    assert re.findall(r"https?://|//\w|@import|url\(", page.replace("http://www.w3.org/2000/svg", "")) == []


def test_whole_page_is_escaped_and_stands_alone(mined):
    plan, pairs, seen, stored = mined
    assert len(seen.suspects) > 0
    page = render_plan_page(plan, title=f"Plan {EVIL}", pairs=pairs, inspections={"": seen}, mining=stored)
    check(page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page
    for heading in ("Warnings", "Figures", "Suspected false negatives", "Hubs", "Example clusters", "What mining cost"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg") == 1 + 4 + 2  # histogram; three clusters and random rows; seconds and memory
    assert "Not shown" not in page
    suspect = seen.suspects[0]
    assert f"row {suspect.row}</span> anchor {suspect.row} &lt;script" in page
    hub, count = stored["hubs"][0]
    assert re.search(rf"<td>{count}</td><td class=\"text\">\s*<span class=\"soft\">row {hub}<", page)
    assert "long " * 50 not in page  # texts are cut


def test_warnings_come_first(mined):
    plan, pairs, _, stored = mined
    anchors, positives = embeddings(130)
    bad = inspect_plan(plan, anchors, positives[::-1].copy())[""]
    assert bad.statistics.warnings
    page = render_plan_page(plan, title="Plan", pairs=pairs, inspections={"": bad}, mining=stored)
    check(page)
    assert page.count('<p class="warning">') == len(bad.statistics.warnings)
    assert page.index(bad.statistics.warnings[0].split("%")[0].split(" for ")[0]) < page.index("<h2>Figures</h2>")


def test_without_embeddings_and_texts(mined):
    plan, _, _, stored = mined
    page = render_plan_page(plan, title="Plan", mining=stored, missing=["Texts: give --data & more."])
    check(page)
    assert "<li>Texts: give --data &amp; more.</li>" in page
    assert "Example clusters" not in page
    first, second = plan.suspects[0]
    assert f"row {first}<" in page
    assert f"row {second}<" in page
    bare = render_plan_page(plan, title="Plan")
    check(bare)
    assert "Not known: whether this plan is likely to help" in bare


def test_random_plan():
    anchors, positives = embeddings(60)
    plan = BatchPlan.random(60, 8)
    page = render_plan_page(plan, title="Plan", inspections=inspect_plan(plan, anchors, positives))
    check(page)
    assert "nothing was chosen" in page
    assert "wanted negatives in the cluster" not in page


def test_figures_say_what_was_measured(mined):
    plan, _, seen, stored = mined

    def known(inspection):
        return [*plan_sizes(plan), *set_figures(plan, inspection=inspection, stored=stored)]

    shown = {figure.name: figure for figure in known(seen)}
    assert shown["wanted negatives in the batch"].plan == f"{seen.window_in_batch:.2f}"
    assert shown["wanted negatives in the batch"].random == f"{seen.random_window_in_batch:.2f}"
    loss = shown["expected loss at temperature 0.05"]
    assert (loss.plan, loss.random) == (f"{seen.planned.loss:.3f}", f"{seen.random.loss:.3f}")
    assert f"{np.log(16):.2f} (guessing)" in loss.good
    assert shown["suspect pairs"].plan == str(len(plan.suspects))
    assert shown["kept weight"].plan == f"{stored['audit']['kept_weight']:.1%}"
    assert shown["conflicts in the cluster"].plan == f"{seen.statistics.suspects_per_anchor:.2f}"
    assert all(figure.meaning for figure in shown.values())
    from_mining = {figure.name: figure.plan for figure in known(None)}
    assert from_mining["conflicts in the cluster"] == shown["conflicts in the cluster"].plan
