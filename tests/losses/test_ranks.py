"""W gloo ranks with uneven shares equal one process with the same global batch: loss, gradients, state."""

from __future__ import annotations

import pytest
import torch

from anybatch.losses import CountCorrectedInfoNCE, InfoNCE, SogCLR
from anybatch.losses.engine import Answer, Side, softmax_loss
from tests.ranks import on_ranks

from .methods import ALL, cluster_weights

SHARES = {2: [(3, 2), (5, 1)], 3: [(4, 0), (1, 2), (3, 1)]}  # rows and explicit negatives of each rank
MAKE = {
    "infonce": lambda tile: InfoNCE(temperature=0.2, learnable_temperature=True, tile_bytes=tile),
    "infonce both": lambda tile: InfoNCE(
        temperature=0.2, learnable_temperature=True, tile_bytes=tile, direction="both"
    ),
    "count corrected": lambda tile: CountCorrectedInfoNCE(
        40, temperature=0.2, learnable_temperature=True, tile_bytes=tile
    ),
    "sogclr both": lambda tile: SogCLR(
        40, gamma=0.4, temperature=0.2, learnable_temperature=True, direction="both", tile_bytes=tile
    ),
    "sogclr weights": lambda tile: SogCLR(40, gamma=0.4, temperature=0.2, learnable_temperature=True, tile_bytes=tile),
}
# Every method in both directions, on two ranks.
METHODS = {
    f"method {name}": lambda tile, make=make: make(temperature=0.2, direction="both", tile_bytes=tile)
    for name, make in ALL.items()
}


def named(world_size):
    return {**MAKE, **METHODS} if world_size == 2 else MAKE


def batch(step):
    generator = torch.Generator().manual_seed(step)
    anchors = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    positives = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    negatives = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    index = torch.tensor([3, 9, 3, 11, 0, 9, 20, 5])  # row 3 twice on one rank, row 9 on two
    index = index + 2 * step  # some rows come again, and others are remembered beside them
    anchor_id = torch.tensor([0, 1, 0, 3, 4, 1, 6, 7])
    positive_id, negative_id = torch.tensor([0, 1, 2, 3, 2, 5, 6, 7]), torch.tensor([7, 8, 0])
    cluster = torch.tensor([0, 0, 1, 1, -1, 0, 2, 2])
    return anchors, positives, negatives, index, anchor_id, positive_id, negative_id, cluster


def share_of(rank, shares):
    """Which rows and which explicit negatives are a rank's."""
    first = [sum(share[kind] for share in shares[:rank]) for kind in (0, 1)]
    return tuple(slice(start, start + size) for start, size in zip(first, shares[rank], strict=True))


def run(make, rows, extras, *, weighted=False):
    """Three steps on the share `rows` of the rows and `extras` of the negatives; with slices of everything this is
    one process. Values and gradients of each; the state; a value without gradients.
    """
    torch.manual_seed(0)  # a network starts the same everywhere
    loss = make().double()
    results = []
    for step in range(3):
        anchors, positives, negatives, index, anchor_id, positive_id, negative_id, cluster = batch(step)
        mine = [side[rows].clone().requires_grad_() for side in (anchors, positives)] + [
            negatives[extras].clone().requires_grad_()
        ]
        known = {"anchor_id": anchor_id[rows], "candidate_id": torch.cat([positive_id[rows], negative_id[extras]])}
        if weighted:
            columns = torch.cat([cluster[rows], torch.full((len(mine[2]),), -2)])
            known["log_weight"] = cluster_weights(columns, len(mine[0]), same=-3.0, other=-1.5)
        loss.zero_grad()
        value = loss(mine[0], torch.cat(mine[1:]), index=index[rows], **known)
        value.backward()
        own = [parameter.grad.clone() for parameter in loss.parameters()]
        results.append((value.detach(), [side.grad for side in mine], own))
    with torch.no_grad():
        quiet = loss(mine[0], torch.cat(mine[1:]), index=index[rows], **known)
    return results, {key: item.clone() for key, item in loss.state_dict().items()}, quiet


def run_engine(tile, rows, extras):
    """The engine itself, with a learned temperature for each row and direction, row weights, column gradients."""
    anchors, positives, negatives, *_, cluster = batch(0)
    generator = torch.Generator().manual_seed(9)
    taus = [0.2 + torch.rand(8, generator=generator, dtype=torch.float64) for _ in range(2)]
    row_weight = torch.rand(8, generator=generator, dtype=torch.float64)
    mine = [side[rows].clone().requires_grad_() for side in (anchors, positives, *taus)]
    explicit = negatives[extras].clone().requires_grad_()
    candidates = torch.cat([mine[1], explicit])
    columns = torch.cat([cluster[rows], torch.full((len(explicit),), -2)])
    weight = cluster_weights(columns, len(mine[0]), same=-3.0, other=-1.5)
    weights = (weight, weight.reversed(len(mine[0])))
    sides = [
        Side(rule=Halved(), temperature=tau, log_weight=b, row_weight=row_weight[rows])
        for tau, b in zip(mine[2:], weights, strict=True)
    ]
    both, stats = softmax_loss(mine[0], candidates, *sides, tile_bytes=tile)
    side = Side(
        rule=Halved(),
        temperature=mine[2],
        log_weight=weight,
        column_weight=lambda part: row_weight[rows][part],
    )
    one, (pulls,) = softmax_loss(mine[0], candidates, side, tile_bytes=tile)
    (both + 0.5 * one).backward()
    figures = [stats[1].log_sum, stats[1].num_negatives, stats[1].temperature_gradient]
    gradients = [side.grad for side in (*mine, explicit)]
    return both.detach(), one.detach(), gradients, figures, pulls.column_gradient


class Halved:
    """A rule that is none of the library's, and looks at all rows at once."""

    row_wise = False

    def __call__(self, log_sum, num_negatives, rows):
        return Answer(log_sum + 0.5, log_sum + 0.1 * num_negatives)


def run_named(name, tile, rows, extras):
    make = {**MAKE, **METHODS}[name]
    return run(lambda: make(tile), rows, extras, weighted=name == "sogclr weights")


def worker(rank, world_size):
    mine = share_of(rank, SHARES[world_size])
    engines = {tile: run_engine(tile, *mine) for tile in (1, 10**7)}
    losses = {(name, tile): run_named(name, tile, *mine) for name in named(world_size) for tile in (1, 10**7)}
    return losses, engines


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_process(world_size):
    ranks, engines = zip(*on_ranks(worker, world_size), strict=True)
    both, one, gradients, figures, pull = run_engine(10**7, slice(0, 8), slice(0, 3))
    for tile in (1, 10**7):
        for rank in engines:
            torch.testing.assert_close(rank[tile][:2], (both, one), rtol=1e-12, atol=1e-12)
        for place, expected in enumerate(gradients):
            together = torch.cat([rank[tile][2][place] for rank in engines]) / world_size
            torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-12)
        for place, expected in enumerate(figures):
            together = torch.cat([rank[tile][3][place] for rank in engines])
            torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-12)
        for rank in range(world_size):
            rows, _ = share_of(rank, SHARES[world_size])
            mine = engines[rank][tile][4][: rows.stop - rows.start]
            torch.testing.assert_close(mine, pull[rows], rtol=1e-12, atol=1e-12)
    for name in named(world_size):
        alone, alone_state, _ = run_named(name, 10**7, slice(0, 8), slice(0, 3))
        for tile in (1, 10**7):
            for step in range(3):
                value, gradients, own = alone[step]
                for column in range(3):
                    together = torch.cat([rank[name, tile][0][step][1][column] for rank in ranks]) / world_size
                    torch.testing.assert_close(together, gradients[column], rtol=1e-10, atol=1e-12)
                for rank in ranks:
                    torch.testing.assert_close(rank[name, tile][0][step][0], value, rtol=1e-12, atol=1e-12)
                    for mine, expected in zip(rank[name, tile][0][step][2], own, strict=True):
                        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
            for rank in ranks:
                for key, state in rank[name, tile][1].items():
                    torch.testing.assert_close(state, alone_state[key], rtol=1e-10, atol=1e-12, equal_nan=True)
