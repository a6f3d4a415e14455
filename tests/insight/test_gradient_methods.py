"""The comparison of methods: order, recommendation, effective sizes, words."""

from dataclasses import replace

import numpy as np
import pytest

from anybatch import BatchPlan
from anybatch.insight.gradient_error import FrozenPairs
from anybatch.insight.gradient_methods import compare_methods, comparison_rows, core_methods, name_of, recommendation
from anybatch.losses.registry import LossConfig

from .test_gradient_error import embeddings


def mined(num_rows, cluster_size, batch_size):
    """The groups of `embeddings` as clusters."""
    return BatchPlan(
        num_rows=num_rows,
        batch_size=batch_size,
        cluster_size=cluster_size,
        cluster=(np.arange(num_rows) % (num_rows // cluster_size)).astype(np.int32),
        seed=0,
        data_digest="",
    )


@pytest.fixture(scope="module")
def comparison():
    pairs = FrozenPairs.prepare(*embeddings(240), temperature=0.2, num_probes=120)
    steps = []
    result = compare_methods(pairs, mined(240, 8, 16), epochs=3, progress=lambda *where: steps.append(where))
    assert steps == [(number, 13) for number in range(1, 14)]
    return result


def test_every_method_on_both_kinds_of_batches(comparison):
    weighted = [method for method in core_methods() if method.weights == "inclusion"]
    assert {method.name for method in weighted} == {"count_corrected", "cross_batch", "sogclr"}
    names = {"infonce", "decoupled", *(method.name for method in weighted)}
    assert {(line.method, line.batches) for line in comparison.lines} == {
        *((name, batches) for name in names for batches in ("random", "plan")),
        *((name_of(method), "plan") for method in weighted),
    }
    assert comparison.order[:4] == ("infonce", "decoupled", "count_corrected", "count_corrected, weights=inclusion")
    cosines = [line.error.shared_cosine for line in comparison.lines]
    assert cosines == sorted(cosines, reverse=True)
    assert list(comparison.curve) == [8, 16, 32, 64]
    plain = next(line for line in comparison.lines if (line.method, line.batches) == ("infonce", "random"))
    assert plain.effective == pytest.approx(16, rel=0.2)  # it is its own measure
    assert (comparison.batch_size, comparison.num_rows) == (16, 240)


def test_random_plans_and_plans_of_one_cluster_leave_out_what_has_no_meaning():
    pairs = FrozenPairs.prepare(*embeddings(80), temperature=0.2)
    plain = compare_methods(pairs, BatchPlan.random(80, 10), epochs=1)
    assert {line.batches for line in plain.lines} == {"random"}
    chosen = [LossConfig(name="infonce"), LossConfig(name="sogclr", gamma=0.5, weights="inclusion")]
    single = compare_methods(pairs, mined(80, 8, 8), methods=chosen, epochs=1)
    assert {(line.method, line.batches) for line in single.lines} == {("infonce", "random"), ("infonce", "plan")}
    assert single.order == ("infonce", "sogclr, gamma=0.5, weights=inclusion")


def test_the_simplest_of_the_equally_good_is_recommended(comparison):
    lines = {(line.method, line.batches): line for line in comparison.lines}
    infonce, corrected = lines["infonce", "random"], lines["count_corrected", "random"]

    def with_error(line, value, spread):
        return replace(line, error=replace(line.error, shared_cosine=value, shared_cosine_se=spread))

    near = replace(comparison, lines=(with_error(corrected, 0.80, 0.01), with_error(infonce, 0.78, 0.01)))
    assert near.recommended.method == "infonce"
    far = replace(comparison, lines=(with_error(corrected, 0.80, 0.01), with_error(infonce, 0.70, 0.01)))
    assert far.recommended.method == "count_corrected"
    badly = replace(comparison, lines=(with_error(corrected, 0.99, 0.01), with_error(infonce, 0.86, 0.20)))
    assert badly.recommended.method == "count_corrected"  # not what was measured too badly to be told from the best


def test_words(comparison):
    header, lines = comparison_rows(comparison)
    assert all(len(line) == len(header) for line in lines)
    said = " ".join(recommendation(comparison))
    assert f"loss.name={comparison.recommended.method}" in said
    assert "measure the two best" in said
    assert comparison.size_in_words(float("inf")) == "over 64"
    assert comparison.size_in_words(0.0) == "under 8"
    assert comparison.size_in_words(1234.4) == "1,234"


def test_both_directions():
    pairs = FrozenPairs.prepare(*embeddings(160), temperature=0.2, num_probes=80, direction="both")
    result = compare_methods(pairs, mined(160, 8, 16), epochs=2)
    assert result.direction == "both"
    assert len(result.lines) == 13
    plain = next(line for line in result.lines if (line.method, line.batches) == ("infonce", "random"))
    assert plain.effective == pytest.approx(16, rel=0.25)  # of two-way InfoNCE, its own measure
    assert "anchor and positive together" in " ".join(recommendation(result))
