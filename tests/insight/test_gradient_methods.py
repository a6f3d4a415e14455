"""The comparison of methods: order, recommendation, words."""

from dataclasses import replace

from anybatch import BatchPlan
from anybatch.insight.gradient_error import FrozenPairs
from anybatch.insight.gradient_methods import (
    beside_plain,
    bias_sentence,
    comparable,
    compare_methods,
    frozen_pairs,
    gradient_figures,
)
from anybatch.losses.registry import LossConfig

from .test_gradient_error import clusters, embeddings

METHODS = [LossConfig(name="infonce"), LossConfig(name="decoupled"), LossConfig(name="sogclr", weights="inclusion")]


def test_every_method_on_both_kinds_of_batches():
    steps = []
    comparison = compare_methods(
        FrozenPairs.prepare(*embeddings(240), temperature=0.2),
        clusters(240, 8, 16),
        methods=METHODS,
        num_batches=45,
        progress=lambda *where: steps.append(where),
    )
    assert steps == [(number, 6) for number in range(1, 7)]
    assert comparison.order == ("infonce", "decoupled", "sogclr, weights=inclusion")
    assert list(comparison.errors) == [(name, batches) for batches in ("random", "plan") for name in comparison.order]
    assert comparison.plain is comparison.errors["infonce", "random"]


def test_random_plans_and_plans_of_one_cluster_leave_out_what_has_no_meaning():
    pairs = FrozenPairs.prepare(*embeddings(80), temperature=0.2)
    chosen = [LossConfig(name="infonce"), LossConfig(name="sogclr", gamma=0.5, weights="inclusion")]
    plain = compare_methods(pairs, BatchPlan.random(80, 10), methods=chosen, num_batches=16)
    assert {batches for _, batches in plain.errors} == {"random"}
    single = compare_methods(pairs, clusters(80, 8, 8), methods=chosen, num_batches=16)
    weighted = "sogclr, gamma=0.5, weights=inclusion"  # on random batches without the weights
    assert {*single.errors} == {
        *(("infonce", batches) for batches in ("random", "plan")),
        (weighted, "random"),
    }
    assert single.order == ("infonce", weighted)


def test_words():
    pairs = FrozenPairs.prepare(*embeddings(80), temperature=0.2)
    plain = compare_methods(pairs, BatchPlan.random(80, 10), methods=METHODS[:1], num_batches=16).plain
    biased, straight = (replace(plain, cosine=cosine, cosine_se=0.01) for cosine in (0.8, 0.98))
    assert bias_sentence(biased, 10).startswith("Small batches change")
    assert bias_sentence(straight, 10).startswith("Small batches hardly change")
    better = replace(plain, epoch_error=0.2, epoch_error_se=0.01)
    for error, verdicts in (
        (replace(better, epoch_error=0.1, cosine=0.98, cosine_se=0.01), ["good", "good"]),
        (replace(better, epoch_error=0.21, cosine=0.8, cosine_se=0.01), ["within noise", "not good"]),
        (replace(better, epoch_error=0.4, cosine=float("nan")), ["not good", "within noise"]),
        (replace(better, epoch_error=0.4, cosine=0.9, cosine_se=0.05), ["not good", "within noise"]),
    ):
        assert [figure.verdict for figure in gradient_figures("ours", error, "InfoNCE", better)] == verdicts


def test_both_directions():
    pairs = FrozenPairs.prepare(*embeddings(160), temperature=0.2, direction="both")
    result = compare_methods(pairs, clusters(160, 8, 16), methods=[LossConfig(name="infonce")], num_batches=20)
    assert len(result.errors) == 2


def test_all_rows_as_one_batch_have_no_error_with_a_margin_and_without_other_objectives():
    plan, loss = BatchPlan.random(60, 60), LossConfig(name="count_corrected", mask_margin=0.05, hardness=1.0)
    pairs = frozen_pairs(embeddings(60), None, plan, loss, temperature=0.2)
    compared = compare_methods(pairs, plan, methods=beside_plain(loss, plan), num_batches=2)
    assert compared.order == ("infonce, mask_margin=0.05", "count_corrected, mask_margin=0.05")
    assert max(error.epoch_error for error in compared.errors.values()) < 1e-3
    without = frozen_pairs(embeddings(60), None, plan, LossConfig(name="infonce"), temperature=0.2)
    assert not pairs.full.allclose(without.full, rtol=0.01)
    assert comparable(loss)[1] == ["loss.hardness: the gradient over all data is that of plain InfoNCE."]
    assert comparable(LossConfig(name="siglip")) == (LossConfig(name="siglip"), [])
