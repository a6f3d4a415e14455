"""The comparison of methods: order, recommendation, words."""

from dataclasses import replace

import pytest

from anybatch import BatchPlan
from anybatch.insight.gradient_error import FrozenPairs
from anybatch.insight.gradient_methods import compare_methods, comparison_rows, core_methods, name_of, recommendation
from anybatch.losses.registry import LossConfig

from .test_gradient_error import clusters, embeddings


@pytest.fixture(scope="module")
def comparison():
    pairs = FrozenPairs.prepare(*embeddings(240), temperature=0.2)
    steps = []
    result = compare_methods(pairs, clusters(240, 8, 16), num_batches=45, progress=lambda *where: steps.append(where))
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
    errors = [line.error.epoch_error for line in comparison.lines]
    assert errors == sorted(errors)
    assert (comparison.batch_size, comparison.num_rows) == (16, 240)


def test_random_plans_and_plans_of_one_cluster_leave_out_what_has_no_meaning():
    pairs = FrozenPairs.prepare(*embeddings(80), temperature=0.2)
    chosen = [LossConfig(name="infonce"), LossConfig(name="sogclr", gamma=0.5, weights="inclusion")]
    plain = compare_methods(pairs, BatchPlan.random(80, 10), methods=chosen, num_batches=16)
    assert {line.batches for line in plain.lines} == {"random"}
    single = compare_methods(pairs, clusters(80, 8, 8), methods=chosen, num_batches=16)
    weighted = "sogclr, gamma=0.5, weights=inclusion"  # on random batches without the weights
    assert {(line.method, line.batches) for line in single.lines} == {
        *(("infonce", batches) for batches in ("random", "plan")),
        (weighted, "random"),
    }
    assert single.order == ("infonce", weighted)


def test_the_simplest_of_the_equally_good_is_recommended(comparison):
    lines = {(line.method, line.batches): line for line in comparison.lines}
    infonce, corrected = lines["infonce", "random"], lines["count_corrected", "random"]

    def of(*errors):
        found = [
            replace(line, error=replace(line.error, epoch_error=value, epoch_error_se=spread))
            for line, (value, spread) in zip((corrected, infonce), errors, strict=True)
        ]
        return replace(comparison, lines=tuple(found)).recommended.method

    assert of((0.30, 0.01), (0.32, 0.01)) == "infonce"
    assert of((0.30, 0.01), (0.40, 0.01)) == "count_corrected"
    assert of((0.30, 0.01), (0.44, 0.20)) == "count_corrected"  # measured too badly to be told from the best


def test_words(comparison):
    header, lines = comparison_rows(comparison)
    assert all(len(line) == len(header) for line in lines)
    assert lines[0][3] == "as near as any"
    assert lines[-1][3] == "further away"
    said = recommendation(comparison)
    assert f"loss.name={comparison.recommended.method}" in said[1]
    assert "measure the two best" in said[-1]
    line = next(line for line in comparison.lines if line.error is comparison.plain)

    def with_cosine(value):
        changed = replace(line, error=replace(line.error, cosine=value, cosine_se=0.01))
        return replace(comparison, lines=(changed,))

    assert recommendation(with_cosine(0.8))[0].startswith("There is bias to remove: ")
    assert recommendation(with_cosine(0.98))[0].startswith("There is little bias to remove: ")


def test_both_directions():
    pairs = FrozenPairs.prepare(*embeddings(160), temperature=0.2, direction="both")
    result = compare_methods(pairs, clusters(160, 8, 16), methods=[LossConfig(name="infonce")], num_batches=20)
    assert result.direction == "both"
    assert len(result.lines) == 2
