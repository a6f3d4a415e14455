"""Candidates that travel in a ring give what gathered candidates give, on 2 and 3 gloo ranks with uneven and empty
shares.
"""

from __future__ import annotations

import pytest
import torch

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.family import NUCLR, SCENT, DebiasedInfoNCE, FastCLIP, ISogCLR
from anybatch.losses import CountCorrectedInfoNCE, DecoupledInfoNCE, InfoNCE, Matryoshka, SogCLR
from anybatch.losses.engine import Answer, Side, softmax_loss
from anybatch.losses.registry import LossConfig, build_loss
from tests.ranks import on_ranks

from .methods import cluster_weights

DIMENSIONS = 5
# Rows and explicit negatives of each rank; one rank has no negatives, another nothing at all.
SHARES = {2: [(3, 2), (5, 1)], 3: [(5, 0), (0, 0), (3, 3)]}
COMMON = {"temperature": 0.2, "learnable_temperature": True}
MAKE = {
    "infonce": lambda **k: InfoNCE(**COMMON, **k),
    "infonce both": lambda **k: InfoNCE(direction="both", **COMMON, **k),
    "decoupled both": lambda **k: DecoupledInfoNCE(direction="both", **COMMON, **k),
    "count corrected": lambda **k: CountCorrectedInfoNCE(40, **COMMON, **k),
    "sogclr": lambda **k: SogCLR(40, gamma=0.4, **COMMON, **k),
    "sogclr both": lambda **k: SogCLR(40, gamma=0.4, direction="both", **COMMON, **k),
    "scent": lambda **k: SCENT(40, **COMMON, **k),
    "fastclip v2 both": lambda **k: FastCLIP(40, version="v2", gamma=0.4, **k),
    "isogclr": lambda **k: ISogCLR(40, gamma=0.4, **k),
    "nuclr both": lambda **k: NUCLR(40, gamma=0.4, margin_lr=0.05, direction="both", **k),
    "debiased both": lambda **k: DebiasedInfoNCE(direction="both", **k),
    "prefixes": lambda **k: Matryoshka(SogCLR(40, gamma=0.4, **COMMON, **k), [5, 2]),
}
WEIGHTED = ("sogclr", "sogclr both", "count corrected")


class Halved:
    """A rule that is none of the library's, and looks at all rows at once."""

    row_wise = False

    def __call__(self, log_sum, num_negatives, rows):
        return Answer(log_sum + 0.5, log_sum + 0.1 * num_negatives)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    anchors, positives, negatives = (
        torch.randn(n, DIMENSIONS, generator=generator, dtype=torch.float64) for n in (8, 8, 3)
    )
    return {
        "embeddings": (anchors, positives, negatives),
        "index": torch.tensor([3, 9, 3, 11, 0, 9, 20, 5]),
        "anchor_id": torch.tensor([0, 1, 0, 3, 4, 1, 6, 7]),
        "positive_id": torch.tensor([0, 1, 2, 3, 2, 5, 6, 7]),
        "negative_id": torch.tensor([7, 8, 0]),
        "cluster": torch.tensor([0, 0, 1, 1, -1, 0, 2, 2]),
    }


def run(name, rows, extras, **options):
    """Two steps on a share of the rows; values, gradients of embeddings and of the temperature, and the state."""
    torch.manual_seed(0)  # a network begins at random
    loss = MAKE[name](**options).double()
    results = []
    for step in range(2):
        given = batch(step)
        mine = [
            side[part].clone().requires_grad_()
            for side, part in zip(given["embeddings"], (rows, rows, extras), strict=True)
        ]
        known = {
            "index": given["index"][rows],
            "anchor_id": given["anchor_id"][rows],
            "candidate_id": torch.cat([given["positive_id"][rows], given["negative_id"][extras]]),
        }
        if name in WEIGHTED:
            cluster = given["cluster"][rows]
            columns = torch.cat([cluster, torch.full((len(mine[2]),), -2)])
            known["log_weight"] = cluster_weights(columns, len(cluster), same=-3.0, other=-1.5)
        loss.zero_grad()
        value = loss(mine[0], torch.cat(mine[1:]), **known)
        value.backward()
        own = [parameter.grad.clone() for parameter in loss.parameters()]
        results.append((value.detach(), [side.grad for side in mine], own))
    with torch.no_grad():
        quiet = loss(mine[0], torch.cat(mine[1:]), **known)
    return results, dict(loss.state_dict()), quiet


def run_engine(rows, extras, *, ring):
    """Temperatures of rows that learn, weights of rows, pulls of columns."""
    anchors, positives, negatives = batch(0)["embeddings"]
    generator = torch.Generator().manual_seed(9)
    tau, row_weight = (0.2 + torch.rand(8, generator=generator, dtype=torch.float64) for _ in range(2))
    mine = [side[rows].clone().requires_grad_() for side in (anchors, positives, tau)]
    side = Side(
        temperature=mine[2],
        rule=Halved(),
        row_weight=row_weight[rows],
        column_weight=lambda part: row_weight[rows][part],
    )
    value, (stats,) = softmax_loss(mine[0], torch.cat([mine[1], negatives[extras]]), side, tile_bytes=100, ring=ring)
    value.backward()
    return value.detach(), [side.grad for side in mine], stats.column_gradient, stats.num_negatives


def worker(rank, world_size):
    shares = SHARES[world_size]
    first = [sum(share[kind] for share in shares[:rank]) for kind in (0, 1)]
    rows, extras = (slice(start, start + size) for start, size in zip(first, shares[rank], strict=True))
    gather, gathered = distributed.gather_rows, []

    def watched(values, sizes):
        gathered.append(tuple(values.shape))
        return gather(values, sizes)

    distributed.gather_rows = watched
    results = {}
    for tile in (1, 10**7):
        for name in MAKE:
            results[name, tile, "ring"] = run(name, rows, extras, tile_bytes=tile, ring=True)
    results["engine", "ring"] = run_engine(rows, extras, ring=True)
    in_ring = {shape[-1] for shape in gathered if len(shape) == 2}
    for name in MAKE:
        results[name, "gathered"] = run(name, rows, extras)
    results["engine", "gathered"] = run_engine(rows, extras, ring=False)
    results["refused"] = False
    side = Side(temperature=torch.tensor(0.2), rule=Halved(), adjust=lambda rows, scores, logits: logits)
    try:
        softmax_loss(torch.zeros(2, 3), torch.zeros(2, 3), side, ring=True)
    except AnybatchError as error:
        results["refused"] = "whole rows" in str(error)
    results["candidates were gathered"] = DIMENSIONS in in_ring
    return results


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_ring_equals_gathered_and_one_process(world_size):
    ranks = on_ranks(worker, world_size)
    for name in MAKE:
        alone, state, quiet = run(name, slice(0, 8), slice(0, 3))
        for tile in (1, 10**7):
            for rank in ranks:
                close(rank[name, tile, "ring"], rank[name, "gathered"])
                close(rank[name, tile, "ring"][1:], (state, quiet))
            for step, (value, gradients, own) in enumerate(alone):
                of_ranks = [rank[name, tile, "ring"][0][step] for rank in ranks]
                for place, expected in enumerate(gradients):
                    close(torch.cat([mine[1][place] for mine in of_ranks]) / world_size, expected)
                for mine in of_ranks:
                    close((mine[0], mine[2]), (value, own))
    for rank in ranks:
        close(rank["engine", "ring"], rank["engine", "gathered"])
        assert rank["refused"]
        assert not rank["candidates were gathered"]


def test_alone_it_is_the_plain_loss():
    ours, theirs = (run("sogclr both", slice(0, 8), slice(0, 3), ring=ring) for ring in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_settings():
    assert build_loss(LossConfig(name="sogclr", ring=True), num_rows=10).ring
    with pytest.raises(AnybatchError, match=r"loss.ring is given, and 'glofnd' looks at whole rows"):
        LossConfig(name="glofnd", ring=True)
