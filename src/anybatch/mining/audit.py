"""What figures of a plan advise against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

WEAK_TEACHER = 0.4  # own positives first: midway between MiniLM, .70, and LSA of 128 dimensions, .21, on 10,000 pairs
MUCH_MASKED = 1 / 3  # .24 to .49 on the study's text tasks
MANY_SUSPECTS = 1.0  # an anchor: .01 to .3 in the study (docs/log.md), 1.3 in the published recipe
LITTLE_GAIN = 3.0  # over random batches: 1.6 to 10.4 on the study's text tasks in batches of 64


class Mark(NamedTuple):
    """A figure of a plan, what is good, and what it advises against where it is not."""

    name: str
    value: str
    good: str
    passed: bool
    advice: str


def marks(figures: Mapping[str, float], *, mask_suspects: bool = False) -> list[Mark]:
    """The figures that decide whether mined batches help, beside their pass marks; that of the teacher is first.

    A mined batch trusts the teacher twice: that what it ranks high is hard, and that what it ranks just below the top
    is not also right. The limits are rules of thumb: in a later study (docs/log.md) batches of a weak teacher trained
    no worse than those of a good one. So a warning is a question to look into, not a verdict.

    Args:
        figures: See `PlanInspection.figures`.
        mask_suspects: Whether the loss is known to mask them.
    """
    own_first, suspects, masked, gain = (figures[name] for name in ("own_first", "suspects", "masked", "gain"))
    masks = "" if mask_suspects else ", or set loss.mask_suspects"
    return [
        Mark(
            *("own positive first", f"{own_first:.1%}", f"{WEAK_TEACHER:.0%} or more", own_first >= WEAK_TEACHER),
            f"The teacher finds the own positive first for only {own_first:.1%} of the anchors (good: "
            f"{WEAK_TEACHER:.0%} or more; it falls as data grow). What it takes for hard may be easy, or right. Use a "
            "better teacher, or random batches.",
        ),
        Mark(
            *("softmax mass in the batch", f"{gain:.1f} times random", f"{LITTLE_GAIN:g} times random or more"),
            gain >= LITTLE_GAIN,
            f"The batches hold {gain:.1f} times the softmax mass that random ones hold (good: {LITTLE_GAIN:g} or "
            "more): mining changes little here. Save the time and use mining.method=random.",
        ),
        Mark(
            *("softmax mass masked", f"{masked:.1%}", f"{MUCH_MASKED:.0%} or less", masked <= MUCH_MASKED),
            f"The teacher suspects negatives that hold {masked:.1%} of the softmax mass (good: {MUCH_MASKED:.0%} or "
            "less) of being right; with loss.mask_suspects the model never learns to tell them apart. Compare with "
            "mining.method=random, or use a better teacher.",
        ),
        Mark(
            *("suspected false negatives per anchor", f"{suspects:.2f}", f"{MANY_SUSPECTS:g} or less"),
            suspects <= MANY_SUSPECTS,
            f"{suspects:.2f} suspected false negatives are in an anchor's batch (good: {MANY_SUSPECTS:g} or less). "
            f"Read some of them (anybatch inspect plan); raise mining.conflict_weight{masks}.",
        ),
    ]


def advice(figures: Mapping[str, float], *, mined: bool = True, mask_suspects: bool = False) -> list[str]:
    """What figures of a plan advise against, in words; of random batches, which chose nothing, the teacher alone."""
    judged = marks(figures, mask_suspects=mask_suspects)
    return [mark.advice for mark in (judged if mined else judged[:1]) if not mark.passed]
