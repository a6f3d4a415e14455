"""What a forward pass draws and writes is brought back for its replay, or refused before any gradient."""

import functools
import os
import random

import numpy as np
import pytest
import torch
from torch import nn

from anybatch.caching import cached_step
from anybatch.caching.state import LARGEST_BUFFER
from anybatch.core.errors import AnybatchError
from tests.caching.helpers import Mlp, Softmax, clone, gradients, recorded, relative_error, send_back, vectors

EXACT = 1e-12


pytestmark = pytest.mark.usefixtures("float64")


def seed_all():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002


def error_to_one_graph(encode, modules, *, rows=11, start=seed_all, **options):
    """The cached step against one graph over the same mini-batches, in the same order, from the same start."""
    inputs, loss = [vectors(rows), vectors(rows, seed=1)], Softmax()
    start()
    cached_step(loss, encode, inputs, mini_batch_size=3, **options)
    got = gradients(*modules, loss)
    for module in (*modules, loss):
        module.zero_grad()
    start()
    first, second = (torch.cat([encode(part) for part in batch.split(3)]) for batch in inputs)
    loss(first, second).backward()
    return relative_error(got, gradients(*modules, loss))


class Noisy(nn.Module):
    """An encoder whose rows are multiplied by what `draw` returns."""

    def __init__(self, draw, **held):
        super().__init__()
        self.inner, self.draw = Mlp(), draw
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.inner(x) * (0.5 + self.draw(self, len(x)))


MODULE_LEVEL = np.random.default_rng(5)


def by_a_global(_, rows):
    return MODULE_LEVEL.random()


def sources():
    """How an encoder may draw, and how its source is put to the start."""
    torch_own, numpy_own, python_own = torch.Generator(), np.random.default_rng(3), random.Random(3)
    numpy_old = np.random.RandomState(3)
    state = MODULE_LEVEL.bit_generator.state

    def start():
        seed_all()
        torch_own.manual_seed(3)
        numpy_own.bit_generator.state = np.random.default_rng(3).bit_generator.state
        python_own.seed(3)
        numpy_old.seed(3)
        MODULE_LEVEL.bit_generator.state = state

    def through_a_partial(generator, module, rows):
        return torch.rand((), generator=generator)

    draws = {
        "python": lambda m, n: random.random(),
        "numpy": lambda m, n: np.random.rand(),  # noqa: NPY002
        "numpy, a number a row": lambda m, n: torch.from_numpy(np.random.rand(n, 1)),  # noqa: NPY002
        "torch, a number a row": lambda m, n: torch.rand(n, 1),
        "own of torch, attribute": lambda m, n: torch.rand((), generator=m.held),
        "own of torch, closure": lambda m, n: torch.rand((), generator=torch_own),
        "own of torch, partial": functools.partial(through_a_partial, torch_own),
        "own of torch, in a list in a dict": lambda m, n: torch.rand((), generator=m.nested["a"][0]),
        "own of numpy": lambda m, n: numpy_own.random(),
        "own of numpy, older": lambda m, n: numpy_old.rand(),
        "own of python": lambda m, n: python_own.random(),
        "own of python, its method": lambda m, n, draw=python_own.random: draw(),
        "a global variable": by_a_global,
    }
    held = {"held": torch_own, "nested": {"a": [torch_own]}}
    return {name: (Noisy(draw, **held), start) for name, draw in draws.items()}


@pytest.mark.parametrize("keep", [0, 2, 1.0, "auto"])
@pytest.mark.parametrize("source", list(sources()))
def test_random_numbers_of_any_source_are_replayed(source, keep):
    encoder, start = sources()[source]
    assert error_to_one_graph(encoder, [encoder], start=start, keep_graphs=keep) < EXACT


@pytest.mark.parametrize("source", list(sources()))
def test_generators_go_on_where_the_forward_passes_left_them(source):
    encoder, start = sources()[source]
    inputs = [vectors(9), vectors(9, seed=1)]
    start()
    cached_step(Softmax(), encoder, inputs, mini_batch_size=3)
    following = encoder.draw(encoder, 1)
    start()
    for part in [part for batch in inputs for part in batch.split(3)]:
        encoder(part)
    assert float(following) == float(encoder.draw(encoder, 1))


def test_a_hook_that_draws_is_replayed():
    generator, encoder = torch.Generator().manual_seed(2), Mlp()
    encoder.layers[0].register_forward_hook(lambda *args: args[2] * torch.rand((), generator=generator))

    def start():
        generator.manual_seed(2)

    assert error_to_one_graph(encoder, [encoder], start=start) < EXACT


class Counter(nn.Module):
    """Its output depends on how often it was called; `kind` says where that is kept."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind, self.calls = Mlp(), kind, 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.kind == "number":
            self.calls += 1
        elif self.kind == "in place":
            self.count += 1
        else:
            self.count = self.count + 1
        return self.inner(x) * (1 + 0.1 * (self.calls + float(self.count)))


@pytest.mark.parametrize("keep", [0, 2, 1.0, "auto"])
@pytest.mark.parametrize("kind", ["number", "in place", "replaced"])
def test_what_a_forward_pass_counts_is_counted_once(kind, keep):
    encoder = Counter(kind)

    def start():
        encoder.calls = 0
        encoder.count = torch.zeros(())

    assert error_to_one_graph(encoder, [encoder], start=start, keep_graphs=keep) < EXACT
    start()
    cached_step(Softmax(), encoder, [vectors(9), vectors(9, seed=1)], mini_batch_size=3, keep_graphs=keep)
    assert encoder.calls + float(encoder.count) == 6


@pytest.mark.parametrize("writer", [0, 1])
def test_a_tower_reads_what_another_writes(writer):
    """The counter moves with one tower alone, and both read it."""
    shared = Counter("in place")
    towers = [lambda x: shared(x), lambda x: shared.inner(x) * (1 + 0.1 * float(shared.count))]
    if writer == 1:
        towers.reverse()
    inputs, loss = [vectors(8), vectors(8, seed=1)], Softmax()
    cached_step(loss, towers, inputs, mini_batch_size=3)
    got = gradients(shared, loss)
    shared.count.zero_()
    for module in (shared, loss):
        module.zero_grad()
    first, second = (torch.cat([t(part) for part in batch.split(3)]) for t, batch in zip(towers, inputs))
    loss(first, second).backward()
    assert relative_error(got, gradients(shared, loss)) < EXACT


def test_power_iterations_and_running_averages():
    norm = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    encoder = nn.Sequential(norm, Mlp()).train()
    state = clone(encoder).state_dict()
    assert error_to_one_graph(encoder, [encoder], start=lambda: encoder.load_state_dict(state)) < EXACT


def test_what_cannot_be_brought_back_is_refused_and_changes_no_gradient():
    encoder = Noisy(lambda m, n: int.from_bytes(os.urandom(2), "big") / 2**16)
    before = {name: torch.ones_like(p) for name, p in encoder.named_parameters()}
    for name, parameter in encoder.named_parameters():
        parameter.grad = before[name].clone()
    loss = Softmax()
    with pytest.raises(AnybatchError, match="differs from its recording"):
        cached_step(loss, encoder, [vectors(9), vectors(9, seed=1)], mini_batch_size=3)
    assert all(torch.equal(p.grad, before[name]) for name, p in encoder.named_parameters())
    assert loss.log_temperature.grad is None
    cached_step(
        loss, encoder, [vectors(9), vectors(9, seed=1)], mini_batch_size=3, keep_graphs=1.0
    )  # nothing to replay


TOO_LARGE = LARGEST_BUFFER // 8 + 1  # numbers in float64


def test_a_buffer_too_large_to_keep_is_named():
    encoder = Counter("in place")
    encoder.count = torch.zeros(TOO_LARGE)
    with pytest.raises(AnybatchError, match="It writes to count, too large"):
        cached_step(
            Softmax(), lambda x: encoder.inner(x) * encoder.count.add_(1)[0], [vectors(9)] * 2, mini_batch_size=3
        )


def test_another_dtype_in_the_replay_is_refused():
    encoder = Mlp()

    def split(x):
        out = encoder(x)
        return out.float() if torch.is_grad_enabled() else out

    with pytest.raises(AnybatchError, match=r"float64.*recorded.*float32"):
        cached_step(Softmax(), split, [vectors(9), vectors(9, seed=1)], mini_batch_size=3)


@pytest.mark.parametrize("hook", [lambda g: g.clamp(-1e-3, 1e-3), lambda g: g * 0.5, lambda g: None])
def test_hooks_of_parameters_see_the_whole_gradient_once(hook):
    encoder, seen = Mlp(), []
    inputs = [vectors(11), vectors(11, seed=1)]
    reference, loss = clone(encoder), Softmax()
    for module in (encoder, reference):
        module.layers[0].weight.register_hook(lambda g: seen.append(g.clone()) or hook(g))
        module.layers[0].weight.grad = torch.ones_like(module.layers[0].weight)
    cached_step(loss, encoder, inputs, mini_batch_size=3)
    assert len(seen) == 1
    loss(reference(inputs[0]), reference(inputs[1])).backward()
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-10, atol=1e-14)
    assert relative_error(gradients(encoder), gradients(reference)) < EXACT


def test_optimizers_in_the_backward_pass_are_refused_before_it():
    from torch.distributed.optim import _apply_optimizer_in_backward

    by_hook, by_torch = Mlp(), Mlp()
    by_hook.layers[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    _apply_optimizer_in_backward(torch.optim.SGD, by_torch.parameters(), {"lr": 0.1})
    for encoder in (by_hook, by_torch):
        before = clone(encoder).state_dict()
        with pytest.raises(AnybatchError, match=r"layers.0.weight has a hook"):
            cached_step(Softmax(), encoder, [vectors(9), vectors(9, seed=1)], mini_batch_size=3, keep_graphs=1.0)
        assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("keep", [1.0, "auto"])
def test_a_saved_tensor_changed_in_place_raises_as_in_autograd(keep):
    encoder = Mlp()

    def in_place(x):
        kept = encoder(x).exp()
        out = kept * 1.0
        kept.mul_(3.0)
        return out

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cached_step(Softmax(), in_place, [vectors(9), vectors(9, seed=1)], mini_batch_size=3, keep_graphs=keep)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_gradients_of_a_failed_replay_are_taken_back():
    encoder, calls = Mlp(), []

    def failing(x):
        calls.append(1)
        if torch.is_grad_enabled() and len(calls) > 6:
            raise ValueError("broken in the second replay")
        return encoder(x)

    recording = recorded(failing, vectors(9), mini_batch_size=3)
    calls[:] = [1] * 5
    with pytest.raises(ValueError, match="broken"):
        send_back(recording, torch.ones_like(recording.embeddings))
    assert all(parameter.grad is None for parameter in encoder.parameters())


class Remembering(nn.Module):
    """An encoder that computes something of a weight once, and keeps it in the way that `kind` says."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.weight, self.kind = Mlp(), nn.Parameter(torch.full((5,), 0.3)), kind
        self.memo, self.ready, self.value = {}, False, None
        closed = {}
        self.look = lambda: closed.setdefault(0, self.weight.exp()) if 0 not in closed else closed[0]

    def forward(self, x):
        if self.kind == "attribute":
            if not self.ready:
                self.value, self.ready = self.weight.exp(), True
            return self.inner(x) * self.value
        if self.kind == "closure":
            return self.inner(x) * self.look()
        key = len(x) if self.kind == "by number of rows" else "w"
        if key not in self.memo:
            self.memo[key] = self.weight.exp()
        return self.inner(x) * self.memo[key]


@pytest.mark.parametrize("keep", [0, 1, 1.0, "auto"])
@pytest.mark.parametrize("kind", ["dictionary", "attribute", "closure", "by number of rows"])
def test_a_memo_of_a_weight_never_loses_its_gradient(kind, keep):
    encoder, inputs = Remembering(kind), [vectors(11), vectors(11, seed=1)]
    with pytest.raises(AnybatchError, match="computed from its parameters"):
        cached_step(Softmax(), encoder, inputs, mini_batch_size=3, keep_graphs=keep)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_memos_used_once_have_their_gradient():
    """One for each number of rows, each met once: exact, as in the first plain step."""
    encoder, loss, inputs = Remembering("by number of rows"), Softmax(), [vectors(7)]
    plan = [torch.arange(0, 4), torch.arange(4, 7)]

    def with_half(embeddings):
        return loss(embeddings, embeddings.flip(0))

    recording = recorded(encoder, inputs[0], mini_batch_size=4)
    with_half(recording.embeddings).backward()
    send_back(recording, recording.embeddings.grad)
    got = gradients(encoder, loss)
    fresh = Remembering("by number of rows")
    loss.zero_grad()
    with_half(torch.cat([fresh(inputs[0][rows]) for rows in plan])).backward()
    assert relative_error(got, gradients(fresh, loss)) < EXACT


class Teacher(nn.Module):
    """A frozen copy that follows the trained one within the forward pass, as in MoCo."""

    def __init__(self, how, read):
        super().__init__()
        self.student, self.teacher, self.how, self.read = Mlp(), Mlp(seed=5).requires_grad_(False), how, read

    @torch.no_grad()
    def follow(self):
        teachers, students = list(self.teacher.parameters()), list(self.student.parameters())
        if self.how == "foreach":
            torch._foreach_mul_(teachers, 0.9)
            torch._foreach_add_(teachers, students, alpha=0.1)
            return
        for ours, theirs in zip(teachers, students):
            if self.how == "in place":
                ours.mul_(0.9).add_(theirs, alpha=0.1)
            elif self.how == "a part":
                ours.view(-1)[:2].lerp_(theirs.view(-1)[:2], 0.1)
            else:
                ours.data.mul_(0.9).add_(theirs.data, alpha=0.1)

    def forward(self, x):
        self.follow()
        out = self.student(x)
        return out + self.teacher(x) if self.read else out


@pytest.mark.parametrize("keep", [0, 2, 1.0, "auto"])
@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("how", ["in place", "a part", "foreach", "data"])
def test_a_frozen_parameter_is_written_as_often_as_it_would_be(how, read, keep):
    encoder, reference, loss = Teacher(how, read), Teacher(how, read), Softmax()
    inputs = [vectors(11), vectors(11, seed=1)]
    for _ in range(2):  # the second step knows of it, and the gradients of both accumulate
        loss.zero_grad()
        cached_step(loss, encoder, inputs, mini_batch_size=3, keep_graphs=keep)
        got = gradients(encoder, loss)
        loss.zero_grad()
        first, second = (torch.cat([reference(part) for part in batch.split(3)]) for batch in inputs)
        loss(first, second).backward()
        assert relative_error(got, gradients(reference, loss)) < EXACT
        for name, tensor in reference.state_dict().items():
            torch.testing.assert_close(encoder.state_dict()[name], tensor, rtol=1e-12, atol=1e-14)


def test_one_mini_batch_writes_a_teacher_once():
    encoder, reference = Teacher("in place", False), Teacher("in place", False)
    cached_step(Softmax(), encoder, [vectors(4), vectors(4, seed=1)], mini_batch_size=4)
    for _ in range(2):
        reference(vectors(4))
    torch.testing.assert_close(encoder.state_dict(), reference.state_dict(), rtol=1e-12, atol=1e-14)


def test_a_teacher_too_large_to_keep_is_named():
    encoder = Teacher("in place", False)
    encoder.teacher.register_parameter("table", nn.Parameter(torch.zeros(TOO_LARGE), requires_grad=False))
    with pytest.raises(AnybatchError, match=r"writes to teacher\..*after the step"):
        cached_step(
            Softmax(),
            lambda x: encoder.student(x) + encoder.teacher.table.add_(1)[0],
            [vectors(9)] * 2,
            mini_batch_size=3,
        )


def test_a_frozen_embedding_with_a_largest_norm_runs():
    table = nn.Embedding(TOO_LARGE // 6 + 1, 6, max_norm=0.5).requires_grad_(False)
    encoder = nn.Sequential(table, Mlp())
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    reference, loss = clone(encoder), Softmax()
    cached_step(loss, encoder, list(ids), mini_batch_size=3)
    got = gradients(encoder, loss)
    loss.zero_grad()
    loss(reference(ids[0]), reference(ids[1])).backward()
    assert relative_error(got, gradients(reference, loss)) < 1e-6  # norms are cut in float32


@pytest.mark.parametrize("first", ["sparse", "dense"])
def test_sparse_and_dense_gradients_of_one_parameter_add_up(first):
    table, loss = nn.Embedding(60, 5, sparse=True), Softmax()
    ids = [torch.randint(0, 60, (9, 4), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    ways = [lambda x: table(x).mean(1), lambda x: (nn.functional.one_hot(x, 60).double() @ table.weight).mean(1)]
    if first == "dense":
        ways.reverse()
    for way in ways:
        cached_step(loss, way, ids, mini_batch_size=4, modules=[table])
    got, table.weight.grad = table.weight.grad.clone(), None
    for way in ways if first == "dense" else ways[::-1]:  # torch itself adds in this order only
        loss(way(ids[0]), way(ids[1])).backward()
    torch.testing.assert_close(got.to_dense(), table.weight.grad.to_dense(), rtol=1e-12, atol=1e-14)
