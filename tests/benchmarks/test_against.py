"""The comparison of two checkouts divides the right seconds, and every case of it runs."""

from __future__ import annotations

import random

from benchmarks import against


class Stub:
    """A checkout that takes `factor` seconds times what the machine makes of it at that moment."""

    def __init__(self, factor, machine):
        self.factor, self.machine, self.asked = factor, machine, []

    def seconds(self, name):
        self.asked.append(name)
        return self.factor * self.machine[0]


def test_ratios_are_of_one_round_and_without_the_first():
    machine = [1.0]
    here, there = Stub(3.0, machine), Stub(2.0, machine)
    ratios = against.compare(here, there, ("a", "b"), 4)  # pyright: ignore[reportArgumentType]
    assert ratios == {"a": [1.5] * 4, "b": [1.5] * 4}
    assert here.asked == there.asked == ["a", "b"] * 5


def test_every_case_runs():
    cases = against.make_cases()
    assert tuple(cases) == against.CASES
    small = [name for name in cases if "4,096" not in name]
    random.Random(0).shuffle(small)  # none depends on the ones before
    for name in small:
        cases[name]()
