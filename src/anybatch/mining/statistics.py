"""Batch statistics under the teacher: will mining help? Known before training, with warnings where it is likely to
hurt.

A mined batch trusts the teacher twice: that what it ranks high is hard, and that what it ranks just below the top is
not also right. A teacher that cannot find the row's own positive can vouch for neither.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from anybatch.mining.audit import Beside, together_by_chance
from anybatch.mining.graph import Window
from anybatch.mining.neighbors import Neighbors

TEMPERATURE = 0.05  # of the softmax mass, as that of `inspect_plan`
NEAR = 0.95  # NV-Retriever's margin: above this share of the own positive's score a negative is suspected


@dataclass(frozen=True, kw_only=True)
class StatisticsLimits:
    """Where a figure of `batch_statistics` becomes a warning: every threshold, in this one place.

    The first three lie about midway (geometrically) between two teachers measured on 10,000 pairs of
    arxiv-title-abstract, windows (skip 30, take 64) and (5, 40): MiniLM, with which mining helped a pretrained student
    (`own_first` .70, `own_behind_skip` .07 and .15, `negatives_above_own` .05 and .08), and LSA of 128 dimensions, a
    teacher of the kind with which mining hurt a student from scratch (.21; .41 and .61; .35 and .43). Two points make a
    rule of thumb, and a later study (docs/log.md) did not confirm it: a weak teacher's batches trained no worse than
    a good one's. So a warning is a question to look into, not a verdict.

    Attributes:
        own_first: Least `own_first`. A teacher that misses most own positives knows topics, not pairs. It falls as the
            data grow: of a million rows some are better than any positive.
        own_behind_skip: Most `own_behind_skip`. Such anchors' wanted negatives begin above their positive.
        negatives_above_own: Most `negatives_above_own`: what the teacher itself holds to be better answers.
        suspects_per_anchor: Most `suspects_per_anchor`. At the default conflict weight .1 to .4 were measured; 1.3 in
            the published recipe.
        masked: Most `masked`. On made pairs a teacher that knows them has .06 and less, one that does not .5 to .8.
        isolated: Most `isolated`. Rows with nothing they want beside them train as in random batches; .05 was measured
            with a union of windows; mutual edges leave .38 of the rows without an edge.
        window_gain: Least `window_gain`. 20 to 60 were measured; below 3 the batches are hardly harder than random
            ones.

    Example:
        >>> replace(LIMITS, own_first=0.3).own_first  # for a million rows
        0.3
    """

    own_first: float = 0.4
    own_behind_skip: float = 0.25
    negatives_above_own: float = 0.15
    suspects_per_anchor: float = 1.0
    masked: float = 1 / 3
    isolated: float = 0.25
    window_gain: float = 3.0


LIMITS = StatisticsLimits()


@dataclass(frozen=True, kw_only=True)
class BatchStatistics:
    """Figures known before training. Shares are 0 to 1; "negatives" are the wanted ones in the anchor's own cluster.

    Attributes:
        num_anchors: Anchors looked at.
        own_first: Share of anchors whose own positive the teacher scores above every other row's: its recall@1.
        own_behind_skip: Share of anchors with more than `skip` rows scored above the own positive, so that their rank
            window begins above it.
        window_per_anchor: Negatives an anchor.
        window_gain: The same over what random clusters of this size would hold.
        suspects_per_anchor: Suspected false negatives in the anchor's own cluster.
        masked: Share of the softmax mass (temperature .05) of an anchor's ranked texts that the margin suspects, of any
            cluster.
        negatives_above_own: Share of negatives that the teacher scores above the own positive.
        negatives_near_own: Share above `NEAR` times the own positive's score.
        relative_score: Mean score of the negatives over the mean score of the positives that they stand against.
        isolated: Share of anchors without a single wanted negative.
        warnings: What is likely to hurt, in words, worst first; empty where nothing is.

    Example:
        >>> from anybatch.mining import MiningConfig, mine_plan
        >>> vectors = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
        >>> config = MiningConfig(batch_size=16, cluster_size=8)
        >>> mine_plan(vectors, vectors, config=config).report.statistics.num_anchors
        64
    """

    num_anchors: int
    own_first: float
    own_behind_skip: float
    window_per_anchor: float
    window_gain: float
    suspects_per_anchor: float
    masked: float
    negatives_above_own: float
    negatives_near_own: float
    relative_score: float
    isolated: float
    warnings: tuple[str, ...] = ()


def batch_statistics(
    neighbors: Neighbors,
    cluster: np.ndarray,
    window: Window,
    *,
    text: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    limits: StatisticsLimits = LIMITS,
    block_rows: int = 65536,
) -> BatchStatistics:
    """Measure what the teacher and the clusters promise, and warn.

    Args:
        neighbors: The teacher's ranking of `rows`, at least as deep as the window.
        cluster: (n,) int, each row's cluster; -1 for none.
        window: Which ranks are wanted, which suspected.
        text: (n,) int, of each row the row that was ranked for its text (`first_rows`); None: each row itself.
        rows: (r,) the anchors that `neighbors` ranks; None if all rows.
        limits: Where figures become warnings.
        block_rows: Anchors looked at at once: some 60 MB at the default window.

    Returns:
        The figures, averaged over the anchors looked at.

    Cost: r * depth comparisons, a block of rows at a time; no scores are computed.
    """
    rows = np.arange(len(cluster)) if rows is None else rows
    beside = Beside(cluster, np.arange(len(cluster)) if text is None else text)
    count: Counter[str] = Counter()
    for start in range(0, len(rows), block_rows):
        part = slice(start, start + block_rows)
        block = replace(
            neighbors,
            ids=neighbors.ids[part, : window.depth],
            scores=neighbors.scores[part, : window.depth],
            own_score=neighbors.own_score[part],
        )
        count.update(_counts(block, beside, cluster[rows[part]], window))
    num_anchors, negatives = len(rows), max(1, count["negatives"])
    by_chance = together_by_chance(cluster)
    expected = count["wanted"] * by_chance
    figures = {
        "own_first": count["own_first"] / num_anchors,
        "own_behind_skip": count["own_behind_skip"] / num_anchors,
        "window_per_anchor": count["negatives"] / num_anchors,
        "window_gain": count["negatives"] / expected if expected else 0.0,
        "suspects_per_anchor": count["suspects"] / num_anchors,
        "masked": count["masked"] / num_anchors,
        "negatives_above_own": count["above_own"] / negatives,
        "negatives_near_own": count["near_own"] / negatives,
        # A ratio of means: the mean of ratios is ruled by the few anchors whose own score is nearly 0.
        "relative_score": count["score"] / count["against"] if count["against"] else 0.0,
        "isolated": count["isolated"] / num_anchors,
    }
    warnings = tuple(_warnings(figures, bool(by_chance), window, limits))
    return BatchStatistics(num_anchors=num_anchors, **figures, warnings=warnings)


def _counts(neighbors: Neighbors, beside: Beside, home: np.ndarray, window: Window) -> dict[str, Any]:
    """Numbers and sums over some anchors, whose clusters are `home`."""
    ids, scores, own = neighbors.ids, neighbors.scores, neighbors.own_score[:, None]
    wanted, suspected = window.cut(neighbors)
    _, by_margin = replace(window, skip=0, take=window.depth).cut(neighbors)
    mass = np.exp((scores - np.maximum(scores[:, :1], -np.finfo(np.float32).max)) / TEMPERATURE)
    mass *= beside.rows_of_text[ids]
    inside = beside.count(home[:, None], ids)
    above = (ids >= 0) & (scores > own)
    negatives = wanted * inside
    near = np.where(own > 0, scores > NEAR * own, above)
    return {
        "wanted": int((wanted * beside.rows_of_text[ids]).sum()),
        "negatives": int(negatives.sum()),
        "suspects": int((suspected * inside).sum()),
        "masked": float(((mass * by_margin).sum(axis=1) / np.maximum(mass.sum(axis=1), 1e-30)).sum()),
        "own_first": int((~above.any(axis=1)).sum()),
        "own_behind_skip": int((above.sum(axis=1) > window.skip).sum()),
        "above_own": int((negatives * above).sum()),
        "near_own": int((negatives * near).sum()),
        "score": float(np.sum(negatives * np.where(negatives > 0, scores, 0), dtype=np.float64)),
        "against": float((own[:, 0] * negatives.sum(axis=1)).sum(dtype=np.float64)),
        "isolated": int((~negatives.any(axis=1)).sum()),
    }


def _warnings(figures: dict[str, float], clustered: bool, window: Window, limits: StatisticsLimits) -> list[str]:
    found = []
    if figures["own_first"] < limits.own_first:
        found.append(
            f"The teacher finds the own positive first for only {figures['own_first']:.1%} of the anchors (good: "
            f"{limits.own_first:.0%} or more). A teacher that does not know the pairs cannot tell hard negatives from "
            "right answers. Use a better teacher, or random batches with count-corrected InfoNCE."
        )
    # With a margin what is above the own positive is suspected, not wanted.
    if window.margin is None and figures["own_behind_skip"] > limits.own_behind_skip:
        found.append(
            f"For {figures['own_behind_skip']:.1%} of the anchors the teacher ranks the own positive behind the "
            f"{window.skip} skipped rows (good: {limits.own_behind_skip:.0%} or less): their wanted negatives begin "
            "above it. Raise p of mining.window [p, m], set mining.margin to 0.95, or use a better teacher."
        )
    if not clustered:
        return found  # random batches: nothing was chosen that could hurt
    if figures["negatives_above_own"] > limits.negatives_above_own:
        found.append(
            f"{figures['negatives_above_own']:.1%} of the wanted negatives beside an anchor score above its own "
            f"positive (good: {limits.negatives_above_own:.0%} or less): many are probably right answers. Set "
            "mining.margin to 0.95, or raise p of mining.window [p, m]."
        )
    if figures["suspects_per_anchor"] > limits.suspects_per_anchor:
        found.append(
            f"{figures['suspects_per_anchor']:.2f} suspected false negatives sit beside an anchor (good: "
            f"{limits.suspects_per_anchor:g} or less). Raise mining.conflict_weight."
        )
    if figures["masked"] > limits.masked:
        found.append(
            f"The teacher suspects {figures['masked']:.1%} of the softmax mass of an anchor's hardest negatives of "
            f"being right (good: {limits.masked:.0%} or less): with loss.mask_suspects the model never learns to tell "
            "them apart. Compare with mining.method=random, or use a better teacher."
        )
    if figures["isolated"] > limits.isolated:
        found.append(
            f"{figures['isolated']:.1%} of the anchors have no wanted negative beside them (good: "
            f"{limits.isolated:.0%} or less). Raise m of mining.window [p, m] or mining.cluster_size."
        )
    if figures["window_gain"] < limits.window_gain:
        found.append(
            f"The clusters hold only {figures['window_gain']:.1f} times the wanted negatives of random ones (good: "
            f"{limits.window_gain:g} or more): mining changes little here. Lower m of mining.window [p, m], or save "
            "the time and use random batches."
        )
    return found
