"""Learned temperatures: FastCLIP, iSogCLR, TempNet against a naive twin over several steps, and against finite
differences.
"""

from __future__ import annotations

import math

import pytest
import torch

from anybatch.core.errors import AnybatchError
from anybatch.family import FastCLIP, ISogCLR, TempNet
from anybatch.losses import GammaSchedule, SogCLR

from .. import reference

ROWS, WIDTH = 12, 5


class NaiveRobust:
    """tau_i (log(eps + u_i) + rho) in the linear domain, one Python float an example; one direction.

    The state is a mean of exp(s_ij / tau_i) and the positive receives u_i / (eps + u_i), or, as released for two
    modalities, it is a mean of exp((s_ij - s_ii) / tau_i) and the positive receives what the batch's negatives do. When
    tau_i moves, an absolute state keeps tau_i log u_i.
    """

    def __init__(
        self, gamma, eps, rho, tau, lr=0.0, momentum=0.0, limits=(0.0, math.inf), clip=math.inf, state="absolute"
    ):
        self.gamma, self.eps, self.rho, self.absolute = gamma, eps, rho, state == "absolute"
        self.u, self.tau, self.velocity = {}, dict.fromkeys(range(ROWS), tau), dict.fromkeys(range(ROWS), 0.0)
        self.lr, self.momentum, self.limits, self.clip = lr, momentum, limits, clip

    def step(self, anchors, candidates, index):
        scores = reference.unit(anchors) @ reference.unit(candidates).T
        surrogate, objective, visits, derivatives = 0.0, 0.0, {}, {}
        for i, row in enumerate(index):
            tau, own = self.tau[row], scores[i, i]
            negatives = [j for j in range(len(candidates)) if j >= len(index) or index[j] != row]
            level = own.item() if self.absolute else 0.0
            terms = [math.exp((scores[i, j] - own).item() / tau) / len(negatives) for j in negatives]
            mean = sum(terms) * math.exp(level / tau)
            new = mean
            if row in self.u:
                old, made_at = self.u[row]
                moved = math.exp(math.log(old) * made_at / tau) if self.absolute else old
                new = (1 - self.gamma) * moved + self.gamma * mean
            visits.setdefault(row, []).append(new)
            u = new / math.exp(level / tau)
            total = self.eps + u
            objective += tau * (math.log(total) + self.rho)
            pulls = [term / total for term in terms]
            logits = sum(pull * scores[i, j] for pull, j in zip(pulls, negatives, strict=True))
            logits = logits - (u / total if self.absolute else sum(pulls)) * own
            surrogate = surrogate + logits
            derivative = math.log(total) + self.rho - logits.item() / tau
            derivatives.setdefault(row, []).append(max(-self.clip, min(self.clip, derivative)))
        for row, values in visits.items():
            self.u[row] = sum(values) / len(values), self.tau[row]
        for row, values in derivatives.items():
            mean = sum(values) / len(values)
            self.velocity[row] = self.momentum * self.velocity[row] + (1 - self.momentum) * mean
            self.tau[row] = min(max(self.tau[row] - self.lr * self.velocity[row], self.limits[0]), self.limits[1])
        return surrogate / len(index), objective / len(index), derivatives


def draw(seed, rows=6, extra=3):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    index = torch.randint(ROWS, (rows,), generator=generator)
    index[-1] = index[0]
    return make(rows, WIDTH), make(rows + extra, WIDTH), index


@pytest.mark.parametrize("state", ["absolute", "relative"])
def test_isogclr_equals_its_twin_over_several_steps(state):
    limits = (0.1, 0.6)
    loss = ISogCLR(
        ROWS, rho=0.7, gamma=0.4, eps=1e-3, temperature=0.3, temperature_range=limits, temperature_lr=0.1,
        temperature_momentum=0.3, temperature_clip=1.5, state=state,
    ).double()  # fmt: skip
    loss.temperatures.rows.values.fill_(0.3)  # exactly, not as float32 has it
    twin = NaiveRobust(0.4, 1e-3, 0.7, 0.3, lr=0.1, momentum=0.3, limits=limits, clip=1.5, state=state)
    for step in range(5):
        anchors, candidates, index = draw(step)
        value = loss(anchors, candidates, index=index)
        surrogate, objective, _ = twin.step(anchors, candidates, index.tolist())
        assert value.item() == pytest.approx(objective, rel=1e-10)
        inputs = (anchors, candidates)
        for mine, other in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(surrogate, inputs), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
        for row in range(ROWS):
            assert loss.temperatures.rows.values[0, row].item() == pytest.approx(twin.tau[row], rel=1e-10)
            assert loss.temperatures.rows.velocity[0, row].item() == pytest.approx(
                twin.velocity[row], rel=1e-9, abs=1e-12
            )
    assert loss.temperatures.rows.values.unique().numel() > 4
    assert loss.temperature == pytest.approx(sum(twin.tau.values()) / ROWS)


@pytest.mark.parametrize("state", ["absolute", "relative"])
@pytest.mark.parametrize("version", ["v0", "v1", "v3"])
def test_fastclip_with_one_temperature_equals_its_twin(version, state):
    """Both directions; embeddings, the loss's value and the learned temperature's derivative, memory held."""
    tau, rho, eps, gamma = 0.3, 0.7, 1e-3, 0.4
    loss = FastCLIP(ROWS, version=version, rho=rho, gamma=gamma, eps=eps, temperature=tau, state=state).double()
    if loss.temperatures.log_temperature is not None:
        with torch.no_grad():
            loss.temperatures.log_temperature.fill_(math.log(tau))
    there, back = (NaiveRobust(gamma, eps, rho if version == "v3" else 0.0, tau, state=state) for _ in range(2))
    for step in range(4):
        anchors, candidates, index = draw(step, extra=2)
        loss.zero_grad()
        value = loss(anchors, candidates, index=index)
        one, one_value, one_tau = there.step(anchors, candidates, index.tolist())
        two, two_value, two_tau = back.step(candidates[:6], anchors, index.tolist())
        factor = 1 / tau if version == "v0" else 1.0  # v0 is not multiplied by tau
        assert value.item() == pytest.approx((one_value + two_value) / 2 * factor, rel=1e-10)
        inputs = (anchors, candidates)
        mine = torch.autograd.grad(value, inputs, retain_graph=True)
        for ours, theirs in zip(mine, torch.autograd.grad((one + two) / 2 * factor, inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        if version == "v1":
            assert not list(loss.parameters())
            continue
        value.backward()
        derivative = sum(sum(values) for part in (one_tau, two_tau) for values in part.values()) / (2 * len(index))
        if version == "v0":  # d/d tau of F / tau
            derivative = (derivative - (one_value + two_value) / 2 / tau) / tau
        assert loss.temperatures.log_temperature.grad.item() == pytest.approx(derivative * tau, rel=1e-9)


def temp_net(**options):
    return TempNet(ROWS, WIDTH, gamma=1.0, rho=0.5, temperature=0.3, temperature_range=(0.1, 1.0), hidden=3, **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SogCLR(ROWS, gamma=1.0, temperature=0.3, learnable_temperature=True, direction="both"),
        lambda: SogCLR(ROWS, gamma=1.0, eps=0.0, temperature=0.3, learnable_temperature=True),
        lambda: FastCLIP(ROWS, version="v0", gamma=1.0, eps=1e-3, temperature=0.3),
        lambda: FastCLIP(ROWS, version="v0", gamma=1.0, eps=1e-3, temperature=0.3, state="relative"),
        lambda: FastCLIP(ROWS, version="v3", gamma=1.0, eps=0.0, rho=0.5, temperature=0.3),
        lambda: temp_net(eps=1e-3),
        lambda: temp_net(direction="both"),
    ],
)  # fmt: skip
def test_parameters_equal_finite_differences(make):
    """With gamma = 1 the objective has no memory, and its derivative is exact."""
    torch.manual_seed(0)
    loss = make().double()
    for parameter in loss.parameters():
        with torch.no_grad():
            parameter += 0.1 * torch.randn_like(parameter)
    anchors, candidates, _ = draw(0)
    index = torch.arange(6)
    loss(anchors, candidates, index=index).backward()
    checked = 0
    for parameter in loss.parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for place in range(len(flat)):
            values = []
            for step in (1e-6, -2e-6):
                flat[place] += step
                with torch.no_grad():
                    values.append(loss(anchors, candidates, index=index).item())
            flat[place] += 1e-6
            assert gradient[place].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-8)
            checked += gradient[place].abs().item() > 1e-6
    assert checked


@pytest.mark.parametrize("direction", ["one_way", "both"])
def test_each_temperature_moves_along_the_derivative_of_its_own_objective(direction):
    def make():
        loss = ISogCLR(
            ROWS, rho=0.5, gamma=1.0, temperature=0.3, temperature_lr=0.01, temperature_momentum=0.0,
            direction=direction,
        ).double()  # fmt: skip
        loss.temperatures.rows.values[:] = torch.linspace(
            0.2, 0.5, loss.temperatures.rows.values.numel(), dtype=torch.float64
        ).view(-1, ROWS)
        return loss

    anchors, candidates, _ = draw(1)
    index, rows = torch.tensor([3, 1, 4, 0, 5, 9]), 6
    loss = make()
    before = loss.temperatures.rows.values.clone()
    loss(anchors, candidates, index=index)
    moved = (before - loss.temperatures.rows.values) / 0.01
    num_directions = len(before)
    for side in range(num_directions):
        for row in index.tolist():
            values = []
            for step in (1e-6, -1e-6):
                other = make().eval()
                other.temperatures.rows.values[side, row] += step
                values.append(other(anchors, candidates, index=index).item())
            expected = (values[0] - values[1]) / 2e-6 * rows * num_directions
            assert moved[side, row].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_the_derivative_is_rho_minus_the_divergence_from_uniform():
    anchors, candidates, _ = draw(2)
    loss = ISogCLR(
        ROWS, rho=0.5, gamma=1.0, eps=0.0, temperature=0.3, temperature_lr=0.01, temperature_momentum=0.0
    ).double()
    loss.temperatures.rows.values.fill_(0.3)
    loss(anchors, candidates, index=torch.arange(6))
    logits = reference.unit(anchors) @ reference.unit(candidates).T / 0.3
    logits.fill_diagonal_(-torch.inf)
    p = logits.softmax(dim=1)
    divergence = torch.special.xlogy(p, p * 8).sum(dim=1)
    torch.testing.assert_close(
        (0.3 - loss.temperatures.rows.values[0, :6]) / 0.01, (0.5 - divergence).detach(), rtol=1e-9, atol=1e-9
    )


def test_no_running_maximum_and_no_epoch_flag():
    """Released codes keep a maximum that never decays, and take the first epoch for the first visit."""
    loss = ISogCLR(ROWS, gamma=0.5, temperature=0.05, temperature_lr=1e-9)
    far, near = -torch.eye(4, WIDTH), torch.eye(4, WIDTH)
    anchors = torch.eye(4, WIDTH).requires_grad_()
    loss(anchors, far, index=torch.arange(4))  # every negative above the positive by 1: u = exp(20)
    for _ in range(90):
        loss(anchors, near, index=torch.arange(4))
    value = loss(anchors, near, index=torch.arange(4))
    fresh = ISogCLR(ROWS, gamma=0.5, temperature=0.05, temperature_lr=1e-9)
    assert value.item() == pytest.approx(fresh(anchors, near, index=torch.arange(4)).item(), rel=1e-3)
    later = loss(anchors, near, index=torch.arange(4, 8))  # rows first seen now take the batch's value whole
    assert later.item() == pytest.approx(fresh(anchors, near, index=torch.arange(4, 8)).item(), rel=1e-6)


def test_published_scale_is_a_factor():
    """v1 is SogCLR times tau: the same gradient up to that factor."""
    anchors, candidates, index = draw(5)
    ours = FastCLIP(ROWS, version="v1", gamma=0.9, eps=1e-3, temperature=0.3)(anchors, candidates, index=index)
    plain = SogCLR(ROWS, gamma=0.9, eps=1e-3, temperature=0.3, direction="both")(anchors, candidates, index=index)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (anchors, candidates)), torch.autograd.grad(plain, (anchors, candidates)), strict=True
    ):
        torch.testing.assert_close(mine, 0.3 * theirs)


def test_a_learned_temperature_is_put_back_into_its_range():
    loss = FastCLIP(ROWS, version="v3", temperature=0.011, rho=30.0)
    optimizer = torch.optim.SGD(loss.parameters(), lr=10.0)
    for step in range(3):
        anchors, candidates, index = draw(step)
        optimizer.zero_grad()
        loss(anchors, candidates, index=index).backward()
        assert loss.temperature >= 0.01 - 1e-7
        assert loss.temperatures.log_temperature.grad.abs() > 0  # at the edge it can still come back
        optimizer.step()


class TestGammaSchedule:
    def test_values(self):
        schedule = GammaSchedule(0.2, num_steps=4)
        values = []
        for _ in range(6):
            values.append(schedule.value)
            schedule.advance()
        expected = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)] + [0.2, 0.2]
        assert values == pytest.approx(expected)
        assert values[0] == 1.0

    def test_it_moves_by_epochs(self):
        schedule = GammaSchedule(0.2, num_steps=6, steps_per_epoch=3)
        values = []
        for _ in range(7):
            values.append(schedule.value)
            schedule.advance()
        assert values == pytest.approx([1, 1, 1, 0.6, 0.6, 0.6, 0.2])

    def test_the_loss_follows_it(self):
        """Epoch 0 at gamma 1: memory holds the newest batch alone; later it averages."""
        loss = SogCLR(ROWS, gamma=GammaSchedule(0.5, num_steps=4, steps_per_epoch=2), temperature=0.3)
        fixed = [SogCLR(ROWS, gamma=gamma, temperature=0.3) for gamma in (1.0, 1.0, 0.75, 0.75, 0.5, 0.5)]
        for step, other in enumerate(fixed):
            other.load_state_dict({name: value for name, value in loss.state_dict().items() if "gamma" not in name})
            anchors, candidates, index = draw(step)
            torch.testing.assert_close(
                loss(anchors, candidates, index=index), other(anchors, candidates, index=index), rtol=1e-6, atol=1e-6
            )

    def test_mistakes(self):
        for make, match in (
            (lambda: GammaSchedule(0.0, num_steps=3), "gamma is 0"),
            (lambda: GammaSchedule(0.2, num_steps=0), "num_steps is 0"),
            (lambda: GammaSchedule(0.2, num_steps=3, steps_per_epoch=0), "steps_per_epoch 0"),
        ):
            with pytest.raises(AnybatchError, match=match):
                make()


def test_mistakes():
    for make, match in (
        (lambda: FastCLIP(ROWS, version="v4"), "version is 'v4'"),
        (lambda: FastCLIP(ROWS, temperature=0.001), "temperature_range"),
        (lambda: ISogCLR(ROWS, temperature_range=(0.1, 0.05)), "temperature_range"),
        (lambda: ISogCLR(ROWS, rho=-1.0), "rho is -1"),
        (lambda: ISogCLR(ROWS, temperature_momentum=1.0), "momentum 1.0"),
        (lambda: TempNet(ROWS, 3, net=torch.nn.ModuleList(), direction="both"), "net holds 0"),
    ):
        with pytest.raises(AnybatchError, match=match):
            make()


@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_isogclr_has_the_scale_of_its_temperature(temperature):
    """While temperatures stand still the gradient is tau times SogCLR's, no other factor."""
    generator = torch.Generator().manual_seed(3)
    losses = (
        ISogCLR(ROWS, gamma=0.5, temperature=temperature, temperature_lr=1e-12).double(),
        SogCLR(ROWS, gamma=0.5, eps=0.0, positive="exact", temperature=temperature).double(),
    )
    for _ in range(3):
        sides = torch.randn(2, 8, 6, generator=generator, dtype=torch.float64)
        gradients = []
        for loss in losses:
            leaf = sides[0].clone().requires_grad_()
            loss(leaf, sides[1], index=torch.arange(8)).backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[0], temperature * gradients[1], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("direction", ["one_way", "both"])
def test_a_network_with_dropout_draws_one_mask_a_call(direction):
    """The temperatures that divide the scores are those whose derivative the network learns from."""
    calls = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(WIDTH, 6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 1)
            ).double()

        def forward(self, embeddings):
            calls.append(len(embeddings))
            return self.layers(embeddings)

    torch.manual_seed(0)
    directions = 2 if direction == "both" else 1
    low, high, rho, eps = 0.1, 1.0, 0.5, 1e-3
    loss = TempNet(
        ROWS,
        WIDTH,
        gamma=1.0,
        eps=eps,
        rho=rho,
        temperature=0.3,
        temperature_range=(low, high),
        net=torch.nn.ModuleList(Net() for _ in range(directions)),
        direction=direction,
    )
    generator = torch.Generator().manual_seed(1)
    anchors, positives = (torch.randn(6, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.manual_seed(3)
    value = loss(anchors.requires_grad_(), positives, index=torch.arange(6))
    assert calls == [6] * directions
    ours = torch.autograd.grad(value, [anchors, *loss.parameters()])
    assert loss.last_stats["temperature"] == pytest.approx(loss.temperature)

    torch.manual_seed(3)
    sides = [torch.nn.functional.normalize(side, dim=1) for side in (anchors, positives)]
    terms = []
    for number in range(directions):
        queries, others = (sides[0], sides[1]) if number == 0 else (sides[1], sides[0])
        tau = low + (high - low) * loss.temperatures.net[number](queries.detach())[:, 0].sigmoid()
        scores = queries @ others.T
        gaps = (scores - scores.diagonal()[:, None]) / tau[:, None]
        for i in range(6):
            mean = sum(gaps[i, j].exp() for j in range(6) if j != i) / 5
            terms.append(tau[i] * ((eps + mean).log() + rho) / (6 * directions))
    naive = sum(terms)
    assert value.item() == pytest.approx(naive.item(), rel=1e-6)  # the memory is float32
    expected = torch.autograd.grad(naive, [anchors, *loss.parameters()])
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
    loss.eval()
    with torch.no_grad():
        assert loss(anchors, positives, index=torch.arange(6)).isfinite()


def test_a_network_may_have_no_parameters():
    class Fixed(torch.nn.Module):
        def forward(self, embeddings):
            return embeddings.sum(dim=1, keepdim=True)

    anchors, candidates, index = draw(0)
    loss = TempNet(ROWS, WIDTH, temperature_range=(0.02, 0.5), net=torch.nn.ModuleList([Fixed()]))
    loss(anchors, candidates, index=index).backward()
    expected = 0.02 + 0.48 * reference.unit(anchors.detach()).sum(dim=1).sigmoid()
    assert loss.temperature == pytest.approx(expected.mean().item(), rel=1e-6)
    assert anchors.grad.isfinite().all()
