"""Students that train in seconds to minutes on one core, and their figures on a search.

    small    texts: mean of word embeddings, then a residual MLP, 128 dimensions; pictures: four convolutions; scratch
    words    texts: the same over the pretrained token table of a sentence-transformers model
    layers1  texts: that model, cut to its first layer (layers2: its first two), mean pooling

Words of `small` are hashed (CRC-32) into a small table, so that there is no vocabulary to keep.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.study_tasks import Inputs, Search

BUCKETS, WIDTH, WORDS = 2**13, 128, 64
BLOCK = 512  # texts or pictures a forward pass when evaluating


@dataclass(frozen=True, kw_only=True, eq=False)
class Bags:
    """Texts as word numbers: those of row i are `words[starts[i] : starts[i + 1]]`."""

    words: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Bags:
        """From the words of each row; a row without any has word 0."""
        rows = [row or [0] for row in rows]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        return cls(words=np.concatenate([np.asarray(row, np.int64) for row in rows]), starts=starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def select(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The words of these rows, one after the other, and where each row starts: what `nn.EmbeddingBag` takes."""
        lengths = (self.starts[1:] - self.starts[:-1])[rows]
        ends = np.cumsum(lengths)
        offsets = ends - lengths
        places = np.arange(ends[-1]) - np.repeat(offsets - self.starts[rows], lengths)
        return torch.from_numpy(self.words[places]), torch.from_numpy(offsets)


class WordBags(nn.Module):
    """Mean of word embeddings, then a residual MLP: (rows of words) -> (B, width)."""

    def __init__(self, table: Tensor, *, sparse: bool) -> None:
        super().__init__()
        width = table.shape[1]
        self.table = nn.EmbeddingBag.from_pretrained(table.clone(), mode="mean", sparse=sparse, freeze=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, width)
        )
        if sparse:  # pretrained: begins as the mean of its words
            nn.init.zeros_(self.mlp[-1].weight)  # pyright: ignore
            nn.init.zeros_(self.mlp[-1].bias)  # pyright: ignore

    def forward(self, bags: Bags, rows: np.ndarray) -> Tensor:
        """Embed some rows."""
        mean = self.table(*bags.select(rows))
        return mean + self.mlp(mean)


class Pictures(nn.Module):
    """Four convolutions and a linear map: (B, 3, 16, 16) -> (B, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (3, 32, 64, 96, 128), []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1], WIDTH))

    def forward(self, pictures: np.ndarray, rows: np.ndarray) -> Tensor:
        """Embed some rows."""
        return self.layers(torch.from_numpy(pictures[rows]).float() / 127.5 - 1)


class FirstLayers(nn.Module):
    """The first layers of a transformer, mean pooling."""

    def __init__(self, model: str, layers: int) -> None:
        super().__init__()
        from transformers import AutoModel

        self.transformer = AutoModel.from_pretrained(model, add_pooling_layer=False)
        self.transformer.encoder.layer = self.transformer.encoder.layer[:layers]
        for module in self.transformer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, bags: Bags, rows: np.ndarray) -> Tensor:
        """Embed some rows."""
        texts = [torch.from_numpy(bags.words[bags.starts[row] : bags.starts[row + 1]]) for row in rows]
        tokens = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        there = torch.arange(tokens.shape[1])[None] < torch.tensor([len(text) for text in texts])[:, None]
        states = self.transformer(input_ids=tokens, attention_mask=there.long()).last_hidden_state
        return (states * there[:, :, None]).sum(dim=1) / there.sum(dim=1, keepdim=True)


class Student(nn.Module):
    """Encoders of both sides, which may be one and the same, and how inputs are made ready for them.

    Args:
        kind: See the module.
        pictures: Whether the anchors are pictures.
        model: Path of the pretrained model, of the kinds that need one.
    """

    def __init__(self, kind: str, *, pictures: bool, model: str | None) -> None:
        super().__init__()
        self.kind, self.model = kind, model
        if kind == "small":
            self.positive: nn.Module = WordBags(torch.randn(BUCKETS, WIDTH) * 0.1, sparse=False)
        elif kind == "words":
            self.positive = WordBags(_token_table(model), sparse=True)
        else:
            self.positive = FirstLayers(str(model), int(kind.removeprefix("layers")))
        self.anchor = Pictures() if pictures else self.positive

    def prepare(self, inputs: Inputs) -> Bags | np.ndarray:
        """Texts as word numbers, once for all runs; pictures as they are."""
        if isinstance(inputs, np.ndarray):
            return inputs
        return _bags("small" if self.kind == "small" else str(self.model), _Same(inputs), self.kind[:6] == "layers")

    def forward(self, inputs: Inputs, rows: np.ndarray, *, back: bool) -> Tensor:
        """(B, D) of some anchors, or (back) of some positives; not normalised."""
        return (self.positive if back else self.anchor)(self.prepare(inputs), rows)

    @torch.no_grad()
    def embed(self, inputs: Inputs, *, back: bool) -> Tensor:
        """(n, D) of unit length."""
        blocks = np.array_split(np.arange(len(inputs)), max(1, len(inputs) // BLOCK))
        return nn.functional.normalize(torch.cat([self(inputs, rows, back=back) for rows in blocks]), dim=1)

    def optimizers(self, rate: float) -> list[torch.optim.Optimizer]:
        """Adam; a pretrained table has a sparse one."""
        sparse = [layer for layer in self.modules() if isinstance(layer, nn.EmbeddingBag) and layer.sparse]
        tables = {parameter for layer in sparse for parameter in layer.parameters()}
        rest = [parameter for parameter in self.parameters() if parameter not in tables]
        optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(rest, lr=rate, fused=True)]
        return optimizers + ([torch.optim.SparseAdam(list(tables), lr=rate)] if tables else [])


def score(student: Student, searches: Sequence[Search]) -> float:
    """nDCG@10, the mean over the searches."""
    student.eval()
    embedded: dict[tuple[int, bool], Tensor] = {}

    def embed(inputs: Inputs, back: bool) -> Tensor:
        key = id(inputs), back
        if key not in embedded:
            embedded[key] = student.embed(inputs, back=back)
        return embedded[key]

    figures = []
    for search in searches:
        queries, corpus = embed(search.queries, search.back), embed(search.corpus, not search.back)
        depth, total = min(10, len(corpus)), 0.0
        gains = 1 / np.log2(np.arange(2, 2 + depth))
        best = torch.cat([(block @ corpus.T).topk(depth, dim=1).indices for block in queries.split(BLOCK)]).numpy()
        for found, wanted in zip(best, search.relevant, strict=True):
            total += gains[np.isin(found, list(wanted))].sum() / gains[: len(wanted)].sum()
        figures.append(total / len(queries))
    student.train()
    return float(np.mean(figures))


class _Same:
    """A list as a key of a cache: equal where it is the very same list, which is kept."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.texts is other.texts

    def __hash__(self) -> int:
        return id(self.texts)


@cache
def _bags(words: str, same: _Same, special: bool) -> Bags:
    if words == "small":
        return Bags.of(
            [
                [zlib.crc32(word.encode()) % BUCKETS for word in re.findall(r"\w+", text.lower())[:WORDS]]
                for text in same.texts
            ]
        )
    found = _tokenizer(words)(
        list(same.texts), truncation=True, max_length=32 if special else WORDS, add_special_tokens=special
    )
    return Bags.of(found["input_ids"])


@cache
def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@cache
def _token_table(model: str | None) -> Tensor:
    from transformers import AutoModel

    return AutoModel.from_pretrained(str(model)).embeddings.word_embeddings.weight.detach()
