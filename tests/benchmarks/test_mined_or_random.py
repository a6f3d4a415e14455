"""What mining gained is read from the study's lines: each arm at its best rate on development queries."""

from benchmarks.mined_or_random import gained


def lines(arm, figures, **cell):
    """`figures`: of each rate the (dev, test) of its runs."""
    key = {"task": "arxiv", "student": "small", "batch_size": 64, "budget": "pairs", "arm": arm, **cell}
    return [{**key, "rate": rate, "dev": dev, "test": test} for rate, runs in figures.items() for dev, test in runs]


def test_each_arm_is_taken_at_its_best_rate():
    found = [
        *lines("ours/cross_batch", {0.1: [(0.5, 0.30), (0.5, 0.34)], 0.2: [(0.4, 0.9), (0.4, 0.9)]}),
        *lines("random/cross_batch", {0.1: [(0.2, 0.9), (0.2, 0.9)], 0.2: [(0.3, 0.30), (0.3, 0.32)]}),
        *lines("random/cross_batch", {0.3: [(0.9, 0.9)]}),  # a rate that is not done yet
        *lines("random/cross_batch", {0.1: [(0.9, 0.9)] * 3}, batch_size=16),
        *lines("ours/cross_batch", {0.1: [(0.9, 0.9)]}, student="layers1"),  # without its other arm
    ]
    assert gained(found, "arxiv") == "small +0.010"
    assert gained(found, "snli") == ""
