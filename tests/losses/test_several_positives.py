"""Several positives of an anchor, against SupCon's formula (Khosla et al. 2020, L_out) written for one row, and against
the published form on all views of a batch.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybatch.core.errors import AnybatchError
from anybatch.losses import CountCorrectedInfoNCE, DecoupledInfoNCE, InfoNCE, SogCLR
from anybatch.losses.log_weights import LogWeights
from anybatch.plans.examples import Examples

from .. import reference, twin
from .methods import cluster_weights

TAU = 0.4
MAKE = {
    "infonce": (InfoNCE, lambda count: 1.0),
    "count corrected": (lambda **k: CountCorrectedInfoNCE(50, **k), lambda count: 49 / max(1, count)),
}


def draw(rows, extra, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (rows, rows + extra)]
    labels = torch.randint(max(2, rows // 2), (rows,), generator=generator)
    return [side.requires_grad_() for side in sides], labels


def records(labels, extra):
    """Explicit negatives have no label."""
    return LogWeights.of(Examples(label=torch.cat([labels, labels.new_full((extra,), -1)])), len(labels))


def supcon(queries, others, labels, scale=lambda count: 1.0, *, masked=lambda i, j: False, margin=math.inf):
    """The mean over rows of -1/|P| sum over positives p of log(exp(s_p) / denominator); what is not the own positive
    times `scale` in the denominator.
    """
    scores, total = reference.unit(queries) @ reference.unit(others).T, 0.0
    for i in range(len(queries)):
        positives = [j for j in range(len(labels)) if labels[j] == labels[i] and j != i]
        negatives = [j for j in range(len(others)) if j not in positives and j != i and not masked(i, j)]
        negatives = [j for j in negatives if scores[i, j] <= scores[i, i] + margin]
        rest = sum((scores[i, j] / TAU).exp() for j in positives + negatives)
        denominator = (scores[i, i] / TAU).exp() + scale(len(others) - 1) * rest
        logs = [scores[i, p] / TAU - denominator.log() for p in [i, *positives]]
        total = total - sum(logs) / len(logs)
    return total / len(queries)


def assert_equal(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    pairs = [torch.autograd.grad(value, leaves, allow_unused=True) for value in (ours, theirs)]
    for mine, other in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MAKE)
@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(0, 5), st.integers(0, 99)),
    tile=st.sampled_from([1, 200, 10**7]),
    both=st.booleans(),
    margin=st.sampled_from([None, 0.1]),
)
def test_equals_the_formula(name, shape, tile, both, margin):
    (make, scale), (leaves, labels) = MAKE[name], draw(*shape)
    options = {"direction": "both" if both else "one_way", "tile_bytes": tile, "mask_margin": margin}
    value = make(temperature=TAU, positives_by="label", **options)(*leaves, log_weight=records(labels, shape[1]))
    known = {"scale": scale, "margin": math.inf if margin is None else margin}
    expected = supcon(*leaves, labels, **known)
    if both:
        expected = (expected + supcon(leaves[1][: shape[0]], leaves[0], labels, **known)) / 2
    assert_equal(value, expected, leaves)


@pytest.mark.parametrize("column", ["anchor_id", "text_id"])
def test_ids_that_are_masks_elsewhere(column):
    """Rows that share an anchor (or a text) are positives; those that share the other id stay masked."""
    leaves, ids = draw(8, 0)
    other = torch.arange(8)
    other[7] = other[0]
    anchor_id, text_id = (ids, other) if column == "anchor_id" else (other, ids)
    value = InfoNCE(temperature=TAU, positives_by=column)(*leaves, anchor_id=anchor_id, candidate_id=text_id)
    assert_equal(value, supcon(*leaves, ids, masked=lambda i, j: other[i] == other[j]), leaves)


def test_all_views_of_a_batch_are_supcon():
    """Both views as queries and as candidates: the loss as published, over 2 N embeddings."""
    (first, second), labels = draw(6, 0, seed=3)
    leaves, index = [first, second], torch.arange(6)
    views, others = torch.cat([first, second]), torch.cat([second, first])
    known = LogWeights.of(Examples(label=labels.repeat(2)), 12)
    value = InfoNCE(temperature=TAU, positives_by="label")(views, others, index=index.repeat(2), log_weight=known)
    embeddings, labels = reference.unit(views), labels.repeat(2)
    logits = embeddings @ embeddings.T / TAU
    same = (labels[:, None] == labels) & ~torch.eye(12, dtype=torch.bool)
    log_share = logits - logits.masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf).logsumexp(1, keepdim=True)
    expected = -((log_share * same).sum(dim=1) / same.sum(dim=1)).mean()
    # Here the own row's other view and the rest of the class are positives; a view itself is nothing.
    assert_equal(value, expected, leaves)


def test_weights_that_stand_for_the_data_hold_for_positives_too():
    """A positive in another cluster stands for others in the denominator; one of another data set is none."""
    leaves, labels = draw(8, 0, seed=1)
    cluster = torch.arange(8) // 4
    loss = CountCorrectedInfoNCE(50, temperature=TAU, positives_by="label")
    same, other = math.log(2 / 49), math.log(9 / 49)
    weight = cluster_weights(cluster, 8, same=same, other=other, label=labels)
    value = loss(*leaves, log_weight=weight)
    scores, total = reference.unit(leaves[0]) @ reference.unit(leaves[1]).T / TAU, 0.0
    for i in range(8):
        rest = sum((2 if cluster[i] == cluster[j] else 9) * scores[i, j].exp() for j in range(8) if j != i)
        chosen = [j for j in range(8) if labels[j] == labels[i]]
        total = total + (scores[i, i].exp() + rest).log() - scores[i, chosen].mean()
    assert_equal(value, total / 8, leaves)

    task = torch.arange(8) % 2
    weight = cluster_weights(cluster, 8, same=same, other=same, label=labels, task=task)
    value, total = loss(*leaves, log_weight=weight), 0.0
    scores = reference.unit(leaves[0]) @ reference.unit(leaves[1]).T / TAU
    for i in range(8):
        ours = [j for j in range(8) if task[j] == task[i]]
        rest = sum(2 * scores[i, j].exp() for j in ours if j != i)
        total = (
            total + (scores[i, i].exp() + rest).log() - scores[i, [j for j in ours if labels[j] == labels[i]]].mean()
        )
    assert_equal(value, total / 8, leaves)


def test_a_running_denominator():
    """The first visit is that of the batch: gradients of SogCLR with eps = 1 / k are InfoNCE's."""
    leaves, labels = draw(7, 0, seed=5)
    known = {"index": torch.arange(7), "log_weight": records(labels, 0)}
    running = SogCLR(7, temperature=TAU, positives_by="label").double()
    pairs = [
        torch.autograd.grad(loss(*leaves, **known), leaves)
        for loss in (running, InfoNCE(temperature=TAU, positives_by="label"))
    ]
    for mine, other in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)  # the state is float32


def test_figures_and_a_temperature_that_learns():
    leaves, labels = draw(9, 2, seed=2)
    loss = InfoNCE(temperature=TAU, learnable_temperature=True, positives_by="label").double()
    with torch.no_grad():
        loss.temperatures.log_temperature.fill_(math.log(TAU))
    values = []
    for tau in (TAU, TAU * math.exp(1e-5), TAU * math.exp(-1e-5)):
        fixed = InfoNCE(temperature=tau, positives_by="label")
        values.append(fixed(*leaves, log_weight=records(labels, 2)))
    loss(*leaves, log_weight=records(labels, 2)).backward()
    torch.testing.assert_close(loss.temperatures.log_temperature.grad, (values[1] - values[2]).detach() / 2e-5)
    expected = 11 - (labels[:, None] == labels).sum(dim=1).double().mean().item()
    assert loss.last_stats["num_negatives"] == pytest.approx(expected)


def labelled(own, explicit):
    """What a rank knows of its share."""
    return {"log_weight": records(draw(9, 3, seed=7)[1][own], explicit.stop - explicit.start)}


@pytest.mark.distributed
def test_ranks_equal_one_process():
    make = partial(CountCorrectedInfoNCE, 50)
    twin.check_ranks(make, temperature=TAU, positives_by="label", known=labelled)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DecoupledInfoNCE(positives_by="label"), "positives_by is given, and DecoupledInfoNCE has no positive"),
        (
            lambda: InfoNCE(positives_by="label", joint=("doc_to_doc",)),
            "joint=.'doc_to_doc',. and positives_by='label' are given",
        ),
        (lambda: InfoNCE(positives_by="label")(torch.eye(3), torch.eye(3)), "column 'label' of the examples"),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(AnybatchError, match=words):
        make()
