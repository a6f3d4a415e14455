"""Tiny encoders, batches and a plain step, written without the code under test."""

import copy
import weakref

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from anybatch.caching import StepMemory, record_towers, replay


class TextEncoder(nn.Module):
    """A two-layer BERT with mean pooling, from random weights."""

    def __init__(self, *, dropout: float = 0.0, layers: int = 2, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.bert = BertModel(
                BertConfig(
                    vocab_size=60,
                    hidden_size=16,
                    num_hidden_layers=layers,
                    num_attention_heads=2,
                    intermediate_size=24,
                    max_position_embeddings=48,
                    hidden_dropout_prob=dropout,
                    attention_probs_dropout_prob=dropout,
                    attn_implementation="eager",
                ),
                add_pooling_layer=False,
            )

    def forward(self, batch: dict) -> Tensor:
        hidden = self.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        weight = batch["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)


class Mlp(nn.Module):
    def __init__(self, width: int = 6, dim: int = 5, *, dropout: float = 0.0, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(width, 12), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(12), nn.Linear(12, dim)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Crowded(nn.Module):
    """Runs out of memory beside `most` of its own graphs."""

    def __init__(self, inner: nn.Module, most: int):
        super().__init__()
        self.inner, self.most, self.graphs = inner, most, []

    def alive(self) -> int:
        return sum(graph() is not None for graph in self.graphs)

    def forward(self, x):
        if torch.is_grad_enabled() and self.alive() >= self.most:
            raise torch.OutOfMemoryError("no room beside so many graphs")
        out = self.inner(x)
        if out.requires_grad:
            self.graphs.append(weakref.ref(out))
        return out


class Softmax(nn.Module):
    """InfoNCE with a learned temperature: any plain loss of anchors and candidates."""

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())
        self.calls = 0

    def forward(self, anchors: Tensor, candidates: Tensor, *, log_weight: Tensor | None = None) -> Tensor:
        self.calls += 1
        a, c = nn.functional.normalize(anchors, dim=-1), nn.functional.normalize(candidates, dim=-1)
        logits = a @ c.T / self.log_temperature.exp()
        if log_weight is not None:
            logits = logits + log_weight
        return nn.functional.cross_entropy(logits.to(self.log_temperature.dtype), torch.arange(len(a)))


def texts(rows: int, width: int, seed: int) -> dict:
    """Right-padded token ids of uneven lengths; some rows are full."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[rows // 2] = width
    mask = (torch.arange(width) < lengths[:, None]).long()
    return {"input_ids": torch.randint(1, 60, (rows, width), generator=generator) * mask, "attention_mask": mask}


def padded(lengths, width, **more) -> dict:
    """Token ids of rows of these lengths, and their mask."""
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.arange(len(lengths) * width).view(-1, width), "attention_mask": mask, **more}


def vectors(rows: int, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_step(loss, encoders, inputs, *, loss_kwargs=None, scale: float = 1.0) -> Tensor:
    """Every tower whole, one graph, one backward pass."""
    embeddings = [encode(batch) for encode, batch in zip(encoders, inputs)]
    value = loss(embeddings[0], *([torch.cat(embeddings[1:])] if len(embeddings) > 1 else []), **(loss_kwargs or {}))
    (value * scale).backward()
    return value.detach()


def plain_step_in_pieces(loss, encoders, inputs, plans, cut) -> Tensor:
    """One graph over all mini-batches: what dropout must be compared with, since masks follow the mini-batches."""
    towers = []
    for encode, batch, plan in zip(encoders, inputs, plans):
        parts = [encode(cut(batch, rows)) for rows in plan]
        towers.append(torch.cat(parts)[torch.argsort(torch.cat(plan))])
    value = loss(towers[0], torch.cat(towers[1:]))
    value.backward()
    return value.detach()


def cut_and_trim(batch, rows):
    """Rows of a text batch without trailing padding, the naive way."""
    if isinstance(batch, Tensor):
        return batch[rows]
    width = int(batch["attention_mask"][rows].sum(1).max())
    return {key: value[rows][:, :width] for key, value in batch.items()}


def gradients(*modules) -> dict[str, Tensor | None]:
    found = {}
    for number, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            found[f"{number}.{name}"] = None if parameter.grad is None else parameter.grad.clone()
    return found


def relative_error(got: dict, wanted: dict) -> float:
    """Norm of the difference over the norm of the wanted gradient."""
    assert got.keys() == wanted.keys()
    top = bottom = 0.0
    for name, reference in wanted.items():
        gradient = got[name]
        if reference is None and gradient is None:
            continue
        assert reference is not None, f"{name} has a gradient that it should not have"
        assert gradient is not None, f"{name} has no gradient"
        top += float((gradient.double() - reference.double()).pow(2).sum())
        bottom += float(reference.double().pow(2).sum())
    assert bottom > 0, "the reference gradient is zero: the comparison would prove nothing"
    return (top / bottom) ** 0.5


def clone(module):
    """A copy with the same weights and no gradients."""
    same = copy.deepcopy(module)
    same.zero_grad()
    return same


def recorded(encode, inputs, mini_batch_size=3, **options):
    """One tower's recording."""
    return record_towers([encode], [inputs], mini_batch_size=mini_batch_size, **options)[0]


def send_back(recording, *grads, scale=1.0):
    """One gradient for each leaf."""
    replay([recording], [grads], scale=scale)


def within(budget):
    """Options of a step whose graphs are kept by this budget."""
    memory = StepMemory()
    memory.next_step = lambda *_, **__: budget  # pyright: ignore[reportAttributeAccessIssue]
    return {"keep_graphs": "auto", "memory": memory}


def num_kept(recording) -> int:
    """How many mini-batches hold their graph at this moment."""
    return sum(piece.outputs is not None for piece in recording.pieces)
