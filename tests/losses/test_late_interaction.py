"""MaxSim in tiles against its slow twin and against sentence-transformers' own, and on ranks."""

import pytest
import torch

from anybatch.core.errors import AnybatchError
from anybatch.losses.late_interaction import LateInteraction
from tests.ranks import on_ranks


def maxsim(anchors, candidates, anchor_mask, candidate_mask):
    """The slow reference: all scores (B, M) at once, by autograd."""
    similarity = torch.einsum("itd,jud->ijtu", anchors, candidates)
    best = similarity.masked_fill(~candidate_mask.bool()[None, :, None, :], -torch.inf).amax(dim=3)
    return (best * anchor_mask[:, None, :].to(best.dtype)).sum(dim=2)


def ragged(rows, width, dimensions=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    tokens = torch.randn(rows, width, dimensions, generator=generator, dtype=torch.float64)
    return tokens, torch.arange(width) < lengths[:, None]


def twin(anchors, candidates, anchor_mask, candidate_mask, temperature, log_weight=None, margin=torch.inf):
    anchors, candidates = (torch.nn.functional.normalize(side, dim=-1) for side in (anchors, candidates))
    scores = maxsim(anchors, candidates, anchor_mask, candidate_mask)
    logits = (scores / temperature).masked_fill(scores > scores.diagonal()[:, None] + margin, -torch.inf)
    logits = logits if log_weight is None else logits + log_weight
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(anchors)))


def both(rows, columns, tile_bytes, log_weight=None, margin=None):
    (q, q_mask), (d, d_mask) = ragged(rows, 7), ragged(columns, 11, seed=1)
    found = []
    for name in ("ours", "twin"):
        options = {"temperature": 0.4, "learnable_temperature": True, "tile_bytes": tile_bytes, "mask_margin": margin}
        loss = LateInteraction(**options).double()
        leaves = [side.clone().requires_grad_() for side in (q, d)]
        if name == "ours":
            value = loss(*leaves, anchor_mask=q_mask, candidate_mask=d_mask, log_weight=log_weight)
        else:
            tau = loss.temperatures.log_temperature.exp()
            value = twin(*leaves, q_mask, d_mask, tau, log_weight, torch.inf if margin is None else margin)
        (value * 3).backward()
        found.append([value, *(leaf.grad for leaf in leaves), loss.temperatures.log_temperature.grad])
    return found


@pytest.mark.parametrize("margin", [None, 0.2])
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (7, 19), (1, 3)])
@pytest.mark.parametrize("tile_bytes", [1, 3000, 2**25])
def test_equals_the_twin(rows, columns, tile_bytes, margin):
    for mine, wanted in zip(*both(rows, columns, tile_bytes, margin=margin)):
        torch.testing.assert_close(mine, wanted, rtol=1e-11, atol=1e-13)


def test_removed_pairs():
    log_weight = torch.zeros(6, 9, dtype=torch.float64)
    log_weight[2, 5], log_weight[0, 8], log_weight[3, 1] = -torch.inf, 0.7, -0.3
    ours, wanted = both(6, 9, 2000, log_weight)
    for mine, other in zip(ours, wanted):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-13)


def test_identical_candidates_are_no_negatives():
    (q, q_mask), (d, d_mask) = ragged(4, 3), ragged(4, 5, seed=1)
    masks = {"anchor_mask": q_mask, "candidate_mask": d_mask}
    loss, ids = LateInteraction(), torch.arange(4)
    full = loss(q, d, anchor_id=ids, candidate_id=ids, **masks)
    less = loss(q, d, anchor_id=ids, candidate_id=torch.tensor([0, 1, 0, 3]), **masks)
    torch.testing.assert_close(full, loss(q, d, **masks))
    assert less < full


def test_scores_are_those_of_sentence_transformers():
    from sentence_transformers.util import maxsim as theirs

    (q, q_mask), (d, d_mask) = ragged(5, 4), ragged(6, 9, seed=1)
    wanted = theirs(q.float(), d.float(), a_mask=q_mask, b_mask=d_mask)
    torch.testing.assert_close(maxsim(q, d, q_mask, d_mask).float(), wanted, rtol=1e-5, atol=1e-5)


def test_mistakes():
    (q, q_mask), (d, d_mask) = ragged(4, 3), ragged(4, 5, seed=1)
    with pytest.raises(AnybatchError, match="M >= B"):
        LateInteraction()(q, d[:2])
    with pytest.raises(AnybatchError, match="one entry a token"):
        LateInteraction()(q, d, candidate_mask=q_mask)
    d_mask[2] = False
    with pytest.raises(AnybatchError, match="Candidate 2 has no token"):
        LateInteraction()(q, d, candidate_mask=d_mask)


SHARES = [5, 3]


def shared(rank):
    """A rank's part of the batch, its candidates as wide as its own longest."""
    (q, q_mask), (d, d_mask) = ragged(sum(SHARES), 6), ragged(sum(SHARES), 9, seed=1)
    d_mask[: SHARES[0], 7:] = False
    rows = slice(sum(SHARES[:rank]), sum(SHARES[: rank + 1]))
    width = 7 if rank == 0 else 9
    return q[rows], q_mask[rows], d[rows, :width], d_mask[rows, :width]


def on_rank(rank, world_size):
    q, q_mask, d, d_mask = shared(rank)
    loss = LateInteraction(temperature=0.4, learnable_temperature=True, tile_bytes=1500).double()
    q, d = q.clone().requires_grad_(), d.clone().requires_grad_()
    value = loss(q, d, anchor_mask=q_mask, candidate_mask=d_mask)
    value.backward()
    return [value.detach(), q.grad, d.grad, loss.temperatures.log_temperature.grad]


@pytest.mark.distributed
def test_ranks_equal_one_process():
    results = on_ranks(on_rank, 2)
    (q, q_mask), (d, d_mask) = ragged(sum(SHARES), 6), ragged(sum(SHARES), 9, seed=1)
    d_mask[: SHARES[0], 7:] = False
    q, d = q.requires_grad_(), d.requires_grad_()
    loss = LateInteraction(temperature=0.4, learnable_temperature=True).double()
    value = twin(q, d, q_mask, d_mask, loss.temperatures.log_temperature.exp())
    value.backward()
    for rank, (got, d_q, d_d, d_tau) in enumerate(results):
        rows = slice(sum(SHARES[:rank]), sum(SHARES[: rank + 1]))
        torch.testing.assert_close(got, value.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(d_q / 2, q.grad[rows], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(d_d / 2, d.grad[rows, : d_d.shape[1]], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(d_tau, loss.temperatures.log_temperature.grad, rtol=1e-11, atol=1e-13)
