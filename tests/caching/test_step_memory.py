"""A memory budget: mini-batches found by probing, failures learned from; no bit of the gradient depends on it."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anybatch.caching import StepMemory, cached_step, memory, plan_mini_batches, record_towers
from anybatch.caching.device_memory import is_out_of_memory, memory_in_use, total_memory
from anybatch.caching.encoder import towers_of
from anybatch.caching.memory import LEAF_COPIES, GraphBudget, gradient_bytes, graph_bytes, leaf_bytes
from anybatch.caching.rows import RowSlicer
from anybatch.core.errors import AnybatchError
from anybatch.losses import InfoNCE, SogCLR
from tests.caching.helpers import (
    Crowded,
    Mlp,
    Softmax,
    TextEncoder,
    clone,
    gradients,
    num_kept,
    plain_step,
    recorded,
    relative_error,
    send_back,
    texts,
    vectors,
    within,
)

CPU = torch.device("cpu")


@pytest.fixture
def device(monkeypatch):
    """A device of a size to be set, on which nothing is in use but what the test says."""

    class Device:
        total, used = 2**40, 0

    monkeypatch.setattr(memory, "total_memory", lambda _: Device.total + memory.LOSS_RESERVE)
    monkeypatch.setattr(memory, "memory_in_use", lambda _: Device.used)
    monkeypatch.setattr(memory, "FEWEST_TOKENS", 1)
    return Device


class Counting(torch.nn.Module):
    """Counts forward passes with and without a graph."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.rows = inner, []

    def forward(self, batch):
        self.rows.append((len(batch["input_ids"]), torch.is_grad_enabled()))
        return self.inner(batch)


def test_the_real_device_can_be_read():
    assert 2**20 < memory_in_use(CPU) < total_memory(CPU)


def test_what_torch_has_reserved_is_free_to_us(monkeypatch):
    """An accelerator of 1000 bytes: 700 taken, 400 of them reserved by torch, 150 of those handed out."""

    class Backend:
        mem_get_info = staticmethod(lambda device: (300, 1000))
        memory_reserved = staticmethod(lambda device: 400)
        memory_allocated = staticmethod(lambda device: 150)

    monkeypatch.setattr(torch, "cuda", Backend)
    device = torch.device("cuda", 0)
    assert total_memory(device) == 1000
    assert memory_in_use(device) == 700 - (400 - 150)
    with pytest.raises(AnybatchError, match="meta device"):
        total_memory(torch.device("meta"))


def test_what_fits_is_plain_training(device):
    encoder, batch = Counting(TextEncoder()), texts(20, 30, 1)
    memory = StepMemory("80%")
    for step in range(2):
        encoder.rows.clear()
        [recording] = record_towers([encoder], [batch], mini_batch_size="auto", keep_graphs="auto", memory=memory)
        send_back(recording, torch.ones_like(recording.embeddings))
        # Once: two short rows with their padding and without, then what a row takes.
        probes = [(2, True), (2, False), (1, True), (2, True)] if step == 0 else []
        assert encoder.rows == [*probes, (20, True)]  # one forward pass of everything, no replay, probed once


def test_the_mini_batch_follows_the_memory(device):
    encoder, batch = TextEncoder(), texts(64, 30, 1)
    tokens = []
    for megabytes in (64, 16, 4, 1):
        device.total = megabytes * 2**20
        plan = record_towers([encoder], [batch], mini_batch_size="auto", memory=StepMemory("100%"))[0].pieces
        tokens.append(max(len(piece.rows) for piece in plan))
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] > tokens[-1] > 0


def test_the_probed_mini_batch_fits_in_half_of_the_room(device):
    encoder, batch = TextEncoder(), texts(64, 30, 1)
    device.total = 8 * 2**20
    memory = StepMemory("100%")
    [recording] = record_towers([encoder], [batch], mini_batch_size="auto", memory=memory)
    largest = GraphBudget(1, modules=[encoder])
    slicer = RowSlicer(batch)
    for piece in recording.pieces:
        with largest.measure(slicer, piece.rows):
            encoder(slicer.take(piece.rows))
    gradient_bytes = sum(4 * p.numel() for p in encoder.parameters())
    room = (device.total - gradient_bytes) / 2
    assert room / 4 < largest.largest <= room  # powers of two: within a factor of two, and the rows' raggedness


def test_probing_leaves_no_trace(device):
    """In torch's generator, in one of the encoder's own, and in what it counts."""

    class Drawing(TextEncoder):
        def __init__(self):
            super().__init__(dropout=0.3)
            self.own, self.calls = torch.Generator().manual_seed(4), 0

        def forward(self, batch):
            self.calls += 1
            return super().forward(batch) * (self.calls + torch.rand((), generator=self.own))

    states = []
    for mini_batch_size in ("auto", 9):
        encoder = Drawing().train()
        torch.manual_seed(3)
        [recording] = record_towers([encoder], [texts(9, 12, 1)], mini_batch_size=mini_batch_size)
        states.append((recording.embeddings, torch.tensor(encoder.calls), encoder.own.get_state()))
    assert all(torch.equal(*pair) for pair in zip(*states))


def test_inputs_without_lengths(device):
    encoder = Mlp().double()
    reference, loss = clone(encoder), Softmax().double()
    inputs = [vectors(9), vectors(9, seed=1)]
    plain_step(Softmax().double(), [reference] * 2, inputs)
    cached_step(loss, encoder, inputs, mini_batch_size="auto", keep_graphs="auto")
    assert relative_error(gradients(encoder), gradients(reference)) < 1e-12


class Pixels(torch.nn.Module):
    """One encoder for images and texts, as CLIP in sentence-transformers."""

    def __init__(self):
        super().__init__()
        self.text, self.pixels = TextEncoder(), Mlp(width=48)

    def forward(self, batch):
        return self.pixels(batch["pixel_values"].flatten(1)) if "pixel_values" in batch else self.text(batch)


def images(count):
    return {
        "pixel_values": torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
        "modality": "image",
    }


def auto_limits(budget, encoder, slicer):
    return budget.limits(towers_of([encoder], [slicer])[0], "auto", None, num_rows=slicer.num_rows)


def test_images_and_texts_of_one_encoder_are_measured_apart(device):
    """Their units differ, rows and tokens: what one learns says nothing of the other."""
    encoder, budget = Pixels(), StepMemory("100%")
    device.total = 2**20 + gradient_bytes([encoder])
    slicers = [RowSlicer(texts(11, 20, 1)), RowSlicer(images(11))]
    found = []
    for slicer in slicers:
        found.append(auto_limits(budget, encoder, slicer))
        assert found[-1] == auto_limits(StepMemory("100%"), encoder, slicer)
    (no_rows, tokens), (rows, no_tokens) = found
    assert no_rows is None
    assert no_tokens is None
    assert tokens != rows
    budget.record_out_of_memory(3, by_rows=True)
    assert auto_limits(budget, encoder, slicers[1]) == (3, None)
    assert auto_limits(budget, encoder, slicers[0]) == found[0]
    budget.record_out_of_memory(40, by_rows=False)
    assert (budget.learned, budget.learned_samples) == (40, 3)


def test_few_images_where_there_is_little_room(device, monkeypatch):
    """The least number of tokens is no least number of images."""
    monkeypatch.setattr(memory, "FEWEST_TOKENS", 64)
    encoder, slicer = Pixels(), RowSlicer(images(11))
    encoder.text.requires_grad_(False)
    [tower] = towers_of([encoder], [slicer])
    one = graph_bytes(tower, torch.arange(1), 11)[0]
    assert one is not None
    device.total = 10 * one + gradient_bytes([encoder])
    assert 1 <= auto_limits(StepMemory("100%"), encoder, slicer)[0] < 16


def test_images_have_no_tokens_to_limit():
    slicer = RowSlicer(images(7))
    assert slicer.lengths is None
    assert [len(rows) for rows in plan_mini_batches(slicer, mini_batch_size=3, max_tokens=20)] == [3, 3, 1]
    part = slicer.take(torch.tensor([5, 2]))
    assert torch.equal(part["pixel_values"], images(7)["pixel_values"][[5, 2]])
    with pytest.raises(AnybatchError, match="Use mini_batch_size"):
        plan_mini_batches(slicer, mini_batch_size=None, max_tokens=20)


def test_a_budget_that_holds_no_row_says_so(device):
    device.total = 1000
    with pytest.warns(UserWarning, match="will be exceeded"):
        record_towers([TextEncoder()], [texts(5, 9, 1)], mini_batch_size="auto", memory=StepMemory("100%"))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_no_bit_depends_on_what_is_kept(dropout):
    """Two towers, so that the order of kept and replayed mini-batches could mix."""
    wanted = None
    for keep in (0, 0.25, 3, 1.0, "auto"):
        encoder, loss = TextEncoder(dropout=dropout).train(), Softmax()
        torch.manual_seed(2)
        cached_step(loss, encoder, [texts(13, 9, 1), texts(13, 20, 2)], mini_batch_size=3, keep_graphs=keep)
        found = gradients(encoder, loss)
        wanted = wanted or found
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), keep


class LiveBytes(TorchDispatchMode):
    """A twin that counts: bytes of all storages made inside that are alive, after every operation."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {place: one for place, one in self.alive.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("towers", [2, 3])
@pytest.mark.parametrize("loss", ["infonce", "both", "sogclr"])
def test_what_is_set_aside_for_the_loss_is_what_it_takes(loss, towers):
    """Wide embeddings from a narrow encoder, small tiles: all that counts is embeddings and the loss on them."""
    rows, width = 160, 256
    make = {
        "infonce": lambda: InfoNCE(tile_bytes=2**12),
        "both": lambda: InfoNCE(direction="both", tile_bytes=2**12),
        "sogclr": lambda: SogCLR(1000, tile_bytes=2**12),
    }[loss]
    encoder, kwargs = torch.nn.Linear(2, width), {"index": torch.arange(rows)} if loss == "sogclr" else {}
    inputs = [torch.randn(rows, 2) for _ in range(towers)]
    with LiveBytes() as twin:
        cached_step(make(), encoder, inputs, mini_batch_size=8, loss_kwargs=kwargs)
    reserved = leaf_bytes([torch.empty(8, width)], towers * rows)
    assert twin.peak <= reserved <= 2 * twin.peak


def test_wide_embeddings_leave_room_for_fewer_graphs(device):
    """The rows of all towers count, from the first mini-batch on; half precision is held in float32."""
    inner = torch.nn.Linear(6, 512)
    inputs = [torch.randn(64, 6) for _ in range(2)]
    leaves = leaf_bytes([torch.empty(8, 512)], 128)
    assert leaves == leaf_bytes([torch.empty(8, 512, dtype=torch.bfloat16)], 128) == LEAF_COPIES * 128 * 512 * 4
    assert leaf_bytes([torch.empty(8, 512).double()], 128) == 2 * leaves

    def encode(x):
        return inner(x).tanh()

    options = {"mini_batch_size": 8, "keep_graphs": "auto", "modules": [inner]}
    a_graph = 4 * (8 * 512 + 8 * 6)  # tanh saves its result, the layer its input
    device.total = leaves + sum(4 * p.numel() for p in inner.parameters()) + 5 * a_graph
    kept = [num_kept(one) for one in record_towers([encode] * 2, inputs, memory=StepMemory("100%"), **options)]
    assert kept == [4, 0]  # and one replay
    device.total -= leaves
    assert num_kept(record_towers([encode] * 2, inputs, memory=StepMemory("100%"), **options)[0]) == 0


class Tight(torch.nn.Module):
    """An encoder on a device with room for so many padded tokens at a time."""

    def __init__(self, tokens, *, dropout=0.0):
        super().__init__()
        self.inner, self.tokens, self.failures = TextEncoder(dropout=dropout), tokens, []  # a number would be put back

    def forward(self, batch):
        if batch["input_ids"].numel() > self.tokens:
            self.failures.append(1)
            raise torch.OutOfMemoryError("no room")
        return self.inner(batch)


def test_later_steps_start_from_what_fitted(device):
    encoder = Tight(70, dropout=0.2).double().train()
    batch, memory = texts(16, 30, 1), StepMemory("80%")
    with pytest.warns(UserWarning, match="padded tokens"):
        record_towers([encoder], [batch], mini_batch_size="auto", memory=memory)
    assert encoder.failures
    assert memory.learned is not None
    assert 30 <= memory.learned <= 70
    encoder.failures.clear()
    [recording] = record_towers([encoder], [batch], mini_batch_size="auto", memory=memory)
    assert not encoder.failures
    send_back(recording, torch.ones_like(recording.embeddings))


def test_overrun_lowers_what_later_steps_keep(device):
    crowded = Crowded(Mlp(), 3)
    memory, x = StepMemory("80%"), torch.randn(12, 6)
    options = {"mini_batch_size": 2, "keep_graphs": "auto", "memory": memory}
    with pytest.warns(UserWarning, match="with 3 graphs kept"):
        first = num_kept(record_towers([crowded], [x], **options)[0])
    assert not crowded.alive()
    [second] = record_towers([crowded], [x], **options)  # warnings are errors: it did not run out again
    assert first == 2
    assert num_kept(second) == 2


def test_out_of_memory_in_the_backward_pass_is_explained():
    class Heavy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.OutOfMemoryError("no room")

    inner = Mlp()
    recording = recorded(lambda x: Heavy.apply(inner(x)), torch.randn(4, 6), mini_batch_size=4)
    with pytest.raises(AnybatchError, match=r"backward pass of a mini-batch of 4 rows.*No gradient was changed"):
        send_back(recording, torch.ones(4, 5))


def test_graphs_that_share_storage_are_counted_once():
    """A cast of the weights, saved by every graph, takes its bytes once; the weights themselves take none."""
    first, second = torch.nn.Linear(6, 7, bias=False), torch.nn.Linear(7, 200, bias=False)
    cast = second.weight * 1.0  # not a parameter: stands for autocast's cast of a weight
    budget = GraphBudget(2**40, modules=[first, second])

    def encode(x):
        return torch.nn.functional.linear(first(x).tanh(), cast).tanh()

    recorded(encode, torch.randn(8, 6), mini_batch_size=2, **within(budget))
    # Every graph also saves its x (2 x 6) and the two tanh (2 x 7, 2 x 200).
    assert budget.spent == 4 * (200 * 7 + 4 * (2 * 6 + 2 * 7 + 2 * 200))


def test_what_says_that_memory_ran_out():
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_the_plan_of_a_mixed_limit():
    """A limit of the caller's own holds beside the probe's."""
    batch = texts(12, 9, 1)
    recordings = record_towers([TextEncoder()], [batch], mini_batch_size="auto", max_tokens=18)
    wanted = plan_mini_batches(batch, mini_batch_size=None, max_tokens=18)
    assert [piece.rows.tolist() for piece in recordings[0].pieces] == [rows.tolist() for rows in wanted]


@pytest.mark.parametrize("place", ["replay", "backward"])
@pytest.mark.parametrize("mini_batch_size", ["auto", 8])
def test_running_out_in_a_replay_or_backward_pass_teaches_and_leaves_no_gradient(device, place, mini_batch_size):
    """With dropout a replay cannot be split: the step raises, and the next one with the same memory takes half."""
    encoder, sizes = TextEncoder(dropout=0.2).train(), []
    crowded = [True]

    class Heavy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if crowded[0] and place == "backward":
                raise torch.OutOfMemoryError("no room")
            return grad

    def encode(batch):
        sizes.append(batch["input_ids"].numel())
        out = encoder(batch)
        if crowded[0] and place == "replay" and torch.is_grad_enabled() and len(sizes) > start:
            raise torch.OutOfMemoryError("no room")
        return Heavy.apply(out)

    memory, batch, start = StepMemory("80%"), texts(16, 12, 1), 10**9
    options = {"mini_batch_size": mini_batch_size, "memory": memory, "modules": [encoder]}
    [recording] = record_towers([encode], [batch], **options)
    start = len(sizes)
    largest = max(sizes)
    with pytest.raises(AnybatchError, match=r"Out of memory.*No gradient was changed"):
        send_back(recording, torch.ones_like(recording.embeddings))
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert memory.learned is not None
    crowded[0] = False
    sizes.clear()
    [recording] = record_towers([encode], [batch], **options)
    send_back(recording, torch.ones_like(recording.embeddings))
    assert max(sizes) <= max(12, largest // 2)
