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
from anybatch.losses.engine import Side, softmax_loss
from anybatch.losses.registry import LossConfig, build_loss
from tests.ranks import on_ranks

from .test_ranks import Halved, run, run_engine, share_of

DIMENSIONS = 5
EVERYTHING = slice(0, 8), slice(0, 3)
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


def run_named(name, rows, extras, **options):
    return run(lambda: MAKE[name](**options), rows, extras, weighted=name in WEIGHTED)


def worker(rank, world_size):
    mine = share_of(rank, SHARES[world_size])
    gather, gathered = distributed.gather_rows, []

    def watched(values, sizes):
        gathered.append(tuple(values.shape))
        return gather(values, sizes)

    distributed.gather_rows = watched
    results = {}
    for tile in (1, 10**7):
        for name in MAKE:
            results[name, tile, "ring"] = run_named(name, *mine, tile_bytes=tile, ring=True)
    results["engine", "ring"] = run_engine(100, *mine, ring=True)
    in_ring = {shape[-1] for shape in gathered if len(shape) == 2}
    for name in MAKE:
        results[name, "gathered"] = run_named(name, *mine)
    results["engine", "gathered"] = run_engine(100, *mine)
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
        alone, state, quiet = run_named(name, *EVERYTHING)
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
    ours, theirs = (run_named("sogclr both", *EVERYTHING, ring=ring) for ring in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_settings():
    assert build_loss(LossConfig(name="sogclr", ring=True), num_rows=10).ring
    with pytest.raises(AnybatchError, match=r"loss.ring is given, and 'glofnd' looks at whole rows"):
        LossConfig(name="glofnd", ring=True)
