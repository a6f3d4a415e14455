"""What every loss makes of its arguments: types, repeated rows, transforms, compiled graphs, numbers that are none."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from anybatch.core.errors import AnybatchError
from anybatch.family import AUCCL, SCENT, FastCLIP, SigLIP
from anybatch.losses import (
    CountCorrectedInfoNCE,
    CrossBatchInfoNCE,
    Examples,
    InfoNCE,
    LogWeights,
    Matryoshka,
    SogCLR,
    removed,
)
from anybatch.losses.log_weights import ListedPairs, same_row
from anybatch.losses.rows import RowTable

from .methods import ALL, ROWS, STATEFUL, WIDTH

DIRECTIONS = ["one_way", "both"]
EVERY = {
    **{name: lambda name=name: ALL[name](temperature=0.3, direction="both") for name in ALL},
    "siglip": lambda: SigLIP(temperature=0.3),
    "auc_cl": AUCCL,
    "matryoshka": lambda: Matryoshka(SogCLR(ROWS, temperature=0.3), [WIDTH, 3]),
}


def draw(seed, rows=6, extra=2, dtype=torch.float64):
    """Distinct rows."""
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randn(rows, WIDTH, generator=generator, dtype=dtype)
    candidates = torch.randn(rows + extra, WIDTH, generator=generator, dtype=dtype)
    index = torch.randperm(ROWS, generator=generator)[:rows]
    return anchors.requires_grad_(), candidates.requires_grad_(), index


def state(loss):
    return {name: value.clone() for name, value in loss.state_dict().items()}


def same(ours, theirs):
    return all(
        torch.equal(value.double().nan_to_num(-99.0), theirs[name].double().nan_to_num(-99.0))
        for name, value in ours.items()
    )


class TestDifferentiatedOnce:
    @pytest.mark.parametrize("name", EVERY)
    def test_every_second_derivative_is_refused(self, name):
        torch.manual_seed(0)
        loss = EVERY[name]().double()
        anchors, candidates, index = draw(0)
        for leaf in (anchors, candidates, *loss.parameters()):
            value = loss(anchors, candidates, index=index)
            torch.autograd.grad(value, leaf, retain_graph=True)  # the first is no trouble
            with pytest.raises(AnybatchError, match="differentiated once") as caught:
                torch.autograd.grad(value, leaf, create_graph=True)
            assert isinstance(caught.value, RuntimeError)
        with pytest.raises(AnybatchError, match="differentiated once"):
            (loss(anchors, candidates, index=index) * anchors.sum()).backward(create_graph=True)
        with pytest.raises(AnybatchError, match="differentiated once"):
            torch.autograd.functional.hessian(lambda side: loss(side, candidates, index=index), anchors.detach())

    @pytest.mark.parametrize("name", EVERY)
    def test_transforms_are_refused(self, name):
        loss = EVERY[name]().double().eval()
        anchors, candidates, index = draw(0)
        call = lambda side: loss(side, candidates.detach(), index=index)  # noqa: E731
        inside = {
            "grad": lambda: torch.func.grad(call)(anchors.detach()),
            "vmap": lambda: torch.func.vmap(call)(anchors.detach()[None]),
            "jvp": lambda: torch.func.jvp(call, (anchors.detach(),), (torch.ones_like(anchors),)),
        }
        for transform in inside.values():
            with pytest.raises(AnybatchError, match=r"torch\.func's transforms"):
                transform()
        with torch.autograd.forward_ad.dual_level(), pytest.raises(AnybatchError, match="forward-mode"):
            call(torch.autograd.forward_ad.make_dual(anchors.detach(), torch.ones_like(anchors)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo itself looks at it
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", EVERY)
def test_compiled_with_an_encoder_it_is_the_same(name, backend):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        loss, encoder = EVERY[name](), torch.nn.Linear(WIDTH, WIDTH)
        table = RowTable(np.arange(ROWS), np.arange(ROWS))

        def step(anchors, candidates, index, loss=loss, encoder=encoder, table=table):
            return loss(encoder(anchors), encoder(candidates) * 2, **table.arguments(index)) + 1.0

        call, alone = (torch.compile(one, backend=backend) if compiled else one for one in (step, loss))
        for seed in range(2):
            anchors, candidates, index = draw(seed, extra=0, dtype=torch.float32)
            value = call(anchors, candidates, index)
            value.backward()
        last = alone(anchors, candidates, **table.arguments(index))
        results.append([value, last, encoder.weight.grad, anchors.grad, *state(loss).values()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, equal_nan=True)


class TestIntegers:
    @pytest.mark.parametrize("name", EVERY)
    def test_narrow_ones_are_what_they_say(self, name):
        results = []
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            torch.manual_seed(0)
            loss = EVERY[name]()
            for seed in range(2):
                anchors, candidates, index = draw(seed, dtype=torch.float32)
                ids = torch.tensor([7, 7, 1, 2, 3, 4, 5, 1])  # an explicit negative that is another's positive
                value = loss(
                    anchors,
                    candidates,
                    index=index.to(dtype),
                    anchor_id=torch.arange(6).to(dtype),
                    candidate_id=ids.to(dtype),
                )
                value.backward()
            results.append({"value": value.detach(), "gradient": anchors.grad, **state(loss)})
        for other in results[1:]:
            assert same(results[0], other)

    @pytest.mark.parametrize("name", EVERY)
    def test_what_is_none_is_refused_by_name(self, name):
        loss = EVERY[name]()
        anchors, candidates, index = draw(0, dtype=torch.float32)
        before = state(loss)
        for wrong, match in (
            (index > 3, "index is torch.bool"),
            (index.float(), "index is torch.float32"),
            (index[:-1], r"of shape \(5,\); expected integers of shape \(6,\)"),
            (index[:, None], r"of shape \(6, 1\)"),
            (index - 100, "index runs from -"),
            (index.to("meta"), "index is on meta; expected cpu"),
            (index.tolist(), "index is a list"),
        ):
            with pytest.raises(AnybatchError, match=match):
                loss(anchors, candidates, index=wrong)
        ids = torch.arange(8)
        for known in (
            {"anchor_id": ids[:6].bool(), "candidate_id": ids},
            {"anchor_id": ids[:6], "candidate_id": ids.float()},
            {"anchor_id": ids[:6], "candidate_id": ids[:6]},
            {"anchor_id": ids[:6] - 1, "candidate_id": ids},
            {"anchor_id": ids[:6]},
        ):
            with pytest.raises(AnybatchError, match=r"anchor_id|candidate_id"):
                loss(anchors, candidates, index=index, **known)
        for weight, match in ((ids[None] > 3, "log_weight is torch.bool"), (ids[None], "log_weight is torch.int64")):
            with pytest.raises(AnybatchError, match=match):
                loss(anchors, candidates, index=index, log_weight=weight)
        assert same(state(loss), before)

    def test_records_hold_integers(self):
        for make in (lambda x: Examples(row=x), lambda x: ListedPairs(x, 10)):
            narrow = vars(make(torch.arange(4, dtype=torch.uint8)))
            values = [*narrow.values(), *narrow.get("columns", {}).values()]
            assert any(isinstance(value, torch.Tensor) for value in values)
            assert all(value.dtype == torch.int64 for value in values if isinstance(value, torch.Tensor))
            with pytest.raises(AnybatchError, match=r"torch\.bool"):
                make(torch.ones(4, dtype=torch.bool))
        with pytest.raises(AnybatchError, match=r"column row of the examples has shape \(3,\); .*\(4,\) as of author"):
            Examples(row=torch.arange(3), author=torch.arange(4))
        weights = LogWeights.of(Examples(row=torch.arange(4)), 4, same_row)
        with pytest.raises(AnybatchError, match="log_weight has 4 candidates; the batch has 5"):
            InfoNCE()(torch.ones(4, 2), torch.ones(5, 2), log_weight=weights)
        ids = torch.arange(4)
        with pytest.raises(AnybatchError, match="have a column 'row' with other values"):
            InfoNCE()(torch.ones(4, 2), torch.ones(4, 2), log_weight=weights, index=ids + 1)
        with pytest.raises(AnybatchError, match=r"asks for the column 'author' .* Examples\(author=\.\.\.\)"):
            Examples(row=ids)["author"]

    def test_the_row_table_checks_as_well(self):
        table = RowTable(np.arange(5), np.arange(5))
        rows = torch.tensor([1, 0, 4])
        wanted = table.arguments(rows)
        for dtype in (torch.uint8, torch.int16, torch.int32):
            given = table.arguments(rows.to(dtype))
            assert given.keys() == wanted.keys()
            assert all(torch.equal(given[name], wanted[name]) for name in wanted)
        for wrong in (
            torch.ones(5, dtype=torch.bool),
            rows.float(),
            rows - 1,
            rows + 1,
            rows[None],
            rows.to("meta"),
            [0, 1],
        ):
            with pytest.raises(AnybatchError, match="index "):
                table.arguments(wrong)
        for ids in (np.array([0.0, 1.5]), np.array([True, False]), np.array(["a", "b"]), np.array([-1, 0])):
            with pytest.raises(AnybatchError, match=r"positive_id (is|goes down)"):
                RowTable(np.arange(2), ids)

    def test_large_ids_are_as_good_as_small_ones(self):
        anchor, positive = np.array([0, 1, 1, 2, 3]), np.array([4, 0, 2, 2, 3])
        negative = np.array([[1], [4], [3], [0], [2]])
        small = RowTable(anchor, positive, negative_id=negative).arguments(torch.arange(5), num_negatives=1)
        far = 10**15
        large = RowTable(anchor * far, positive * far, negative_id=negative * far)
        large = large.arguments(torch.arange(5), num_negatives=1)
        everything = slice(0, 5), slice(0, 10)
        assert torch.equal(small["log_weight"].tile(*everything), large["log_weight"].tile(*everything))
        for name in ("anchor_id", "candidate_id"):
            equal = [arguments[name][:, None] == arguments[name][None] for arguments in (small, large)]
            assert torch.equal(*equal)


def same_group(queries, candidates, *, back):
    return removed(queries["group"][:, None] == candidates["group"])


class TestRepeatedRows:
    @pytest.mark.parametrize("ids", [False, True])
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("name", ALL)
    def test_they_are_no_negatives(self, name, direction, ids):
        """As with a mask of these pairs, and no row number that could say it; over steps, so that what is remembered
        is masked as well.
        """
        results = []
        for masked in (False, True):
            torch.manual_seed(0)
            loss = ALL[name](temperature=0.3, direction=direction).double()
            for seed in range(3):
                anchors, candidates, index = draw(seed)
                index[-1], index[-2] = index[0], index[0]
                loss.zero_grad()
                if masked:
                    columns = torch.cat([index, -2 - torch.arange(2)])
                    mask = LogWeights.of(Examples(group=columns), len(index), same_group)
                    batch = loss._prepare(anchors, candidates, index=index)
                    value = loss._of(replace(batch, log_weight=mask))
                else:
                    known = {"anchor_id": index + 100, "candidate_id": torch.cat([index, torch.tensor([900, 901])])}
                    value = loss(anchors, candidates, index=index, **(known if ids else {}))
                value.backward()
            kept = {key: value for key, value in state(loss).items() if not key.endswith(("records", "kinds"))}
            results.append({"value": value.detach(), "anchors": anchors.grad, "candidates": candidates.grad, **kept})
        for key, ours in results[0].items():
            torch.testing.assert_close(ours, results[1][key], rtol=1e-12, atol=1e-12, equal_nan=True)

    @pytest.mark.parametrize("name", ["siglip", "auc_cl", "matryoshka"])
    def test_nor_for_the_others(self, name):
        values = []
        for masked in (False, True):
            loss = EVERY[name]().double()
            anchors, candidates, index = draw(0)
            index[-1] = index[0]
            mask = torch.zeros(6, 8, dtype=torch.float64)
            mask[0, 5] = mask[5, 0] = -torch.inf
            known = (
                {"log_weight": mask, "index": index if name == "matryoshka" else None} if masked else {"index": index}
            )
            value = loss(anchors, candidates, **known)
            value.backward()
            values.append((value.detach(), anchors.grad, candidates.grad))
            other = EVERY[name]().double()(anchors, candidates, index=torch.arange(6))
            assert abs(other - value) > 1e-6
        torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)

    def test_of_one_row_one_pair_is_remembered(self):
        loss = CrossBatchInfoNCE(ROWS, memory_size=11, temperature=0.3).double()
        anchors, candidates, _ = draw(0, extra=0)
        loss(anchors, candidates, index=torch.tensor([1, 1, 2, 3, 3, 3]))
        assert sorted(loss.queue.rows.tolist()) == [-1] * 8 + [1, 2, 3]
        place = loss.queue.rows.tolist().index(3)
        newest = torch.nn.functional.normalize(anchors.detach()[5], dim=0) - loss.mean[0]
        torch.testing.assert_close(loss.queue.embeddings[0, place], newest)


class TestCounts:
    """Small data with label-like positives, every batch there is: what a batch says of the whole is right in the
    mean, exactly.
    """

    N, BATCH = 9, 3

    def data(self):
        generator = torch.Generator().manual_seed(5)
        sides = torch.randn(2, self.N, 4, generator=generator, dtype=torch.float64)
        return *torch.nn.functional.normalize(sides, dim=2), torch.arange(self.N) % 3

    def batches(self, row):
        others = [other for other in range(self.N) if other != row]
        return [torch.tensor([row, *chosen]) for chosen in itertools.combinations(others, self.BATCH - 1)]

    def arguments(self, index, label):
        return {"index": index, "anchor_id": index, "candidate_id": label[index]}

    def exact_log_mean(self):
        """(N,) of all negatives of each row, relative to its positive; and the positives' logits."""
        anchors, positives, label = self.data()
        logits = anchors @ positives.T / 0.3
        relative = (logits - logits.diag()[:, None]).masked_fill(label[:, None] == label, -torch.inf)
        return relative.logsumexp(dim=1) - math.log(self.N - 1), logits.diag()

    @pytest.mark.parametrize("explicit", [False, True])
    def test_the_sum_of_count_corrected_losses(self, explicit):
        anchors, positives, label = self.data()
        truth = [
            sum(
                ((anchors[i] @ (positives[j] - positives[i])) / 0.3).exp()
                for j in range(self.N)
                if label[j] != label[i]
            )
            for i in range(self.N)
        ]
        for make in (CountCorrectedInfoNCE, CrossBatchInfoNCE):
            for row in range(self.N):
                sums = []
                for index in self.batches(row):
                    loss = make(self.N, temperature=0.3).double()
                    # The last row comes as an explicit negative: it is a draw like the others.
                    own, columns = (index[:-1], index) if explicit else (index, index)
                    known = {"index": own, "anchor_id": own, "candidate_id": label[columns]}
                    loss(anchors[own], positives[columns], **known)
                    sums.append(loss._last[1].objective[0].expm1())
                assert torch.stack(sums).mean().item() == pytest.approx(truth[row].item(), rel=1e-9)

    @pytest.mark.parametrize(
        "make",
        [
            lambda n: SogCLR(n, gamma=1.0, temperature=0.3),
            lambda n: FastCLIP(n, version="v1", gamma=1.0, temperature=0.3),
        ],
    )
    def test_what_a_memory_is_told(self, make):
        """A batch without any negative of the row says 0, not nothing."""
        anchors, positives, label = self.data()
        log_mean, positive = self.exact_log_mean()
        for row in range(self.N):
            told = []
            for index in self.batches(row):
                loss = make(self.N).double()
                loss(anchors[index], positives[index], **self.arguments(index, label))
                told.append(loss.denominator.log_mean[0, row].exp().nan_to_num(0.0))
            truth = log_mean[row] + positive[row] * loss.denominator.absolute
            assert torch.stack(told).mean().item() == pytest.approx(truth.exp().item(), rel=1e-9)

    @pytest.mark.parametrize(
        ("make", "factor"),
        [
            (lambda n: SogCLR(n, gamma=1e-9, temperature=0.3), 1.0),
            (lambda n: SogCLR(n, gamma=1e-9, temperature=0.3, positive="batch"), 1.0),
            (lambda n: SogCLR(n, gamma=1e-9, temperature=0.3, state="relative"), 1.0),
            (lambda n: SCENT(n, alpha=1e-9, temperature=0.3), 1.0),
            (lambda n: FastCLIP(n, version="v1", gamma=1e-9, eps=None, temperature=0.3, direction="one_way"), 0.3),
        ],
    )
    def test_the_gradient_of_a_loss_whose_memory_is_right(self, make, factor):
        anchors, positives, label = self.data()
        leaf = anchors.clone().requires_grad_()
        ids = {"anchor_id": torch.arange(self.N), "candidate_id": label}
        whole, (log_mean, positive) = InfoNCE(temperature=0.3)(leaf, positives, **ids), self.exact_log_mean()
        exact = torch.autograd.grad(whole * self.N, leaf)[0]
        for row in range(self.N):
            gradients = []
            for index in self.batches(row):
                loss = make(self.N).double().eval()
                state = log_mean + positive * loss.denominator.absolute
                loss.denominator.log_mean[0] = state
                leaf = anchors[index].clone().requires_grad_()
                value = loss(leaf, positives[index], **self.arguments(index, label))
                gradients.append(torch.autograd.grad(value * self.BATCH / factor, leaf)[0][0])
            torch.testing.assert_close(torch.stack(gradients).mean(dim=0), exact[row], rtol=1e-6, atol=1e-7)

    def test_a_row_whose_candidates_are_masked_fades(self):
        loss = SogCLR(ROWS, gamma=0.25, temperature=0.3).double()
        anchors, candidates, index = draw(0, extra=0)
        loss(anchors, candidates, index=index)
        before = loss.denominator.log_mean[0, index].clone()
        mask = torch.zeros(6, 6, dtype=torch.float64)
        mask[2] = -torch.inf
        loss(anchors, candidates, index=index, log_weight=mask)
        fading = loss.denominator.log_mean[0, index[2]].exp() / before[2].exp()
        assert fading.item() == pytest.approx(0.75, rel=1e-6)
        loss(anchors[:1], candidates[:1], index=index[2:3])  # a batch of one draws nothing, and says nothing
        assert loss.denominator.log_mean[0, index[2]].exp() / before[2].exp() == fading

    def test_thresholds_leave_the_mean_over_the_others(self):
        """What GloFND drops is taken out of the data, as published; what a mask removes is a draw that adds nothing."""
        from anybatch.family import GloFND

        loss = GloFND(ROWS, alpha=0.3, gamma=1.0, eps=0.0, temperature=0.3).double()
        anchors, candidates, index = draw(0, extra=0)
        loss.others[0].thresholds.values[:] = 0.2
        mask = torch.zeros(6, 6, dtype=torch.float64)
        mask[:, 3] = -torch.inf
        loss(anchors, candidates, index=index, log_weight=mask)
        unit = torch.nn.functional.normalize
        scores = (unit(anchors, dim=1) @ unit(candidates, dim=1).T).detach()
        for i in range(6):
            offered = [j for j in range(6) if j not in (i, 3)]
            kept = [j for j in offered if scores[i, j] <= 0.2]
            drawn = 5 - (len(offered) - len(kept))
            mean = sum((scores[i, j] / 0.3).exp().item() for j in kept) / drawn
            assert loss.denominator.log_mean[0, index[i]].exp().nan_to_num(0.0).item() == pytest.approx(mean, rel=1e-6)


class TestNumbersThatAreNone:
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("name", STATEFUL)
    @pytest.mark.parametrize("normalize", [True, False])
    def test_a_step_that_overflows_leaves_no_trace_in_the_state(self, name, direction, normalize):
        """As with float16 and a gradient scaler, which skips such steps: everything remembered stays a number, and
        what was remembered of the row
        stays as it was."""
        for bad, where in itertools.product((torch.nan, torch.inf, -torch.inf), ("anchor", "candidate", "all")):
            torch.manual_seed(0)
            loss = STATEFUL[name](temperature=0.3, direction=direction, normalize=normalize)
            for seed in range(2):
                loss(*draw(seed, dtype=torch.float32)[:2], index=draw(0)[2])
            before = state(loss)
            anchors, candidates, index = draw(2, dtype=torch.float32)
            index[:3] = draw(0)[2][:3]  # old rows and, mostly, new ones
            with torch.no_grad():
                if where in ("anchor", "all"):
                    anchors[0] = bad
                if where in ("candidate", "all"):
                    candidates[1] = bad
                if where == "all":
                    anchors[:], candidates[:] = bad, bad
            loss(anchors, candidates, index=index)
            for key, value in state(loss).items():
                old = before[key]
                if value.is_floating_point():
                    assert not value.isinf().any(), (key, bad, where)
                    fine = value.isfinite() | old.isnan() if value.shape == old.shape else value.isfinite()
                    assert fine.all(), (key, bad, where)
                    if value.ndim > 1 and value.shape[1] == ROWS:
                        untouched = index if where == "all" else index[:1] if where == "anchor" else index[:0]
                        ours, theirs = (side[:, untouched].nan_to_num(-99.0) for side in (value, old))
                        assert torch.equal(ours, theirs), (key, bad, where)
            after = loss(*draw(3, dtype=torch.float32)[:2], index=draw(0)[2])
            assert after.isfinite(), (bad, where)
            after.backward()


class TestShapes:
    @pytest.mark.parametrize("name", EVERY)
    def test_empty_single_and_fully_masked_batches(self, name):
        loss = EVERY[name]()
        anchors, candidates, index = draw(0, dtype=torch.float32)
        with pytest.raises(AnybatchError, match="no rows"):
            loss(anchors[:0], candidates[:0], index=index[:0])
        assert loss(anchors[:1], candidates[:1], index=index[:1]).isfinite()
        value = loss(anchors, candidates[:6], index=index[:1].repeat(6))  # one row, six times
        value.backward()
        assert value.isfinite()
        assert anchors.grad.isfinite().all()

    @pytest.mark.parametrize("name", EVERY)
    def test_mixed_inputs(self, name):
        anchors, candidates, index = draw(0)
        value = EVERY[name]().double()(anchors, candidates, index=index)
        gradient = torch.autograd.grad(value, candidates)[0]
        for side in (anchors.float(), anchors.detach().float()):  # float64 on one side, a gradient wanted on one
            mixed = EVERY[name]().double()(side, candidates, index=index)
            assert mixed.dtype == torch.float64
            torch.testing.assert_close(torch.autograd.grad(mixed, candidates)[0], gradient, rtol=1e-5, atol=1e-6)
        strided = torch.stack([candidates, candidates], dim=-1)[..., 0]
        assert not strided.is_contiguous()
        torch.testing.assert_close(EVERY[name]().double()(anchors.mT.contiguous().mT, strided, index=index), value)
        for wrong in (
            candidates.detach().long(),
            candidates.detach().to(torch.complex64),
            candidates.detach().to("meta"),
        ):
            with pytest.raises(AnybatchError, match="expected floats on one device"):
                EVERY[name]()(anchors, wrong, index=index)

    @pytest.mark.parametrize("name", EVERY)
    def test_inference_mode_changes_nothing_and_training_goes_on(self, name):
        loss = EVERY[name]()
        before = state(loss)
        anchors, candidates, index = draw(0, dtype=torch.float32)
        with torch.inference_mode():
            loss(anchors, candidates, index=index)
        assert same(state(loss), before)
        for seed in range(2):
            anchors, candidates, index = draw(seed, dtype=torch.float32)
            loss(anchors, candidates, index=index).backward()
        assert anchors.grad.isfinite().all()
