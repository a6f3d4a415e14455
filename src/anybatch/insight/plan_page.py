"""The page of `anybatch inspect plan`: one HTML file that explains itself and needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from anybatch.data.images import EncodedImage
from anybatch.data.inputs import MixedInput, describe
from anybatch.insight.pages import render
from anybatch.insight.plan_figures import plan_sentence
from anybatch.mining.inspection import PlanInspection

if TYPE_CHECKING:
    from anybatch.data.pairs import PairData
    from anybatch.insight.tables import Figure
    from anybatch.plans.plan import BatchPlan

TEXT_LENGTH = 220  # characters of a text that are shown
UNSCORED = 20  # suspected pairs shown where there are no scores to order them
IMAGE_CHARACTERS = 2**21  # of all thumbnails of a page; further images are named, not shown
HEADER = ("cosine", "anchor", "its own positive", "positive of another row")


def render_plan_page(
    plan: BatchPlan,
    *,
    title: str,
    tables: Mapping[str, Sequence[Figure]],
    warnings: Sequence[str],
    inspections: Mapping[str, PlanInspection],
    pairs: PairData | None = None,
    missing: Sequence[str] = (),
) -> str:
    """The page as text.

    Args:
        plan: The plan.
        title: Heading, such as its path.
        tables: Figures by the heading they stand under.
        warnings: In words.
        inspections: What `inspect_plan` measured, by data set; without, the pairs that mining suspects are listed.
        pairs: The data, for its texts and images; None shows row numbers.
        missing: What could not be shown and which option gives it, in words.

    All texts are escaped. Images are shown small, re-encoded, `IMAGE_CHARACTERS` in all at most.
    """
    texts = Texts(pairs)
    suspects = {name: suspect_lines(seen, texts) for name, seen in inspections.items()}
    if not inspections and plan.suspects is not None:
        suspects[""] = [("", *texts.cells(row, other)) for row, other in plan.suspects[:UNSCORED].tolist()]
    return render(
        "plan.html",
        title=title,
        plan=plan,
        summary=plan_sentence(plan),
        settings={name: value for name, value in plan.meta.items() if name != "inputs"},  # digests tell nobody anything
        warnings=warnings,
        missing=missing,
        tables=tables,
        header=HEADER,
        suspects={name: lines for name, lines in suspects.items() if lines},
        looked=bool(inspections) or plan.suspects is not None,
    )


def suspect_lines(seen: PlanInspection, texts: Texts, number: int | None = None) -> list[tuple[str | Markup, ...]]:
    """The nearest suspected false negatives: both cosines, and the texts."""
    return [
        (f"{pair.own:.2f},\N{NO-BREAK SPACE}{pair.score:.2f}", *texts.cells(pair.row, pair.other))
        for pair in seen.suspects[:number]
    ]


class Texts:
    """Rows with their texts, cut to a readable length, or thumbnails of images; without data, row numbers alone."""

    def __init__(self, pairs: PairData | None) -> None:
        self.pairs = pairs
        self.left = IMAGE_CHARACTERS

    def cells(self, row: int, other: int) -> list[str | Markup]:
        """The anchor and the positive of `row`, the positive of `other`."""
        sides = [("anchors", row), ("positives", row), ("positives", other)]
        values = ["" if self.pairs is None else getattr(self.pairs, side)[place] for side, place in sides]
        return [Markup("row {}: {}").format(place, self._shown(v, place)) for v, (_, place) in zip(values, sides)]

    def _shown(self, value: str | EncodedImage | MixedInput, row: int) -> str | Markup:
        if isinstance(value, str):
            return value if len(value) <= TEXT_LENGTH else value[:TEXT_LENGTH].rstrip() + " …"
        if isinstance(value, MixedInput):
            parts = [*value.images, *(() if value.text is None else (value.text,))]
            return Markup(" ").join(self._shown(part, row) for part in parts)
        name, thumbnail = describe(value, row), value.thumbnail() if self.left > 0 else None
        if thumbnail is None:
            return name
        self.left -= len(thumbnail)
        return Markup('<img src="{}" alt="{}" title="{}">').format(thumbnail, name, name)
