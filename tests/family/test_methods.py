"""NUCLR, GloFND, EMC2, SCENT, what is particular to each, against naive formulas."""

from __future__ import annotations

import math

import pytest
import torch

from anybatch.core.errors import AnybatchError
from anybatch.family import EMC2, NUCLR, SCENT, GloFND
from anybatch.family.emc2 import _Visit
from anybatch.losses import DecoupledInfoNCE, SogCLR
from anybatch.losses.engine.candidates import Layout
from anybatch.losses.parts import Batch

from .. import reference

WIDTH = 6


def draw(seed, rows=7, extra=2, noise=None):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    anchors = make(rows, WIDTH)
    candidates = make(rows + extra, WIDTH)
    if noise is not None:
        candidates[:rows] = reference.unit(anchors) + noise * candidates[:rows]
    return anchors.requires_grad_(), candidates.requires_grad_()


def gaps(anchors, candidates):
    scores = (reference.unit(anchors) @ reference.unit(candidates).T).detach()
    return scores, scores - scores.diagonal()[:, None]


class TestNUCLR:
    TAU = 0.3

    def objective(self, anchors, candidates, margins):
        """The full objective of one direction, the batch being all data: mean log(u_i + own) + mean margin / tau."""
        _, gap = gaps(anchors, candidates)
        n = len(gap)
        terms = ((gap - margins[None]) / self.TAU).exp()
        others = ~torch.eye(n, dtype=torch.bool)
        total = (terms * others).sum(1) + (-margins / self.TAU).exp()
        return (total / (n - 1)).log().mean() + margins.mean() / self.TAU

    def make(self, n, **known):
        return NUCLR(n, gamma=1.0, margin_momentum=0.0, temperature=self.TAU, **known).double()

    @pytest.mark.parametrize("tile", [1, 10**7])
    def test_margins_descend_the_objective(self, tile):
        """The step is the objective's derivative, times n tau, where the batch is all the data."""
        n = 7
        anchors, candidates = draw(0, n, 0)
        loss = self.make(n, margin_lr=0.01, tile_bytes=tile)
        margins = (0.1 * torch.arange(n, dtype=torch.float64) - 0.5).requires_grad_()
        loss.others[0].margins.values[0] = margins.detach()
        loss(anchors, candidates, index=torch.arange(n))
        expected = torch.autograd.grad(self.objective(anchors, candidates, margins), margins)[0] * n * self.TAU
        torch.testing.assert_close(
            (margins.detach() - loss.others[0].margins.values[0]) / 0.01, expected, rtol=1e-7, atol=1e-9
        )

    def test_margins_make_every_candidate_chosen_once(self):
        n = 7
        anchors, candidates = draw(1, n, 0)
        loss = self.make(n, margin_lr=0.2, margin=0.0)
        for _ in range(150):
            loss(anchors, candidates, index=torch.arange(n))
        margins = loss.others[0].margins.values[0]
        _, gap = gaps(anchors, candidates)
        terms = ((gap - margins[None]) / self.TAU).exp()
        columns = (terms / terms.sum(1, keepdim=True)).sum(0)
        torch.testing.assert_close(columns, torch.ones_like(columns), rtol=0, atol=1e-3)
        popular = (gap / self.TAU).exp().sum(0)
        assert margins[popular.argmax()] > margins[popular.argmin()] + 0.05

    def test_gradient_of_embeddings(self):
        n = 7
        anchors, candidates = draw(2, n, 0)
        margins = 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        loss = self.make(20, margin_lr=1e-9, margin=-1.0)
        loss.others[0].margins.values[0, :n] = margins
        value = loss(anchors, candidates, index=torch.arange(n))
        scores = reference.unit(anchors) @ reference.unit(candidates).T
        gap = scores - scores.diagonal()[:, None]
        terms = ((gap - margins[None]) / self.TAU).exp() * ~torch.eye(n, dtype=torch.bool)
        expected = (terms.sum(1) / (n - 1) + (-margins.max() / self.TAU).exp() / 19).log().mean()
        assert value.item() == pytest.approx(expected.item(), rel=1e-10)
        for mine, theirs in zip(
            torch.autograd.grad(value, (anchors, candidates)),
            torch.autograd.grad(expected, (anchors, candidates)),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)

    def test_margins_wait_and_explicit_negatives_have_none(self):
        anchors, candidates = draw(3)
        loss = self.make(20, margin_lr=0.1, learn_from=2, direction="both")
        seen = []
        for _ in range(3):
            loss(anchors, candidates, index=torch.arange(7))
            seen.append(loss.others[0].margins.values.clone())
        assert (seen[1] == seen[0]).all()
        assert (seen[2][:, :7] != seen[1][:, :7]).all()
        assert (seen[2][:, 7:] == seen[1][:, 7:]).all()


class TestGloFND:
    def test_drops_what_lies_above_the_threshold(self):
        anchors, candidates = draw(0)
        loss = GloFND(20, alpha=0.3, gamma=1.0, eps=0.0, temperature=0.3).double()
        thresholds = torch.linspace(-0.3, 0.5, 7, dtype=torch.float64)
        loss.others[0].thresholds.values[0, :7] = thresholds
        value = loss(anchors, candidates, index=torch.arange(7))
        scores, gap = gaps(anchors, candidates)
        kept = (scores <= thresholds[:, None]) & ~torch.eye(7, 9, dtype=torch.bool)
        assert 0 < kept.sum() < 56
        expected = sum(
            (torch.logsumexp(gap[i][kept[i]] / 0.3, 0) - math.log(kept[i].sum())).item() if kept[i].any() else 0.0
            for i in range(7)
        )
        assert value.item() == pytest.approx(expected / 7, rel=1e-10)
        share = (56 - kept.sum(1) - 48) / 8.0
        torch.testing.assert_close(
            loss.others[0].thresholds.values[0, :7], thresholds - 0.05 * (0.3 - share.double()), rtol=1e-10, atol=1e-12
        )

    def test_the_first_threshold_is_the_quantile_of_the_batch(self):
        anchors, candidates = draw(1, 7, 4)
        loss = GloFND(20, alpha=0.25, temperature=0.3).double()
        loss(anchors, candidates, index=torch.arange(7))
        scores, _ = gaps(anchors, candidates)
        for i in range(7):
            ordered = torch.cat([scores[i, :i], scores[i, i + 1 :]]).sort(descending=True).values
            assert loss.others[0].thresholds.values[0, i].item() == pytest.approx(
                ordered[2].item()
            )  # two of ten lie above
        assert loss.last_stats["num_negatives"] == 8

    def test_thresholds_find_the_quantile_of_all_the_data(self):
        """Small random batches; the share of all the data above the threshold comes to alpha."""
        generator = torch.Generator().manual_seed(0)
        n = 60
        anchors, candidates = draw(2, n, 0)
        loss = GloFND(n, alpha=0.2, threshold_lr=0.02, temperature=0.3).double()
        for _ in range(600):
            index = torch.randperm(n, generator=generator)[:12]
            loss(anchors[index], candidates[index], index=index)
        scores, _ = gaps(anchors, candidates)
        scores.fill_diagonal_(-torch.inf)
        share = (scores > loss.others[0].thresholds.values[0][:, None]).double().sum(1) / (n - 1)
        assert share.mean().item() == pytest.approx(0.2, abs=0.02)
        assert (share - 0.2).abs().max() < 0.12

    def test_it_waits(self):
        anchors, candidates = draw(3)
        loss = GloFND(20, alpha=0.3, learn_from=2, temperature=0.3)
        plain = SogCLR(20, gamma=0.9, temperature=0.3)
        index = torch.arange(7)
        for step in range(4):
            same = loss(anchors, candidates, index=index).item() == plain(anchors, candidates, index=index).item()
            assert same == (step < 2)
            assert bool(loss.others[0].thresholds.values.isnan().all()) == (step < 2)


class TestEMC2:
    def test_the_mean_gradient_beside_that_of_all_the_data(self):
        """Frozen embeddings, batches of 5 of 20 at a low temperature: the chains' mean points nearer to the truth than
        the batches' does, and is too short, as they stay in earlier batches.
        """
        temperature = 0.1
        generator = torch.Generator().manual_seed(0)
        n, size = 20, 5
        anchors, candidates = draw(4, n, 0, noise=0.4)
        exact = torch.autograd.grad(DecoupledInfoNCE(temperature=temperature)(anchors, candidates) * n, anchors)[0]
        losses = {
            "chains": EMC2(n, temperature=temperature).double(),
            "batches": DecoupledInfoNCE(temperature=temperature),
        }
        total = {name: torch.zeros_like(exact) for name in losses}
        visits = torch.zeros(n, 1, dtype=torch.float64)
        for step in range(450):
            index = torch.randperm(n, generator=generator)[:size]
            for name, loss in losses.items():
                mine = anchors.detach()[index].requires_grad_()
                (loss(mine, candidates.detach()[index], index=index) * size).backward()
                if step >= 50:
                    total[name][index] += mine.grad
            if step >= 50:
                visits[index] += 1
        means = {name: value / visits for name, value in total.items()}
        length = {name: (mean.norm() / exact.norm()).item() for name, mean in means.items()}
        cosine = {
            name: torch.cosine_similarity(mean.flatten(), exact.flatten(), dim=0).item() for name, mean in means.items()
        }
        assert cosine["chains"] > cosine["batches"]
        assert length["chains"] < 0.7 < length["batches"]

    @pytest.mark.parametrize("burn_in", [0.0, 0.5, 0.8])
    def test_the_chain_is_metropolis_hastings(self, burn_in):
        """Against the algorithm written out step by step, with masks, started and new chains."""
        rows, columns, tau = 5, 9, 0.4
        generator = torch.Generator().manual_seed(1)
        scores = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        positive = scores.diagonal().clone()
        logits = (scores - positive[:, None]) / tau
        logits[range(rows), range(rows)] = -torch.inf
        logits[2, 5:8] = -torch.inf
        start = torch.tensor([torch.nan, 0.3, -1.0, 50.0, torch.nan], dtype=torch.float64)
        layout = Layout.of(rows, columns, scores.device)
        chain = _Visit(start=start, positive=positive, layout=layout, burn_in=burn_in, seed=3)
        chain.temperature = torch.tensor(tau)
        uniform = chain._uniform(slice(0, rows), columns, scores.device).double()
        shares = chain.run(slice(0, rows), scores, logits.clone()).exp()
        for i in range(rows):
            state, place, held = start[i].item(), None, []
            for step, j in enumerate(chain.columns):
                if logits[i, j].isneginf():
                    continue
                new = scores[i, j].item() / tau
                if math.isnan(state) or uniform[i, step] <= math.exp(min(0.0, new - state)):
                    state, place = new, j
                held.append(place)
            held = held[math.floor(burn_in * len(held)) :]
            expected = [held.count(j) / len(held) for j in range(columns)]
            assert shares[i].tolist() == pytest.approx(expected, abs=1e-12)
            assert chain.state[i].item() == pytest.approx(state)
        assert shares[3].sum() == 0  # nothing comes near the state of the fourth row

    def test_draws_look_uniform(self):
        loss, points = EMC2(4000), torch.zeros(300, 2)
        batch = Batch(anchors=points, candidates=points, index=torch.arange(300), log_weight=None)
        chain = loss.denominator.rule(batch, 0, normalised=False)
        draws = chain._uniform(slice(0, 300), 300, torch.device("cpu")).double()
        assert 0 < draws.min() < draws.max() < 1
        assert abs(draws.mean() - 0.5) < 0.004  # four standard errors
        assert abs(draws.var() - 1 / 12) < 0.002
        for moved in (draws.roll(1, 0), draws.roll(1, 1), draws.T):
            assert abs(torch.corrcoef(torch.stack([draws.flatten(), moved.flatten()]))[0, 1]) < 0.015
        assert not torch.equal(chain._uniform(slice(0, 2), 9, torch.device("cpu")), draws[2:4, :9])
        torch.testing.assert_close(chain._uniform(slice(2, 4), 300, torch.device("cpu")).double(), draws[2:4])

    def test_the_state_is_a_score_that_was_seen(self):
        anchors, candidates = draw(6)
        loss = EMC2(20, temperature=0.3).double()
        loss(anchors, candidates, index=torch.arange(7))
        scores, _ = gaps(anchors, candidates)
        for i in range(7):
            others = torch.cat([scores[i, :i], scores[i, i + 1 :]])
            assert (others / 0.3 - loss.denominator.log_weight[0, i]).abs().min() < 1e-12

    def test_seeds(self):
        anchors, candidates = draw(7)
        states = []
        for seed in (0, 0, 1):
            loss = EMC2(20, temperature=1.0, seed=seed)
            loss(anchors, candidates, index=torch.arange(7))
            states.append(loss.denominator.log_weight[0, :7].clone())
        assert torch.equal(states[0], states[1])
        assert not torch.equal(states[0], states[2])


class TestSCENT:
    def test_it_solves_the_proximal_problem(self):
        """The new state minimises exp(L - nu) + nu + D(nu, old) / alpha, found here by Newton's method."""
        alpha = 0.3
        anchors, candidates = draw(8)
        loss = SCENT(20, alpha=alpha, temperature=0.3).double()
        index = torch.arange(7)
        loss(anchors, candidates, index=index)
        old = loss.denominator.log_mean[0, :7].clone()
        anchors, candidates = draw(9)
        loss(anchors, candidates, index=index)
        scores, gap = gaps(anchors, candidates)
        positive = scores.diagonal() / 0.3
        old -= positive  # the state is absolute, the step relative to the positive of the moment
        batch = (gap / 0.3).masked_fill(torch.eye(7, 9, dtype=torch.bool), -torch.inf).logsumexp(1) - math.log(8)
        nu = old.clone()
        for _ in range(200):
            slope = -(batch - nu).exp() + 1 + ((-old).exp() - (-nu).exp()) / alpha
            nu = nu - slope / ((batch - nu).exp() + (-nu).exp() / alpha)
        torch.testing.assert_close(loss.denominator.log_mean[0, :7], nu + positive, rtol=1e-9, atol=1e-9)
        assert (old - nu).abs().max() > 0.1

    @pytest.mark.parametrize("temperature", [0.02, 0.05, 0.2])
    def test_the_default_step_follows_on_every_scale(self, temperature):
        """With standing embeddings the weight of a batch stays near the true one; with a step of 1 at low temperature
        it explodes.
        """
        generator = torch.Generator().manual_seed(5)
        rows, width = 512, 16
        anchors = torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)
        noise = torch.randn(rows, width, generator=generator)
        positives = torch.nn.functional.normalize(anchors + 0.1 * noise, dim=1)

        def pull(loss):
            """Root mean square of the gradient of single anchors over the second half of ten epochs."""
            squares = []
            for epoch in range(10):
                for index in torch.randperm(rows, generator=generator).split(32):
                    leaf = anchors[index].clone().requires_grad_()
                    loss(leaf, positives[index], index=index).backward()
                    if epoch >= 5:
                        squares.append((32 * leaf.grad).square().sum(1).mean())
            return torch.stack(squares).mean().sqrt().item()

        default, memoryless = (
            pull(SCENT(rows, temperature=temperature)),
            pull(SogCLR(rows, gamma=1.0, temperature=temperature)),
        )
        assert default < 3 * memoryless
        if temperature < 0.1:
            assert pull(SCENT(rows, alpha=1.0, eps=0.0, temperature=temperature)) > 10 * memoryless

    def test_default_step(self):
        assert SCENT(20).denominator.gamma.alpha == 19
        assert SCENT(20, alpha=0.5).denominator.gamma.alpha == 0.5
        assert SCENT(20).denominator.eps == 1 / 19

    def test_large_steps_forget(self):
        anchors, candidates = draw(10)
        loss, plain = SCENT(20, alpha=1e9, eps=0.0, temperature=0.3), SogCLR(20, gamma=1.0, eps=0.0, temperature=0.3)
        for seed in (10, 11):
            anchors, candidates = draw(seed)
            values = [each(anchors, candidates, index=torch.arange(7)).item() for each in (loss, plain)]
        assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_mistakes():
    for make, match in (
        (lambda: NUCLR(20, learn_from=-1), "learn_from is -1"),
        (lambda: NUCLR(20, margin_lr=0.0), "learning rate"),
        (lambda: GloFND(20, alpha=1.0), "alpha is 1"),
        (lambda: GloFND(20, learn_from=-1), "learn_from"),
        (lambda: EMC2(20, burn_in=1.0), "burn_in is 1"),
        (lambda: SCENT(20, alpha=0.0), "alpha is 0"),
    ):
        with pytest.raises(AnybatchError, match=match):
            make()
