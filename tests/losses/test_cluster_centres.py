"""ClusterCentreInfoNCE against a naive float64 twin, its memory, its masks, its ranks."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from anybatch.errors import AnybatchError
from anybatch.losses import ClusterCentreInfoNCE, ClusterLogWeight, InfoNCE
from tests import reference

TAU = 0.2


class Twin:
    """Dictionaries and loops; one direction."""

    def __init__(self, cluster):
        self.cluster, self.num_clusters = cluster, max(cluster) + 1
        self.members, self.exact, self.estimated = {}, None, None

    def step(self, anchors, positives, index, allowed):
        own = [self.cluster[row] for row in index]
        unit_a, unit_p = reference.unit(anchors), reference.unit(positives)
        for c in set(own) - {-1}:
            self.members[c] = [unit_p[j].detach() for j in range(len(own)) if own[j] == c]
        outside = [c for c in range(self.num_clusters) if c not in own]
        seen = [c for c in outside if c in self.members]
        factor = (len(outside) / len(seen) if seen else 1.0) * (self.exact / self.estimated if self.exact else 1.0)
        total, exact, estimated = 0.0, 0.0, 0.0
        for i in range(len(index)):
            s = unit_a[i] @ unit_p.T / TAU
            denominator = s[i].exp() + sum(s[j].exp() for j in range(len(index)) if allowed[i, j])
            for c in seen:
                centre = torch.stack(self.members[c]).mean(0)
                denominator = denominator + len(self.members[c]) * factor * (unit_a[i] @ centre / TAU).exp()
            total = total + denominator.log() - s[i]
            for c in set(own) - {-1, own[i]}:
                rows = [j for j in range(len(index)) if own[j] == c]
                exact += (sum(s[j].exp() for j in rows) / denominator).item()
                centre = torch.stack(self.members[c]).mean(0)
                estimated += (len(rows) * (unit_a[i] @ centre / TAU).exp() / denominator).item()
        if exact > 0:
            rate = 1.0 if self.exact is None else 0.02
            self.exact = rate * exact + (1 - rate) * (self.exact or 0.0)
            self.estimated = rate * estimated + (1 - rate) * (self.estimated or 0.0)
        return total / len(index)


def draw(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 5, dtype=torch.float64, generator=generator) for _ in range(2))


BATCHES = (
    [0, 1, 2, 6, 7, 8],
    [3, 4, 5, 9, 10, 11],
    [0, 1, 12, 6, 7, 8],
    [9, 10, 11, 0, 1, 2, 12],
)  # ragged; 12 has no cluster
CLUSTER = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, -1]


@pytest.mark.parametrize("tile_bytes", [1, 10**6])
@pytest.mark.parametrize("ids", [False, True])
def test_equals_its_twin_over_several_steps(tile_bytes, ids):
    loss = ClusterCentreInfoNCE(torch.tensor(CLUSTER), dimensions=5, temperature=TAU, tile_bytes=tile_bytes).double()
    twin = Twin(CLUSTER)
    for step, rows in enumerate(BATCHES * 2):
        anchors, positives = draw(len(rows), step)
        known = {}
        if ids:
            known = {"anchor_id": torch.tensor(rows) // 2, "candidate_id": torch.tensor(rows) % 5}
        allowed = reference.pairs_allowed(len(rows), len(rows), **known)
        gradients = []
        values = []
        for method in ("ours", "twin"):
            leaves = anchors.clone().requires_grad_(), positives.clone().requires_grad_()
            if method == "ours":
                value = loss(*leaves, index=torch.tensor(rows), **known)
            else:
                value = twin.step(*leaves, rows, allowed)
            values.append(value.item())
            gradients.append(torch.autograd.grad(value, leaves))
        assert values[0] == pytest.approx(values[1], rel=1e-10)
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert loss.offset.item() == pytest.approx(math.log(twin.exact / twin.estimated), rel=1e-9)
    assert loss.offset.item() > 0  # Jensen: the centre's exponential is the smaller one


def test_clusters_of_identical_rows_make_it_exact():
    """With no spread inside a cluster, the far field is no approximation: the loss is InfoNCE over all rows."""
    generator = torch.Generator().manual_seed(0)
    positives = torch.randn(4, 6, dtype=torch.float64, generator=generator).repeat_interleave(5, 0)
    anchors = torch.randn(20, 6, dtype=torch.float64, generator=generator)
    cluster = torch.arange(20) // 5
    loss = ClusterCentreInfoNCE(cluster, dimensions=6, temperature=TAU).double()
    everything = torch.arange(20)
    for start in (0, 10):
        rows = everything[start : start + 10]
        loss(anchors[rows].requires_grad_(), positives[rows], index=rows)
    whole, part = (anchors.clone().requires_grad_() for _ in range(2))
    InfoNCE(temperature=TAU)(whole, positives).backward()
    rows = everything[:10]
    loss(part[rows], positives[rows], index=rows).backward()
    torch.testing.assert_close(part.grad[rows] * 10, whole.grad[rows] * 20, rtol=1e-9, atol=1e-12)


def test_both_directions_keep_their_own_centres():
    loss = ClusterCentreInfoNCE(torch.tensor(CLUSTER), dimensions=5, temperature=TAU, direction="both").double()
    back = ClusterCentreInfoNCE(torch.tensor(CLUSTER), dimensions=5, temperature=TAU).double()
    there = ClusterCentreInfoNCE(torch.tensor(CLUSTER), dimensions=5, temperature=TAU).double()
    for step, rows in enumerate(BATCHES):
        anchors, positives = (side.requires_grad_() for side in draw(len(rows), step))
        index = torch.tensor(rows)
        value = loss(anchors, positives, index=index)
        expected = (there(anchors, positives, index=index) + back(positives, anchors, index=index)) / 2
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)


def test_only_training_updates_and_resume_is_exact():
    def steps(loss, batches, seed):
        for step, rows in enumerate(batches, start=seed):
            anchors, positives = draw(len(rows), step)
            loss(anchors.float().requires_grad_(), positives.float(), index=torch.tensor(rows)).backward()

    make = lambda: ClusterCentreInfoNCE(torch.tensor(CLUSTER), dimensions=5)  # noqa: E731
    whole, first, second = make(), make(), make()
    steps(whole, BATCHES, 0)
    steps(first, BATCHES[:2], 0)
    second.load_state_dict(first.state_dict())
    steps(second, BATCHES[2:], 2)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    whole.eval()
    steps(whole, BATCHES[:1], 7)
    with torch.no_grad():
        whole.train()(*(side.float() for side in draw(3, 0)), index=torch.tensor([0, 1, 2]))
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())


def test_hostile_similarities_stay_finite():
    loss = ClusterCentreInfoNCE(np.arange(8) // 2, dimensions=4, temperature=0.005, learnable_temperature=True)
    for sign in (1.0, -1.0):
        for rows in ([0, 1, 2, 3], [4, 5, 6, 7]):
            anchors = torch.eye(4).requires_grad_()
            value = loss(anchors, sign * torch.eye(4).roll(1, 0), index=torch.tensor(rows))
            value.backward()
            assert value.isfinite()
            assert anchors.grad.isfinite().all()
            assert loss.offset.isfinite().all()


def test_mistakes():
    loss = ClusterCentreInfoNCE(torch.tensor(CLUSTER), dimensions=5)
    rows = torch.ones(2, 5)
    with pytest.raises(AnybatchError, match="give index="):
        loss(rows, rows)
    with pytest.raises(AnybatchError, match="rows 0 to 12"):
        loss(rows, rows, index=torch.tensor([0, 13]))
    with pytest.raises(AnybatchError, match="dimensions=3"):
        loss(rows[:, :3], rows[:, :3], index=torch.tensor([0, 1]))
    with pytest.raises(AnybatchError, match="No row has a cluster"):
        ClusterCentreInfoNCE(torch.full((4,), -1), dimensions=5)
    weight = ClusterLogWeight(row_cluster=torch.zeros(2), column_cluster=torch.zeros(2), same=-1.0, other=0.0)
    with pytest.raises(AnybatchError, match="weights='none'"):
        loss(rows, rows, index=torch.tensor([0, 1]), log_weight=weight)


def test_tensor_masks_reach_the_batch_and_leave_the_centres():
    loss = ClusterCentreInfoNCE(torch.tensor(CLUSTER), dimensions=5, temperature=TAU).double()
    loss(*(side.requires_grad_() for side in draw(6, 0)), index=torch.tensor(BATCHES[1]))
    anchors, positives = draw(6, 1)
    loss.eval()
    mask = torch.zeros(6, 6, dtype=torch.float64)
    mask[0, 1] = mask[4, 2] = -torch.inf
    masked = loss(anchors, positives, index=torch.tensor(BATCHES[0]), log_weight=mask)
    plain = loss(anchors, positives, index=torch.tensor(BATCHES[0]))
    bare = InfoNCE(temperature=TAU)(anchors, positives, log_weight=mask)
    assert bare < masked < plain


def _rank(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    loss = ClusterCentreInfoNCE(torch.tensor(CLUSTER), dimensions=5, temperature=TAU).double()
    out = []
    for step, rows in enumerate(BATCHES):
        anchors, positives = draw(len(rows), step)
        mine = slice(rank, None, world)
        leaves = anchors[mine].clone().requires_grad_(), positives[mine].clone().requires_grad_()
        value = loss(*leaves, index=torch.tensor(rows)[mine])
        out.append([value.detach(), *(gradient / world for gradient in torch.autograd.grad(value, leaves))])
    torch.save([out, loss.state_dict()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_three_ranks_equal_one_process(tmp_path):
    world = 3
    mp.spawn(_rank, args=(world, tmp_path), nprocs=world)  # pyright: ignore[reportPrivateImportUsage]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    loss = ClusterCentreInfoNCE(torch.tensor(CLUSTER), dimensions=5, temperature=TAU).double()
    for step, rows in enumerate(BATCHES):  # the last batch has 7 rows: shares of 3, 2 and 2
        anchors, positives = (side.requires_grad_() for side in draw(len(rows), step))
        value = loss(anchors, positives, index=torch.tensor(rows))
        expected = torch.autograd.grad(value, (anchors, positives))
        for rank, (out, _) in enumerate(results):
            assert out[step][0].item() == pytest.approx(value.item(), rel=1e-12)
            for ours, whole in zip(out[step][1:], expected, strict=True):
                torch.testing.assert_close(ours, whole[rank::world], rtol=1e-9, atol=1e-12)
    for _, state in results:
        for name, value in loss.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-14)
