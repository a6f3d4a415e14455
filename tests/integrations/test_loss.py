"""The adapter against sentence-transformers' own losses, in float64 on a tiny real transformer."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)

from anybatch.caching import cached_step
from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers import CachedLoss
from anybatch.losses import InfoNCE, Matryoshka, SogCLR
from anybatch.losses.rows import RowTable

from ..conftest import sentence


@pytest.fixture
def model(tiny_model_folder):
    return SentenceTransformer(str(tiny_model_folder), device="cpu").double()


def columns(model, rows=11, negatives=1):
    texts = [
        [sentence(row + 40 * column, 2 + (row * (column + 2)) % 9) for row in range(rows)]
        for column in range(2 + negatives)
    ]
    return [model.preprocess(column) for column in texts]


def gradients(loss, features, labels=None, outer=1.0):
    loss.zero_grad()
    torch.manual_seed(5)
    value = loss([dict(feature) for feature in features], labels)
    (value * outer).backward()
    return value.item(), {
        name: parameter.grad.clone() for name, parameter in loss.named_parameters() if parameter.grad is not None
    }


def worst(ours, theirs):
    """Largest difference relative to the largest gradient (some gradients, such as a key's bias, are zero but for
    rounding).
    """
    scale = max(theirs[name].norm() for name in theirs)
    assert set(ours) == set(theirs)
    return max(((ours[name] - theirs[name]).norm() / scale).item() for name in theirs)


def equals_plain(model, features, *, limit=1e-12, **options):
    """Value and gradients of `MultipleNegativesRankingLoss`; returns the gradients."""
    expected, theirs = gradients(MultipleNegativesRankingLoss(model, scale=20.0), features)
    value, ours = gradients(CachedLoss(model, InfoNCE(temperature=0.05), **options), features)
    assert value == pytest.approx(expected, rel=limit)
    assert worst(ours, theirs) < limit
    return ours


@pytest.mark.parametrize("negatives", [0, 1, 2])
@pytest.mark.parametrize("mini_batch_size", [1, 4, 100])
def test_equals_the_plain_loss_without_dropout(model, negatives, mini_batch_size):
    model.eval()  # the plain loss draws other dropout masks, so compare without them
    equals_plain(model, columns(model, negatives=negatives), mini_batch_size=mini_batch_size)


def test_equals_the_cached_loss_it_replaces(model):
    model.eval()
    features = columns(model)
    _, ours = gradients(CachedLoss(model, InfoNCE(temperature=0.05), mini_batch_size=3), features, outer=0.25)
    _, theirs = gradients(
        CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=3), features, outer=0.25
    )
    assert worst(ours, theirs) < 1e-12


@pytest.mark.parametrize("keep_graphs", [0.0, 0.5, 1.0])
def test_dropout_is_replayed(model, keep_graphs):
    model.train()
    features = columns(model)
    _, all_replayed = gradients(CachedLoss(model, InfoNCE(), mini_batch_size=4), features)
    _, ours = gradients(CachedLoss(model, InfoNCE(), mini_batch_size=4, keep_graphs=keep_graphs), features)
    assert worst(ours, all_replayed) < 1e-12


def test_matryoshka(model):
    model.eval()
    features = columns(model)
    dims = [32, 16, 8]
    _, ours = gradients(
        MatryoshkaLoss(model, CachedLoss(model, InfoNCE(temperature=0.05), mini_batch_size=4), dims), features
    )
    _, theirs = gradients(MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=20.0), dims), features)
    assert worst(ours, theirs) < 1e-12


def test_prefixes_in_one_pass_equal_the_wrapper_around_a_plain_loss(model):
    model.eval()
    features, dims, weights = columns(model), [32, 16, 8], [1.0, 0.5, 2.0]
    plain = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=20.0), dims, matryoshka_weights=weights)
    expected, theirs = gradients(plain, features)
    loss = CachedLoss(model, Matryoshka(InfoNCE(temperature=0.05), dims, weights=weights), mini_batch_size=4)
    value, ours = gradients(loss, features)
    assert value == pytest.approx(expected, rel=1e-12)
    assert worst(ours, {name.removeprefix("loss."): gradient for name, gradient in theirs.items()}) < 1e-12


def test_prefixes_with_memory_replay_the_encoder_once(model, monkeypatch):
    calls = []
    loss = CachedLoss(model, Matryoshka(SogCLR(num_rows=30), [32, 8]), mini_batch_size=100, keep_graphs=0.0)
    encode = loss.encode
    monkeypatch.setattr(loss, "encode", lambda features: calls.append(len(features["input_ids"])) or encode(features))
    gradients(loss, columns(model, negatives=0), torch.arange(11))
    assert calls.count(11) == 4  # two columns: recorded, then replayed
    assert [int(part.denominator.visited.sum()) for part in loss.loss.losses] == [11, 11]


def test_a_compiled_model_has_the_gradients_of_the_plain_one(model):
    """Dropout on; nothing replayed and nothing compiled on the one side. Few graphs, and none in later steps."""
    model.train()
    features = columns(model, rows=6, negatives=0)
    known = {"mini_batch_size": 3}
    _, plain = gradients(CachedLoss(model, InfoNCE(), keep_graphs=1.0, **known), features)
    inner, graphs = torch._dynamo.lookup_backend("eager"), []

    def backend(graph, inputs):
        graphs.append(graph)
        return inner(graph, inputs)

    loss = CachedLoss(model, InfoNCE(), keep_graphs=0.5, **known)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        model.compile(backend=backend, dynamic=True)
        _, ours = gradients(loss, features)
        once = len(graphs)
        gradients(loss, features)
    torch._dynamo.reset()
    assert worst(ours, plain) < 1e-12
    assert 0 < once == len(graphs) <= 6


def test_evaluation_leaves_memory_alone(model):
    loss = CachedLoss(model, SogCLR(num_rows=30), mini_batch_size=4)
    features = columns(model, negatives=0)
    before = {name: value.clone() for name, value in loss.loss.state_dict().items()}
    with torch.no_grad():
        value = loss(features, torch.arange(500, 511))  # rows of another data set, out of range here
    assert torch.isfinite(value)
    assert all(
        torch.equal(value, before[name]) or value.isnan().all() for name, value in loss.loss.state_dict().items()
    )
    gradients(loss, features, torch.arange(11))
    assert any(not torch.equal(value, before[name]) for name, value in loss.loss.state_dict().items())


def test_memory_does_not_depend_on_mini_batches(model):
    model.eval()
    features = columns(model, negatives=0)
    states = []
    for mini_batch_size in (2, 50):
        loss = CachedLoss(model, SogCLR(num_rows=30, gamma=0.5), mini_batch_size=mini_batch_size)
        for _ in range(2):
            gradients(loss, features, torch.arange(11))
        states.append(loss.loss.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=1e-6, equal_nan=True)


def test_identical_texts_are_not_negatives(model):
    model.eval()
    features = columns(model, negatives=0)
    ids = np.arange(11)
    same = ids.copy()
    same[7] = same[3]
    plain = CachedLoss(model, InfoNCE(), rows=RowTable(ids, ids), mini_batch_size=4)
    masked = CachedLoss(model, InfoNCE(), rows=RowTable(ids, same), mini_batch_size=4)
    full, _ = gradients(plain, features, torch.arange(11))
    less, _ = gradients(masked, features, torch.arange(11))
    assert less < full - 1e-6


def test_mistakes(model):
    features = columns(model, negatives=0)
    with pytest.raises(AnybatchError, match="1 input column"):
        CachedLoss(model, InfoNCE())(features[:1])
    with pytest.raises(AnybatchError, match="with_index"):
        CachedLoss(model, InfoNCE(), rows=RowTable(np.arange(11), np.arange(11)))(features)


def accumulated(loss, batches, labels=None):
    """Two backward passes of half the loss each, as under accumulation; the temperature had a gradient before."""
    loss.zero_grad()
    loss.loss.temperatures.log_temperature.grad = torch.tensor(3.0)
    for features in batches:
        (loss([dict(column) for column in features], labels) / len(batches)).backward()
    return {name: parameter.grad.clone() for name, parameter in loss.named_parameters() if parameter.grad is not None}


def test_learned_temperature_follows_the_outer_gradient(model):
    """Accumulation 2 equals the plain loss under autograd, the temperature's gradient included, which is added to what
    was there.
    """
    model.eval()
    batches = [columns(model, negatives=1), columns(model, rows=7, negatives=1)]
    cached = CachedLoss(model, InfoNCE(learnable_temperature=True), mini_batch_size=3)
    ours = accumulated(cached, batches)

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.loss = model, cached.loss

        def forward(self, features, labels):
            anchors, *others = (self.model(column)["sentence_embedding"] for column in features)
            return self.loss(anchors, torch.cat(others))

    theirs = accumulated(Plain(), batches)
    assert abs(theirs["loss.temperatures.log_temperature"] - 3.0) > 1e-3
    torch.testing.assert_close(
        ours["loss.temperatures.log_temperature"], theirs["loss.temperatures.log_temperature"], rtol=1e-6, atol=0
    )
    assert worst(ours, theirs) < 1e-7  # the temperature is a float32 parameter


def test_nothing_reaches_the_temperature_before_backward(model):
    loss = CachedLoss(model, InfoNCE(learnable_temperature=True), mini_batch_size=4)
    value = loss([dict(column) for column in columns(model)])
    assert loss.loss.temperatures.log_temperature.grad is None
    value.backward()
    assert loss.loss.temperatures.log_temperature.grad is not None


def test_the_loss_is_computed_outside_autocast(model):
    model.float().eval()
    seen = []

    class Watching(InfoNCE):
        def forward(self, anchors, candidates, **arguments):
            seen.append((anchors.dtype, candidates.dtype, (anchors @ candidates.T).dtype))
            return super().forward(anchors, candidates, **arguments)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        CachedLoss(model, Watching(), mini_batch_size=4)(columns(model))
    assert seen == [(torch.float32,) * 3]


def test_auto_is_plain_training_where_it_fits(model):
    """One forward pass a column, no replay; the probe of the first step is three rows."""
    model.train()
    calls = []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0]["input_ids"])))
    loss = CachedLoss(model, InfoNCE(), mini_batch_size="auto")
    features = columns(model)
    gradients(loss, features)
    calls.clear()
    gradients(loss, features)
    assert calls == [11, 11, 11]


def test_running_out_of_memory_is_survived(model):
    """A device with room for 40 padded tokens: the batch is split, says so, and has the plain gradient."""
    model.eval()

    def crowded(module, inputs):
        if inputs[0]["input_ids"].numel() > 40:
            raise torch.OutOfMemoryError("no room")

    features = columns(model)
    _, theirs = gradients(MultipleNegativesRankingLoss(model, scale=20.0), features)
    model.register_forward_pre_hook(crowded)
    loss = CachedLoss(model, InfoNCE(temperature=0.05), mini_batch_size="auto")
    with pytest.warns(UserWarning, match="split"):
        _, ours = gradients(loss, features)
    assert worst(ours, theirs) < 1e-12
    assert loss.memory.learned is not None
    gradients(loss, features)  # warnings are errors: it does not run out again


def test_lora_with_gradient_checkpointing(model):
    """Only the adapters get a gradient, and it is the plain loss's; the frozen weights are not counted as graphs."""
    from peft import LoraConfig, get_peft_model

    inner = get_peft_model(
        model[0].model, LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.0)
    ).double()
    model[0].model = inner
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    inner.enable_input_require_grads()
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ours = equals_plain(model, columns(model), mini_batch_size=4, keep_graphs=0.5, limit=1e-11)
    assert all("lora_" in name for name in ours)


def replays(loss, monkeypatch):
    """What the encoder returns: first when it is recorded, then when it is replayed."""
    seen, encode = {"recorded": [], "replayed": []}, loss.encode

    def watched(features):
        out = encode(features)
        seen["replayed" if phase == ["backward"] else "recorded"].append(out.detach().clone())
        return out

    phase: list[str] = []
    monkeypatch.setattr(loss, "encode", watched)
    return seen, phase


@pytest.mark.parametrize("limits", [{"mini_batch_size": 3}, {"mini_batch_size": None, "max_tokens": 30}])
def test_every_embedding_is_the_same_to_the_last_bit_in_its_replay(model, monkeypatch, limits):
    model.train()
    loss, features = CachedLoss(model, InfoNCE(), keep_graphs=0.0, **limits), columns(model)
    loss(features).backward()  # looks at rows alone, once
    seen, phase = replays(loss, monkeypatch)
    value = loss(features)
    phase.append("backward")
    value.backward()
    count = len(seen["replayed"])
    assert count == len(seen["recorded"][-count:]) > 5
    assert all(torch.equal(*pair) for pair in zip(seen["recorded"][-count:], seen["replayed"]))


def test_two_batches_before_one_backward_pass(model):
    """Each keeps its own recordings, though one loss made both and their lengths differ."""
    model.eval()
    batches = [columns(model, rows=7), columns(model, rows=5, negatives=0)]
    shared = CachedLoss(model, InfoNCE(), max_tokens=20, keep_graphs=0.5)
    model.zero_grad()
    (shared([dict(f) for f in batches[0]]) + 2 * shared([dict(f) for f in batches[1]])).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for factor, features in zip((1, 2), batches):
        (factor * CachedLoss(model, InfoNCE(), max_tokens=20)([dict(f) for f in features])).backward()
    apart = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert worst(together, apart) < 1e-12


@pytest.mark.parametrize("keep_graphs", [0.0, 1.0, "auto"])
def test_nothing_of_a_step_stays_alive_after_it(model, keep_graphs):
    model.train()
    loss, features = CachedLoss(model, InfoNCE(), mini_batch_size=4, keep_graphs=keep_graphs), columns(model)
    inputs = [weakref.ref(value) for f in features for value in f.values() if isinstance(value, torch.Tensor)]
    assert inputs
    value = loss(features)
    value.backward()
    logged = value.detach()
    del features
    gc.collect()
    del value
    gc.collect()
    assert [ref for ref in inputs if ref() is not None] == []
    assert logged.isfinite()


def test_an_encoder_in_half_precision_at_its_end(model):
    """The last module leaves bfloat16 embeddings; the loss and the replay must meet."""
    from sentence_transformers.sentence_transformer.modules import Dense

    model.float().eval()
    model.append(Dense(32, 8).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = CachedLoss(model, InfoNCE(), mini_batch_size=4, keep_graphs=0.0)(columns(model))
    assert value.dtype == torch.float32
    value.backward()
    assert all(p.grad.isfinite().all() and p.dtype == p.grad.dtype for p in model.parameters() if p.grad is not None)
    assert model[2].linear.weight.grad.abs().sum() > 0


def test_prompts_left_out_of_the_pooling(model):
    model.eval()
    model[1].include_prompt = False
    features = [{**feature, "prompt_length": 2} for feature in columns(model)]
    before = [feature["attention_mask"].clone() for feature in features]
    equals_plain(model, features, mini_batch_size=3, keep_graphs=0.0)
    assert all(torch.equal(feature["attention_mask"], mask) for feature, mask in zip(features, before))


def test_a_column_that_the_loss_ignores_is_named(model):
    class First(torch.nn.Module):
        def forward(self, anchors, candidates):
            return anchors.pow(2).mean()

    with pytest.raises(AnybatchError, match="Input column 1 received no gradient"):
        CachedLoss(model, First(), mini_batch_size=4)(columns(model, negatives=0))


LIMITS = [
    *({"mini_batch_size": size} for size in (0, -3, True, 2.5, "all")),
    {"max_tokens": 0}, {"max_tokens": True}, {"keep_graphs": 2.0}, {"keep_graphs": -1}, {"keep_graphs": True},
    {"keep_graphs": float("nan")}, {"keep_graphs": "some"}, {"keep_graphs": None}, {"mini_batch_size": None},
    {"memory": "much"},
]  # fmt: skip


@pytest.mark.parametrize("limits", LIMITS)
def test_limits_of_no_use_are_refused_at_construction(model, limits):
    with pytest.raises(AnybatchError, match=next(iter(limits))):
        CachedLoss(model, InfoNCE(), **limits)
    limits = {"mini_batch_size" if name == "mini_batch_size" else name: value for name, value in limits.items()}
    with pytest.raises(AnybatchError, match=next(iter(limits))):
        cached_step(InfoNCE(), lambda x: pytest.fail("encoded"), [torch.ones(4, 2)] * 2, **limits)


class WithHead(torch.nn.Module):
    """A loss that reads parts of the model: its temperature and a head."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.held = InfoNCE(temperature=0.5, normalize=True), [model]

    def forward(self, anchors, candidates):
        [model] = self.held
        return self.inner(model[0].head(anchors) * model[0].log_scale.exp(), model[0].head(candidates))


@pytest.mark.parametrize("keep_graphs", [0.0, 1.0])
def test_parts_of_the_model_that_the_loss_reads(model, keep_graphs):
    """They obey the outer gradient, wait for the backward pass, and are also used by the encoder itself."""
    model.eval()
    model[0].head = torch.nn.Linear(32, 6).double()
    model[0].log_scale = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    loss, features = WithHead(model), columns(model)
    cached = CachedLoss(model, loss, mini_batch_size=4, keep_graphs=keep_graphs)
    value = cached([dict(feature) for feature in features])
    assert all(parameter.grad is None for parameter in model.parameters())
    (value * 0.25).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    anchors, *others = (model(dict(feature))["sentence_embedding"] for feature in features)
    (loss(anchors, torch.cat(others)) * 0.25).backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {"0.head.weight", "0.log_scale"} <= theirs.keys()
    assert worst(ours, theirs) < 1e-7  # the loss's own temperature is a float32 number
    assert ours["0.log_scale"] == pytest.approx(theirs["0.log_scale"].item(), rel=1e-6)


@pytest.mark.parametrize(
    "limits", [{"mini_batch_size": 3}, {"mini_batch_size": 50, "max_tokens": 12}, {"mini_batch_size": "auto"}]
)
@pytest.mark.parametrize("keep_graphs", [0.0, "auto"])
def test_a_static_embedding_trains(model, limits, keep_graphs):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = SentenceTransformer(modules=[StaticEmbedding(model.tokenizer, embedding_dim=8)], device="cpu").double()
    features = [static.preprocess([sentence(k, k % 4) for k in range(start, start + 9)]) for start in (0, 30, 60)]
    equals_plain(static, features, keep_graphs=keep_graphs, **limits)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_router_trains_both_of_its_ways(model, tiny_model_folder, frozen):
    from sentence_transformers.sentence_transformer.modules import Router

    other = SentenceTransformer(str(tiny_model_folder), device="cpu")
    other.requires_grad_(not frozen)
    router = SentenceTransformer(
        modules=[
            Router.for_query_document(query_modules=list(model.children()), document_modules=list(other.children()))
        ],
        device="cpu",
    ).double()
    router.eval()
    texts = [[sentence(row + 40 * column, 2 + row % 7) for row in range(9)] for column in range(3)]
    tasks = ("query", "document", "document")
    features = [{**router.preprocess(t, task=task), "task": task} for t, task in zip(texts, tasks)]
    equals_plain(router, features, mini_batch_size=4, keep_graphs=0.3)
