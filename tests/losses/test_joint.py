"""Further kinds of negatives in one softmax: what sentence-transformers computes, for every choice of its `directions`
and `partition_mode`; with masks, counts, ranks and a running denominator against loops over pairs.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from anybatch.caching import cached_step
from anybatch.core.errors import AnybatchError
from anybatch.losses import CountCorrectedInfoNCE, DecoupledInfoNCE, InfoNCE, SogCLR
from anybatch.losses.log_weights import LogWeights, Values, removed
from anybatch.losses.rows import RowTable
from anybatch.plans.examples import Examples
from anybatch.plans.plan import BatchPlan
from tests.ranks import on_ranks

from .. import reference

KINDS = ("query_to_query", "doc_to_query", "doc_to_doc")
SUBSETS = [kinds for size in range(1, 4) for kinds in itertools.combinations(KINDS, size)]
TAU = 0.3


def draw(rows, negatives, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (rows, rows * (1 + negatives))
    return [torch.randn(n, 5, generator=generator, dtype=torch.float64).requires_grad_() for n in sizes]


def assert_equal(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    pairs = [torch.autograd.grad(value, leaves, allow_unused=True) for value in (ours, theirs)]
    for mine, other in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tile_bytes", [1, 300, 10**7])
@pytest.mark.parametrize(("rows", "negatives"), [(1, 0), (6, 0), (5, 2)])
@pytest.mark.parametrize("kinds", [(), *SUBSETS, "per_direction"])
def test_equals_sentence_transformers(kinds, rows, negatives, tile_bytes):
    leaves = draw(rows, negatives)
    if kinds == "per_direction":
        options, theirs = {"direction": "both"}, {"partition_mode": kinds, "directions": ("doc_to_query",)}
    else:
        options, theirs = {"joint": kinds}, {"directions": kinds}
    theirs["directions"] = ("query_to_doc", *theirs["directions"])
    guest = MultipleNegativesRankingLoss(None, scale=1 / TAU, **theirs)
    expected = guest.compute_loss_from_embeddings([leaves[0], *leaves[1].split(rows)], None)
    value = InfoNCE(temperature=TAU, tile_bytes=tile_bytes, **options)(*leaves)
    assert_equal(value, expected, leaves)


class Pairs:
    """All pairs of embeddings of a batch, one by one: what each kind's negatives of a row are."""

    def __init__(
        self,
        anchors,
        candidates,
        kinds,
        *,
        allowed=lambda i, j: True,
        margin=math.inf,
        tau=TAU,
        repeated=(),
        owner=None,
    ):
        self.q, self.d = reference.unit(anchors), reference.unit(candidates)
        self.rows, self.kinds, self.allowed, self.margin, self.tau = len(anchors), kinds, allowed, margin, tau
        self.owner = [j % self.rows for j in range(len(candidates))] if owner is None else owner
        self.repeated = repeated  # rows that come a second time: that place is no draw of another row

    def positive(self, i):
        return self.q[i] @ self.d[i]

    def of(self, i):
        """By kind the logits of the negatives of row i, and how many there would be without masks."""
        rows, columns = range(self.rows), range(len(self.d))
        kinds = {"query_to_doc": (self.q[i], self.d, [j for j in columns if j != i])}
        if "query_to_query" in self.kinds:
            kinds["query_to_query"] = (self.q[i], self.q, [j for j in rows if j != i])
        if "doc_to_query" in self.kinds:
            kinds["doc_to_query"] = (self.d[i], self.q, [j for j in rows if j != i])
        if "doc_to_doc" in self.kinds:
            kinds["doc_to_doc"] = (self.d[i], self.d, [j for j in columns if self.owner[j] != i])
        highest = (self.positive(i) + self.margin).detach()
        for query, others, places in kinds.values():
            scores = [query @ others[j] for j in places if self.allowed(i, j) and query @ others[j] <= highest]
            yield [score / self.tau for score in scores], len(places) - (i in self.repeated)

    def mean(self, scale=lambda count: 1.0, own=1.0):
        """InfoNCE with each kind's sum times its scale."""
        total = 0.0
        for i in range(self.rows):
            positive = self.positive(i) / self.tau
            terms = 2.0 * own if "doc_to_query" in self.kinds else own
            for logits, count in self.of(i):
                terms = terms + scale(count) * sum((logit - positive).exp() for logit in logits)
            if isinstance(terms, torch.Tensor) or terms > 0:  # else the row has no negative, and contributes 0
                total = total + torch.log(positive * 0 + terms)
        return total / self.rows


@pytest.mark.parametrize("kinds", SUBSETS)
@pytest.mark.parametrize(("rows", "negatives"), [(7, 0), (5, 2)])
def test_masks_and_counts(kinds, rows, negatives):
    """Equal ids are no negatives of any kind, nor what scores too high; each kind is a sample of all rows."""
    leaves = draw(rows, negatives, seed=1)
    anchor_id = torch.arange(rows) % (rows - 1)
    candidate_id = torch.arange(rows * (1 + negatives)) % (rows + 2)
    candidate_id[1] = candidate_id[0]
    index = torch.arange(rows)
    index[3] = index[1]  # a row that came twice
    ids = {"anchor_id": anchor_id, "candidate_id": candidate_id, "index": index}

    def allowed(i, j):
        same_pair = j < rows and (anchor_id[i] == anchor_id[j] or index[i] == index[j])
        return candidate_id[i] != candidate_id[j] and not same_pair

    pairs = lambda: Pairs(*leaves, kinds, allowed=allowed, margin=0.1, repeated=(1, 3))  # noqa: E731
    options = {"temperature": TAU, "joint": kinds, "mask_margin": 0.1, "tile_bytes": 200}
    assert_equal(InfoNCE(**options)(*leaves, **ids), pairs().mean(), leaves)
    corrected = pairs().mean(lambda count: 49 / count)
    assert_equal(CountCorrectedInfoNCE(50, **options)(*leaves, **ids), corrected, leaves)
    decoupled = pairs().mean(own=0.0)
    assert_equal(DecoupledInfoNCE(**options)(*leaves, **ids), decoupled, leaves)


@pytest.mark.parametrize("fewer", [[2, 0, 1, 1], [2, 0, 2, 2]])  # as many in all as rows, and not
@pytest.mark.parametrize("kinds", SUBSETS)
def test_rows_with_fewer_negatives(kinds, fewer):
    """A text's own explicit negatives are no negatives of its kind, however many each row has."""
    lacking = np.arange(2) >= np.array(fewer)[:, None]
    table = RowTable(np.arange(4), np.arange(4), negative_id=np.where(lacking, -1, 4 + np.arange(8).reshape(4, 2)))
    owner = [0, 1, 2, 3, *(row for place in range(2) for row in range(4) if not lacking[row, place])]
    leaves, arguments = draw(4, 1, seed=5), table.arguments(torch.arange(4), num_negatives=2)
    leaves[1] = torch.cat([leaves[1], leaves[1].flip(0)])[: len(owner)].detach().requires_grad_()
    pairs = lambda: Pairs(*leaves, kinds, owner=owner)  # noqa: E731
    options = {"temperature": TAU, "joint": kinds, "tile_bytes": 200}
    assert_equal(InfoNCE(**options)(*leaves, **arguments), pairs().mean(), leaves)
    corrected = pairs().mean(lambda count: 49 / count)
    assert_equal(CountCorrectedInfoNCE(50, **options)(*leaves, **arguments), corrected, leaves)


def test_a_listed_pair_is_masked_in_either_order():
    """A term that knows anchors from texts: row 0's anchor goes with row 2's text, whichever of the two asks."""

    def known(queries, candidates, *, back):
        query, candidate = (2, 0) if back else (0, 2)
        return removed((queries["place"] == query)[:, None] & (candidates["place"] == candidate))

    leaves = draw(4, 0)
    weight = LogWeights.of(Examples(place=torch.arange(4)), 4, known)
    value = InfoNCE(temperature=TAU, joint=KINDS)(*leaves, log_weight=weight)
    q, d = (reference.unit(side) for side in leaves)
    listed = {("q", 0, "d", 2), ("d", 2, "q", 0)}
    total = 0.0
    for i in range(4):
        logits = []
        for (mine, query), (other, side) in itertools.product((("q", q[i]), ("d", d[i])), (("q", q), ("d", d))):
            for j in range(4):
                same_side = mine == other
                if (same_side and (j == i or {i, j} == {0, 2})) or (mine, i, other, j) in listed:
                    continue
                logits.append(query @ side[j] / TAU)
        total = total + torch.stack(logits).logsumexp(0) - q[i] @ d[i] / TAU
    assert_equal(value, total / 4, leaves)


@pytest.mark.parametrize("kinds", [("query_to_query",), KINDS])
def test_normalised_weights_are_each_kinds_own(kinds):
    """Weights that make one kind's sum a mean over the data make each kind's one."""
    leaves = draw(6, 0, seed=2)
    share = torch.full((6,), math.log(1 / 5), dtype=torch.float64)
    weight = LogWeights.of(Examples(share=share), 6, Values("share", "text", normalised=True))
    value = CountCorrectedInfoNCE(50, temperature=TAU, joint=kinds)(*leaves, log_weight=weight)
    assert_equal(value, CountCorrectedInfoNCE(50, temperature=TAU, joint=kinds)(*leaves), leaves)


def test_inclusion_weights_are_unbiased_beside_mined_negatives():
    """A row's ways to a text count its own mined negative, so its text meets it too: over all batches of two rows the
    weighted sum of each kind is the mean over all other rows.
    """
    rows, generator = 6, torch.Generator().manual_seed(0)
    anchors, texts = reference.unit(torch.randn(2 * rows, 5, generator=generator, dtype=torch.float64)).split(rows)
    mined = torch.tensor([1, 2, 3, 4, 5, 0])
    plan = BatchPlan.random(rows, 2, seed=0, data_digest="")
    table = RowTable(
        np.arange(rows), np.arange(rows), negative_id=mined.numpy()[:, None], plan=plan, weights="inclusion"
    )
    sums = {(): torch.zeros(rows, dtype=torch.float64)}
    sums["doc_to_doc",] = sums[()].clone()
    for batch in itertools.combinations(range(rows), 2):
        index = torch.tensor(batch)
        for kinds, total in sums.items():
            loss = CountCorrectedInfoNCE(rows, temperature=TAU, joint=kinds)
            loss(
                anchors[index],
                torch.cat([texts[index], texts[mined[index]]]),
                **table.arguments(index, num_negatives=1),
            )
            total[index] += loss._last[1].log_sum.exp() / (rows - 1)
    positive = (anchors * texts).sum(1, keepdim=True)
    for queries, sum_of_kind in ((anchors, sums[()]), (texts, sums["doc_to_doc",] - sums[()])):
        terms = ((queries @ texts.T - positive) / TAU).exp().fill_diagonal_(0)
        torch.testing.assert_close(sum_of_kind, terms.sum(1) / (rows - 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kinds", SUBSETS)
def test_a_running_denominator_follows_all_kinds(kinds):
    """SogCLR over two batches with some rows in common: the weights are those of the moving average, held."""
    loss = SogCLR(20, gamma=0.4, positive="exact", temperature=TAU, joint=kinds, tile_bytes=300).double()
    u, eps, own = {}, 1 / 19, 2.0 if "doc_to_query" in kinds else 1.0
    data = [side.detach() for side in draw(9, 0)]
    for rows in (range(6), range(3, 9)):
        leaves = [side[rows.start : rows.stop].clone().requires_grad_() for side in data]
        value = loss(*leaves, index=torch.tensor(rows))
        pairs, surrogate, objective = Pairs(*leaves, kinds), 0.0, 0.0
        for i in range(6):
            positive = pairs.positive(i) / TAU
            terms = [logit for logits, _ in pairs.of(i) for logit in logits]
            shares = [(term - positive).detach().exp() / 5 for term in terms]
            mean = sum(shares).item()
            row = rows[i]
            u[row] = mean if row not in u else 0.6 * u[row] + 0.4 * mean
            objective += math.log(own * eps + u[row])
            drawn = sum(share * term for share, term in zip(shares, terms, strict=True)) - u[row] * positive
            surrogate = surrogate + drawn / (own * eps + u[row])
        assert value.item() == pytest.approx(objective / 6, rel=1e-6)  # the state is float32
        mine, theirs = (torch.autograd.grad(scalar, leaves) for scalar in (value, surrogate / 6))
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


SHARES = [(slice(0, 4), [0, 1, 2, 3]), (slice(4, 4), []), (slice(4, 6), [4, 5])]


def on_rank(rank, world_size, kinds, corrected, options):
    anchors, candidates = draw(6, 1, seed=3)
    rows = SHARES[rank][0] if world_size > 1 else slice(0, 6)
    own = candidates.detach().view(2, 6, 5)[:, rows].reshape(-1, 5).requires_grad_()
    ids = torch.arange(12).view(2, 6)[:, rows].reshape(-1) % 8
    make = (lambda **k: CountCorrectedInfoNCE(50, **k)) if corrected else InfoNCE
    loss = make(temperature=TAU, learnable_temperature=True, joint=kinds, **options).double()
    mine = anchors.detach()[rows].requires_grad_()
    pairs = torch.arange(len(mine))
    weight = LogWeights.of(Examples(owner=torch.cat([pairs, pairs // 2 * 2])), len(mine))  # every other row has two
    value = loss(mine, own, anchor_id=torch.arange(6)[rows] % 4, candidate_id=ids, log_weight=weight)
    value.backward()
    return [value.detach(), mine.grad, own.grad.view(2, -1, 5), loss.temperatures.log_temperature.grad]


@pytest.mark.parametrize("corrected", [False, True])
def test_the_cached_step_equals_the_plain_one(corrected):
    """With the guest's choice of Qwen3-Embedding, explicit negatives among the texts."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(3)]
    make = (lambda **k: CountCorrectedInfoNCE(50, **k)) if corrected else InfoNCE
    loss, gradients = make(temperature=TAU, joint=("query_to_query", "doc_to_doc"), mask_margin=0.1), []
    for mini_batch_size in (None, 2):
        torch.manual_seed(0)
        encoder = torch.nn.Linear(7, 5).double()
        if mini_batch_size is None:
            loss(encoder(texts[0]), torch.cat([encoder(text) for text in texts[1:]])).backward()
        else:
            cached_step(loss, [encoder] * 3, texts, mini_batch_size=mini_batch_size)
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.distributed
@pytest.mark.parametrize(("kinds", "corrected"), [(("query_to_query",), False), (KINDS, True)])
def test_ranks_equal_one_process(kinds, corrected):
    """Three, one without a row; in one tile and in many."""
    for options in ({"tile_bytes": 300}, {"mask_margin": 0.2}):
        value, d_anchors, d_candidates, d_temperature = on_rank(0, 1, kinds, corrected, options)
        ranks = on_ranks(on_rank, 3, kinds, corrected, options)
        torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]) / 3, d_anchors, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(torch.cat([rank[2] for rank in ranks], 1) / 3, d_candidates, rtol=1e-10, atol=1e-12)
        for rank in ranks:
            torch.testing.assert_close(rank[0], value, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(rank[3], d_temperature, rtol=1e-10, atol=1e-12)


def test_a_temperature_that_learns():
    leaves = draw(5, 1, seed=4)
    loss = InfoNCE(temperature=TAU, learnable_temperature=True, joint=KINDS, tile_bytes=200).double()
    loss(*leaves).backward()
    log_temperature = torch.tensor(math.log(TAU), dtype=torch.float64, requires_grad=True)
    Pairs(*(side.detach() for side in leaves), KINDS, tau=log_temperature.exp()).mean().backward()
    # The loss's own parameter was made in float32.
    torch.testing.assert_close(loss.temperatures.log_temperature.grad, log_temperature.grad, rtol=1e-6, atol=1e-7)


def test_figures():
    loss = InfoNCE(temperature=TAU, joint=KINDS)
    value = loss(*draw(6, 0))
    assert loss.last_stats["num_negatives"] == 4 * 5
    assert loss.last_stats["log_denominator"] == pytest.approx(value.item())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: InfoNCE(joint=("doc_to_dog",)), "joint has 'doc_to_dog'; expected some of query_to_query"),
        (lambda: InfoNCE(joint=("query_to_query",), direction="both"), "joint is query_to_query and direction 'both'"),
        (lambda: InfoNCE(joint=KINDS)(*draw(4, 0), log_weight=torch.zeros(4, 4)), "other kinds of pairs"),
        (lambda: InfoNCE(joint=KINDS)(draw(4, 0)[0], draw(7, 0)[0]), "joint has doc_to_doc, and the batch 3 explicit"),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(AnybatchError, match=words):
        make()
