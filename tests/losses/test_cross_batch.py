"""Remembered embeddings against a naive twin that keeps a list of pairs and writes every term out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from anybatch.core.errors import AnybatchError
from anybatch.losses import (
    CountCorrectedInfoNCE,
    CrossBatchInfoNCE,
    Examples,
    InfoNCE,
    LogWeights,
)
from anybatch.losses.log_weights import Inclusion, ListedPairs, Values

N, WIDTH, BATCH, SIZE, TAU = 50, 5, 6, 10, 0.3
SAME, OTHER, LOOSE = math.log(1 / (N - 1)), math.log(4 / (N - 1)), math.log(7 / (N - 1))


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


class World:
    """What is known of every row: ids with repetitions, clusters (some rows in none), data sets, listed pairs."""

    def __init__(self, *, ids=False, pairs=False, clusters=False, tasks=False):
        generator = torch.Generator().manual_seed(9)
        self.ids, self.pairs, self.clusters, self.tasks = ids, pairs, clusters, tasks
        self.anchor = torch.randint(30, (N,), generator=generator)
        self.positive = torch.randint(30, (N,), generator=generator)
        self.cluster = torch.arange(N) // 5
        self.cluster[::7] = -2 - torch.arange(N)[::7]
        self.task = (torch.arange(N) // 5) % 2 if tasks else torch.zeros(N, dtype=torch.int64)
        self.keys = torch.unique(torch.randint(N * 30, (300,), generator=generator)) if pairs else torch.empty(0)

    def log_weight(self, i, j, *, back, alive, remembered):
        """Of row i as query and row j as candidate, as numbers; `remembered`: j comes from the memory, `alive` are
        all its rows.
        """
        if i == j:
            return -math.inf
        one, two = (j, i) if back else (i, j)  # the pair as anchor and positive
        if self.ids and (self.positive[i] == self.positive[j] or self.anchor[i] == self.anchor[j]):
            return -math.inf
        if self.pairs and (one * 30 + self.positive[two]) in self.keys:
            return -math.inf
        if not self.clusters:
            return 0.0
        if self.tasks and self.task[i] != self.task[j]:
            return -math.inf
        if self.cluster[i] == self.cluster[j] and not remembered:
            return SAME
        among = [r for r in alive if not self.tasks or self.task[r] == self.task[i]]
        rest = LOOSE if self.cluster[j] < 0 else OTHER
        return -math.log(math.exp(-rest) + len(among))

    def arguments(self, index):
        terms, columns = [], {}
        if self.pairs:
            terms.append(ListedPairs(self.keys, 30))
            columns |= {"row": index, "text_id": self.positive[index]}
        if self.clusters:
            row = [SAME, OTHER, LOOSE, OTHER, LOOSE, 0.0]
            terms.append(Inclusion(torch.tensor([[row, row]] * 2, dtype=torch.float64)))
            columns |= {"cluster": self.cluster[index], "task": self.task[index] if self.tasks else None}
        arguments = {"index": index}
        if self.ids:
            arguments |= {"anchor_id": self.anchor[index], "candidate_id": self.positive[index]}
        if terms:
            arguments["log_weight"] = LogWeights.of(Examples(**columns), len(index), *terms)
        return arguments


class Twin:
    """One process, float64, a list of pairs: (row, anchor, positive, log-denominators), relative to the mean of their
    batch.
    """

    def __init__(self, world, *, centred=True, both=False, size=SIZE, margin=math.inf, hardness=0.0):
        self.world, self.centred, self.both, self.size = world, centred, both, size
        self.margin, self.hardness = margin, hardness
        self.pairs, self.means = [], None

    def _shift(self, k):
        return math.log(N - 1) if self.world.clusters else math.log((N - 1) / max(1, k))

    def _direction(self, back, index, queries, others, memory):
        alive = [row for row, *_ in memory]
        total, absolute, counts = 0.0, [], []
        for i in range(len(index)):
            terms, positive = [], queries[i] @ others[i] / TAU
            columns = [(row, others[j], False) for j, row in enumerate(index)] + [
                (row, sides[1 - back], True) for row, *sides, _ in memory
            ]
            weights = [
                (
                    self.world.log_weight(index[i], row, back=back, alive=alive, remembered=remembered)
                    if (remembered or c != i)
                    else -math.inf,
                    vector,
                )
                for c, (row, vector, remembered) in enumerate(columns)
            ]
            kept = [
                (weight, vector)
                for weight, vector in weights
                if weight > -math.inf and queries[i] @ vector <= positive * TAU + self.margin
            ]
            counts.append(len(columns) - 1)
            terms = [queries[i] @ vector / TAU + weight for weight, vector in kept]
            log_factors = [self.hardness * (queries[i] @ vector / TAU).detach() for _, vector in kept]
            chances = torch.tensor([weight for weight, _ in kept], dtype=torch.float64)
            log_mean = (chances + torch.stack(log_factors)).logsumexp(0) - chances.logsumexp(0) if kept else 0.0
            terms = [term + f - log_mean + self._shift(counts[i]) for term, f in zip(terms, log_factors, strict=True)]
            log_denominator = torch.logsumexp(torch.stack([positive, *terms]), dim=0)
            total = total + log_denominator - positive
            absolute.append((log_denominator + log_mean).detach())
        # The pull of remembered queries on the batch's positives: value 0.
        for row, *sides, log_denominators in memory:
            for j in range(len(index)):
                weight = self.world.log_weight(index[j], row, back=not back, alive=alive, remembered=True)
                if weight > -math.inf and sides[back] @ others[j] <= sides[0] @ sides[1] + self.margin:
                    score = sides[back] @ others[j] / TAU
                    logit = (1 + self.hardness) * score + weight + self._shift(counts[j])
                    pull = (logit - log_denominators[back]).exp().clamp(max=1).detach()
                    total = total + pull * (score - score.detach())
        return total / len(index), absolute

    def __call__(self, anchors, positives, index):
        anchors, positives, index = unit(anchors), unit(positives), index.tolist()
        means = [side.detach().mean(dim=0) * self.centred for side in (anchors, positives)]
        if self.means is not None:
            rate = min(1.0, len(index) / 64)
            means = [old + rate * (new - old) for old, new in zip(self.means, means, strict=True)]
        self.means = means
        memory = [
            (row, unit(a + means[0]), unit(p + means[1]), logs) for row, a, p, logs in self.pairs if row not in index
        ]
        loss, forward = self._direction(0, index, anchors, positives, memory)
        back = forward
        if self.both:
            other, back = self._direction(1, index, positives, anchors, memory)
            loss = (loss + other) / 2
        new = [
            (row, anchors[i].detach() - means[0], positives[i].detach() - means[1], (forward[i], back[i]))
            for i, row in enumerate(index)
        ]
        self.pairs = [*(pair for pair in self.pairs if pair[0] not in index), *new][-self.size :]
        return loss


def draw(step, rows=BATCH):
    generator = torch.Generator().manual_seed(step)
    sides = [torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    index = torch.randperm(12, generator=generator)[:rows] * 4  # rows come again while they are remembered
    return *sides, index


WORLDS = {
    "plain": {},
    "ids": {"ids": True},
    "ids and pairs": {"ids": True, "pairs": True},
    "clusters": {"clusters": True},
    "everything": {"ids": True, "pairs": True, "clusters": True, "tasks": True},
}


@pytest.mark.parametrize("tile_bytes", [1, 2**20])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_equals_its_twin_over_several_steps(world, both, tile_bytes):
    known = World(**WORLDS[world])
    loss = CrossBatchInfoNCE(
        N,
        memory_size=SIZE,
        temperature=TAU,
        direction="both" if both else "one_way",
        tile_bytes=tile_bytes,
    ).double()
    twin = Twin(known, both=both)
    for step, rows in enumerate([6, 6, 4, 1, 6, 6, 5]):
        anchors, positives, index = draw(step, rows)
        value = loss(anchors, positives, **known.arguments(index))
        mine = torch.autograd.grad(value, [anchors, positives])
        expected = twin(anchors, positives, index)
        theirs = torch.autograd.grad(expected, [anchors, positives])
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert sorted(loss.queue.rows[loss.queue.rows >= 0].tolist()) == sorted(row for row, *_ in twin.pairs)


@pytest.mark.parametrize("world", ["plain", "clusters"])
@pytest.mark.parametrize("direction", ["one_way", "both"])
@pytest.mark.parametrize(
    "options",
    [
        {"centred": False},
        {"mask_margin": 0.1},
        {"mask_margin": 0.3, "centred": False},
        {"hardness": 0.7},
        {"mask_margin": 0.3, "hardness": 0.7},
    ],
)
def test_options_equal_the_twin(options, direction, world):
    known = World(**WORLDS[world])
    settings = {"memory_size": SIZE, "temperature": TAU, "direction": direction}
    loss = CrossBatchInfoNCE(N, **settings, **options).double()
    margin = options.get("mask_margin", math.inf)
    others = {name: value for name, value in options.items() if name != "mask_margin"}
    twin = Twin(known, both=direction == "both", margin=margin, **others)
    for step in range(4):
        anchors, positives, index = draw(step)
        mine = torch.autograd.grad(loss(anchors, positives, **known.arguments(index)), [anchors, positives])
        theirs = torch.autograd.grad(twin(anchors, positives, index), [anchors, positives])
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("direction", ["one_way", "both"])
def test_the_first_batch_is_that_of_the_loss_without_memory(direction):
    loss = CrossBatchInfoNCE(N, memory_size=SIZE, temperature=TAU, direction=direction).double()
    other = CountCorrectedInfoNCE(N, temperature=TAU, direction=direction).double()
    anchors, positives, index = draw(0)
    mine, theirs = loss(anchors, positives, index=index), other(anchors, positives, index=index)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    for one, two in zip(
        torch.autograd.grad(mine, [anchors, positives]), torch.autograd.grad(theirs, [anchors, positives]), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("direction", ["one_way", "both"])
def test_embeddings_that_stand_still_give_the_gradient_of_all_data(direction):
    """When everything but the batch is remembered, and no mean moves, the gradient is that of the softmax over all
    rows, on both sides.
    """
    generator = torch.Generator().manual_seed(1)
    sides = [unit(torch.randn(N, WIDTH, generator=generator, dtype=torch.float64)) for _ in range(2)]
    loss = CrossBatchInfoNCE(N, memory_size=N, temperature=TAU, direction=direction, centred=False).double()
    full = [side.clone().requires_grad_() for side in sides]
    InfoNCE(temperature=TAU, direction=direction)(*full).mul(N).backward()
    for epoch in range(5):
        order = torch.randperm(N, generator=generator).split(10)
        for index in order:
            batch = [side[index].requires_grad_() for side in sides]
            loss(*batch, index=index).mul(len(index)).backward()
            if epoch == 4:  # denominators of the first epochs knew fewer rows
                for mine, whole in zip(batch, full, strict=True):
                    torch.testing.assert_close(mine.grad, whole.grad[index], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("rows", "rate"), [(64, 1.0), (16, 0.25), (1, 1 / 64)])
def test_a_common_drift_is_taken_away(rows, rate):
    """All embeddings have moved by one vector since the last batch: remembered ones follow, at once from 64 rows on,
    and more slowly from fewer.
    """
    generator = torch.Generator().manual_seed(2)
    points = torch.randn(128, 2, 8, generator=generator, dtype=torch.float64)
    points[:64] -= points[:64].mean(dim=0)
    points[64 : 64 + rows] -= points[64 : 64 + rows].mean(dim=0)
    drift = torch.arange(8, dtype=torch.float64)
    for centred, expected in ((True, rate * drift), (False, 0 * drift)):
        loss = CrossBatchInfoNCE(128, memory_size=64, centred=centred, normalize=False, temperature=TAU).double()
        loss(points[:64, 0], points[:64, 1], index=torch.arange(64))
        moved = points[64 : 64 + rows] + drift
        index = torch.arange(64, 64 + rows)
        used = loss._recall(loss._prepare(moved[:, 0], moved[:, 1], index=index)).used
        torch.testing.assert_close(used, (points[:64] + expected).transpose(0, 1), rtol=0, atol=1e-12)


def test_explicit_negatives_are_the_batchs_alone():
    loss = CrossBatchInfoNCE(N, memory_size=SIZE, temperature=TAU).double()
    anchors, positives, index = draw(0)
    negatives = torch.randn(4, WIDTH, dtype=torch.float64)
    loss(anchors, torch.cat([positives, negatives]), index=index)
    assert loss.last_stats["num_negatives"] == BATCH - 1 + 4
    remembered = loss.queue.rows[loss.queue.rows >= 0]
    assert remembered.tolist() == index.tolist()
    anchors, positives, index = draw(1)
    loss(anchors, positives, index=index)
    new = BATCH - len(set(index.tolist()) & set(remembered.tolist()))
    assert loss.last_stats["num_negatives"] == BATCH - 1 + new


@pytest.mark.parametrize("direction", ["one_way", "both"])
def test_explicit_negatives_with_log_weights_equal_the_twins_columns(direction):
    """What is remembered of a batch with explicit negatives are its positives; k counts the explicit ones, also for
    remembered queries.
    """
    known, negatives = World(ids=True), torch.randn(5, WIDTH, dtype=torch.float64)
    loss = CrossBatchInfoNCE(N, memory_size=SIZE, temperature=TAU, direction=direction).double()
    anchors, positives, index = draw(0)
    arguments = known.arguments(index)
    arguments["candidate_id"] = torch.cat([arguments["candidate_id"], 100 + torch.arange(5)])
    loss(anchors, torch.cat([positives, negatives]), **arguments)
    kept = loss.queue.records[loss.queue.rows >= 0]
    columns = [known.anchor[index], index, known.positive[index]]  # anchor_id, row, text_id
    assert torch.equal(kept, torch.stack(columns, dim=1))
    anchors, positives, index = draw(1)
    arguments = known.arguments(index)
    arguments["candidate_id"] = torch.cat([arguments["candidate_id"], 100 + torch.arange(5)])
    ids = (arguments["anchor_id"], arguments["candidate_id"])
    batch = loss._prepare(
        anchors, torch.cat([positives, negatives]), index=index, anchor_id=ids[0], candidate_id=ids[1]
    )
    recalled = loss._recall(batch)
    counts = torch.arange(3, 3 + BATCH).double()
    pull = loss._gradient_of_queries(
        batch, recalled, 0, replace(loss._side(loss.denominator, batch, 0), num_drawn=counts)
    )
    expected = torch.zeros_like(pull)
    for j, row in enumerate(index.tolist()):
        for number, place in enumerate(recalled.places.tolist()):
            other = int(loss.queue.rows[place])
            assert other == recalled.memory["row"][number]
            if known.log_weight(row, other, back=True, alive=[], remembered=True) == 0:
                query = recalled.used[0, number]
                score = (
                    batch.candidates[j] @ query / TAU
                    + math.log((N - 1) / counts[j])
                    - loss.queue.log_denominator[0, place]
                )
                expected[j] += score.clamp(max=0).exp() * query / TAU
    torch.testing.assert_close(pull, expected.detach(), rtol=1e-10, atol=1e-12)
    assert pull.abs().sum() > 0


def test_the_pull_of_queries_takes_the_temperature_of_this_moment():
    loss = CrossBatchInfoNCE(N, memory_size=SIZE, temperature=TAU, learnable_temperature=True).double()
    loss(*draw(0)[:2], index=draw(0)[2])
    with torch.no_grad():
        loss.temperatures.log_temperature.fill_(math.log(0.7))
    loss.eval()  # gradients are wanted in evaluation mode too
    fixed = CrossBatchInfoNCE(N, memory_size=SIZE, temperature=0.7).double()
    fixed.load_state_dict(
        {key: value for key, value in loss.state_dict().items() if key != "temperatures.log_temperature"}
    )
    anchors, positives, index = draw(1)
    mine = torch.autograd.grad(loss(anchors, positives, index=index), [anchors, positives])
    theirs = torch.autograd.grad(fixed(anchors, positives, index=index), [anchors, positives])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_a_step_that_is_not_finite_is_not_remembered():
    loss = CrossBatchInfoNCE(N, memory_size=SIZE)
    anchors, positives, index = (part.float() if part.is_floating_point() else part for part in draw(0))
    loss(anchors, positives, index=index)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    broken = positives.detach().clone()
    broken[2, 1] = torch.inf
    loss(anchors, broken, index=(index + 1) % N)
    for name, value in loss.state_dict().items():
        assert torch.equal(value.nan_to_num(-9), before[name].nan_to_num(-9)), name
    assert loss(anchors, positives, index=index).isfinite()


def test_a_batch_larger_than_the_memory_leaves_its_last_rows():
    loss = CrossBatchInfoNCE(N, memory_size=4, temperature=TAU)
    index = torch.arange(10, 19)
    loss(torch.randn(9, WIDTH), torch.randn(9, WIDTH), index=index)
    assert sorted(loss.queue.rows.tolist()) == [15, 16, 17, 18]


def test_a_learned_temperature_has_the_derivative_of_the_batchs_own_terms():
    """Finite differences of the value: the pull of remembered queries has the value 0 at any temperature."""
    loss = CrossBatchInfoNCE(
        N, memory_size=SIZE, temperature=TAU, learnable_temperature=True, direction="both"
    ).double()
    for step in range(3):
        anchors, positives, index = draw(step)
        loss(anchors, positives, index=index)
    loss.eval()
    anchors, positives, index = draw(3)
    loss(anchors, positives, index=index).backward()
    values, step = [], 1e-6
    with torch.no_grad():
        for sign in (1, -1):
            loss.temperatures.log_temperature += sign * step
            values.append(loss(anchors, positives, index=index).item())
            loss.temperatures.log_temperature -= sign * step
    assert loss.temperatures.log_temperature.grad.item() == pytest.approx(
        (values[0] - values[1]) / (2 * step), rel=1e-6
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_rows": 1}, "num_rows is 1"),
        ({"memory_size": 0}, "memory_size is 0"),
        ({"mean_rows": 0}, "mean_rows is 0"),
    ],
)
def test_sizes_are_checked(change, words):
    with pytest.raises(AnybatchError, match=words):
        CrossBatchInfoNCE(**{"num_rows": N, **change})


def test_log_weights_that_cannot_be_remembered_are_refused():
    loss = CrossBatchInfoNCE(N, memory_size=SIZE)
    anchors, positives, index = draw(0)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    with pytest.raises(AnybatchError, match="does not cover the candidates of earlier batches"):
        loss(anchors, positives, index=index, log_weight=torch.zeros(BATCH, BATCH))

    with pytest.raises(AnybatchError, match=r"log_weight is a list; expected LogWeights, or a tensor broadcastable to"):
        loss(anchors, positives, index=index, log_weight=[0.0])
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    rows = torch.zeros(BATCH, 1)
    value = loss(anchors, positives, index=index, log_weight=rows)
    assert value.isfinite()


def test_kinds_of_log_weights_may_not_change():
    loss = CrossBatchInfoNCE(N, memory_size=SIZE)
    anchors, positives, index = draw(0)
    loss(anchors, positives, index=index, anchor_id=index, candidate_id=index)
    weight = LogWeights.of(Examples(author=index, text_id=index), BATCH, Values("author", of="text"))
    with pytest.raises(AnybatchError, match="of other kinds"):  # as many figures, of something else
        loss(anchors, positives, index=index, log_weight=weight)
    with pytest.raises(AnybatchError, match="of other kinds than those of the remembered batches"):
        loss(anchors, positives, index=index)


def test_records_come_back_as_they_were():
    """Weights and ways by column, beside a batch: floats are kept as their bits."""
    log_ways = torch.tensor([0.3, 1.7, 0.0], dtype=torch.float64)
    row = [SAME, OTHER, OTHER, OTHER, OTHER, 0.0]
    examples = Examples(row=torch.arange(3), cluster=torch.tensor([1, 2, -5]), log_ways=log_ways)
    weight = LogWeights.of(examples, 3, Inclusion(torch.tensor([[row, row]], dtype=torch.float64)))
    memory = examples.unpacked(examples.packed()).take(slice(0, 2))
    tile = weight.beside(memory, slice(0, 2)).tile(slice(0, 3), slice(0, 5))
    among_two = [-math.log(math.exp(-OTHER + way) + 2) for way in log_ways.tolist()]  # a way is one into the batch
    torch.testing.assert_close(tile[0, 3:], torch.tensor(among_two[:2], dtype=torch.float64))
    own = [SAME - log_ways[0].item(), *among_two[1:]]
    torch.testing.assert_close(tile[0, :3], torch.tensor(own, dtype=torch.float64))


def test_embeddings_of_another_width_are_refused():
    loss = CrossBatchInfoNCE(N, memory_size=SIZE)
    anchors, positives, index = draw(0)
    loss(anchors.float(), positives.float(), index=index)
    with pytest.raises(AnybatchError, match="remembers embeddings of 5 dimensions, these have 3"):
        loss(anchors[:, :3].float(), positives[:, :3].float(), index=index)
