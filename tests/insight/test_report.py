from __future__ import annotations

from html.parser import HTMLParser

import pytest
from rich.console import Console

from anybatch.insight import MethodResult, Report, comparison_table, markdown_table, render_report

FIGURES = {"recall@1": 0.5, "recall@10": 0.8, "mrr@10": 0.6, "ndcg@10": 0.65}


def result(name, ndcg, seconds, **more):
    return MethodResult(
        name=name,
        description=f"what {name} is",
        metrics={**FIGURES, "ndcg@10": ndcg},
        seconds=seconds,
        peak_bytes=2**30,
        **more,
    )


RESULTS = [
    result("untrained", 0.3, None),
    result("base", 0.65, 10.0, loss=[(0, 3.0), (100, 1.0)]),
    result("<b>better</b> & slower", 0.70, 20.0),
    result("worse", 0.60, 10.5),
]


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


def test_page_is_whole_and_stands_alone():
    report = Report(
        title="A <script>alert(1)</script> title",
        intro=["One & two"],
        results=RESULTS,
        baseline="base",
        sections={"Configuration": {"loss.name": "infonce <i>"}},
        examples={"Clusters": [["first <script>text</script>", "second"], ["third"]]},
    )
    page = render_report(report)
    checker = Checker()
    checker.feed(page)
    assert checker.stack == []
    assert checker.external == []
    assert checker.scripts == 0
    assert page.count("<svg") == 3
    assert "&lt;script&gt;alert(1)" in page
    assert "+0.0500 better" in page
    assert "-0.0500 worse" in page
    assert "20 (slower)" in page
    assert "10 (slower)" not in page


def test_page_without_results():
    page = render_report(Report(title="Plan", sections={"Mining": {"window": 3}}))
    assert "<svg" not in page
    assert "<h2>Mining</h2>" in page


def test_terminal_table_says_worse_in_words():
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(comparison_table(RESULTS, "base"))
    text = console.export_text()
    assert "-0.0500 worse" in text
    assert "baseline" in text


def test_markdown():
    assert markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n"
    with pytest.raises(StopIteration):
        comparison_table(RESULTS, "absent")
