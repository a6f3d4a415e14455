"""Models for images and texts under the cached step: every layout of pixels, every form of a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import distributed as dist
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from anybatch.caching import RowSlicer, plan_mini_batches
from anybatch.integrations.sentence_transformers import CachedLoss
from anybatch.integrations.sentence_transformers.collating import UndecodedRows, lengths_of_rows
from anybatch.losses import InfoNCE
from tests import vision_models as vision
from tests.caching.helpers import gradients, relative_error
from tests.ranks import on_ranks

ROWS = 7
OF_RANKS = ("clip", *vision.CHAT_MODELS)


def columns_of(kind: str, form: str, count: int = ROWS) -> list[list]:
    return [vision.rows(form, count), vision.rows("image" if kind == "vit" else "text", count, first=20)]


def ranking(anchors, candidates):
    """The formula of the peer's loss at scale 20."""
    scores = normalize(anchors, dim=-1) @ normalize(candidates, dim=-1).T * 20
    return cross_entropy(scores, torch.arange(len(anchors)))


def plain(model, features, *, mini_batch_size=None, trim: Any = "trailing"):
    """One graph over whole columns, or over their mini-batches: what dropout must be compared with."""
    model.zero_grad()
    torch.manual_seed(3)
    sides = []
    for column in features:
        if mini_batch_size is None:
            sides.append(model(dict(column))["sentence_embedding"])
            continue
        slicer = RowSlicer(column)
        slicer.trim_to(trim)
        plan = plan_mini_batches(slicer, mini_batch_size=mini_batch_size)
        parts = [model(slicer.take(rows))["sentence_embedding"] for rows in plan]
        sides.append(torch.cat(parts)[torch.argsort(torch.cat(plan))])
    value = ranking(*[side.to(torch.promote_types(side.dtype, torch.float32)) for side in sides])
    value.backward()
    return value.detach(), gradients(model)


def stepped(model, features, loss):
    model.zero_grad()
    torch.manual_seed(3)
    value = loss([dict(column) for column in features], None)
    value.backward()
    return value.detach(), gradients(model)


def cached(model, features, **settings):
    return stepped(model, features, CachedLoss(model, InfoNCE(temperature=0.05), **settings))


def undecoded(values) -> dict:
    return {"pixel_values": UndecodedRows(values)}


def features_of(model, columns) -> list[dict]:
    return [dict(model.preprocess(column)) for column in columns]


CASES = [(kind, form) for kind in vision.KINDS for form in vision.forms(kind)]


@pytest.mark.parametrize(("kind", "form"), CASES, ids=map("-".join, CASES))
def test_equals_the_plain_step_and_the_peers(kind, form):
    model, columns = vision.load(kind), columns_of(kind, form)
    features = features_of(model, columns)
    value, wanted = plain(model, features)
    for settings in (
        {"mini_batch_size": 2, "keep_graphs": 0.0},
        {"mini_batch_size": 3, "keep_graphs": 0.5},
        {"mini_batch_size": 4, "max_tokens": 70},
        {"mini_batch_size": "auto"},
    ):
        got = cached(model, features, **settings)
        torch.testing.assert_close(got[0], value, rtol=1e-12, atol=0)
        assert relative_error(got[1], wanted) < 1e-12
        if form != "text" and settings["mini_batch_size"] != "auto":
            again = cached(model, [undecoded(columns[0]), features[1]], **settings)
            assert relative_error(again[1], got[1]) == 0  # not a bit
    if kind != "siglip":  # whose texts the peer cuts where padding counts
        peer = stepped(model, features, CachedMultipleNegativesRankingLoss(model, mini_batch_size=2))
        assert relative_error(peer[1], wanted) < 1e-12


@pytest.mark.parametrize("kind", vision.KINDS)
@pytest.mark.parametrize("way", ["lora", "checkpointing", "dropout", "bf16"])
def test_with(kind, way):
    options: dict[str, Any] = {"dropout": 0.2} if way == "dropout" else {way: True} if way != "bf16" else {}
    model = vision.load(kind, **options)
    if way == "bf16":
        model.float()
    columns = columns_of(kind, vision.forms(kind)[-1])
    features = features_of(model, columns)
    trim = "none" if kind == "siglip" else "trailing"  # which of SigLIP's embeddings depend on padding
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
        _, wanted = plain(model, features, mini_batch_size=3 if way in ("dropout", "bf16") else None, trim=trim)
        one = cached(model, features, mini_batch_size=3, keep_graphs=0.0)[1]
        two = cached(model, [undecoded(columns[0]), features[1]], mini_batch_size=3, keep_graphs=0.4)[1]
    assert relative_error(two, one) == 0  # not a bit
    # One graph adds the gradients of its weights in bfloat16.
    tolerance = 0.05 if way == "bf16" else 1e-12
    assert relative_error(one, wanted) < tolerance
    if way == "dropout":
        assert relative_error(plain(model, features)[1], wanted) > 1e-3  # it drops


@pytest.mark.parametrize("kind", vision.CHAT_MODELS)
def test_tokens_and_patches_are_known_without_decoding(kind, monkeypatch):
    model, values = vision.load(kind), vision.rows("mixed", 12)
    slicer = RowSlicer(model.preprocess(values))
    lengths_of_rows(model, values, {})  # measures its figures once
    monkeypatch.setattr(model[0].processor.image_processor, "preprocess", None)
    lengths, patches = lengths_of_rows(model, values, {})
    assert lengths is not None
    assert patches is not None
    assert slicer.lengths is not None
    assert slicer.patches is not None
    assert lengths.tolist() == slicer.lengths.tolist()
    assert patches.tolist() == slicer.patches.tolist()
    assert patches[0] == 0 < patches[1]
    budget = 2 * int((lengths + patches).max())
    for rows in plan_mini_batches(slicer, mini_batch_size=None, max_tokens=budget):
        assert len(rows) * int(lengths[rows].max()) + int(patches[rows].sum()) <= budget


def _of_ranks(rank, world_size, folders):
    """The first rank has images, the other one texts alone: of its vision tower no parameter is used."""
    from torch.nn import Module

    class Whole(Module):
        def __init__(self, model):
            super().__init__()
            self.inner = DistributedDataParallel(model)
            self.preprocess = model.preprocess

        def forward(self, features):
            return self.inner(features)

    errors = {}
    for kind, folder in folders.items():
        texts = vision.rows("text", 3)
        anchors = vision.rows("image", 6) if kind == "clip" else [*vision.rows("mixed", 3, first=1), *texts]
        columns = [anchors, vision.rows("text", 6, first=20)]
        model = vision.load(kind, folder=folder)
        _, wanted = plain(model, features_of(model, columns))
        model.zero_grad()
        loss = CachedLoss(Whole(model), InfoNCE(temperature=0.05), mini_batch_size=2)
        mine = [column[rank * 3 : rank * 3 + 3] for column in columns]
        first = undecoded(mine[0]) if kind == "clip" or rank == 0 else dict(model.preprocess(mine[0]))
        loss([first, dict(model.preprocess(mine[1]))]).backward()
        errors[kind] = relative_error(gradients(model), wanted)
    assert dist.is_initialized()
    return errors


@pytest.mark.distributed
def test_two_ranks_are_one_process():
    folders = {kind: vision.folder_of(kind) for kind in OF_RANKS}
    for errors in on_ranks(_of_ranks, 2, folders):
        assert max(errors.values()) < 1e-12, errors
