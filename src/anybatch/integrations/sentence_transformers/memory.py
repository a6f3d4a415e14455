"""A loss's running denominators and the model: a warm start, and how far they are from the exact ones, in the log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from transformers import TrainerCallback

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.progress import counter
from anybatch.data.images import pick
from anybatch.integrations.sentence_transformers.callback import add_to_log
from anybatch.integrations.sentence_transformers.embed import embed_texts, embed_to_file
from anybatch.integrations.sentence_transformers.model import Side, lengths_of
from anybatch.losses import ContrastiveLoss
from anybatch.losses.warm_start import memory_figures, running_denominator_of, warm_start

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from anybatch.data.pairs import PairData

PROBE_ROWS, PROBE_TARGETS = 256, 1024
Report = Callable[[str, int, int], None]


def warm_start_from_model(
    model: SentenceTransformer,
    pairs: PairData,
    loss: ContrastiveLoss,
    *,
    batch_size: int = 128,
    folder: str | Path | None = None,
    progress: Report | None = None,
) -> None:
    """Encode all pairs with the model as it is now, without dropout, and fill the loss's denominators from them.

    Args:
        model: The model that is trained. Anchors are its queries and positives its documents.
        pairs: The training pairs, in the order of the rows that the loss remembers.
        loss: A loss of `anybatch.losses` with running denominators (not the `CachedLoss` around it).
        batch_size: Texts per forward pass.
        folder: Keep embeddings and progress there (warm_start*): a killed one goes on where it stopped, and memory
            holds one shard of texts. Every process must see it. None: in memory.
        progress: Called with (stage, done, total).

    Cost: one forward pass per text, shared over processes, then the warm start.
    """
    running_denominator_of(loss)
    sides = []
    training = model.training
    for name, side, texts in zip(("anchor", "positive"), get_args(Side), pairs.prompted, strict=False):
        total = len(texts) if folder is not None else distributed.shares(len(texts))[distributed.rank()]
        report = counter(progress, f"warm start: {name}s", total) if progress is not None else None
        if folder is None:
            sides.append(embed_texts(model, texts, side=side, batch_size=batch_size, shared=True, progress=report))
        else:
            path, identity = Path(folder) / f"warm_start_{name}.npy", {"max_length": lengths_of(model)}
            sides.append(
                embed_to_file(model, texts, path, identity=identity, side=side, batch_size=batch_size, progress=report)
            )
    model.train(training)
    warm_start(
        loss,
        sides[0],
        sides[1],
        anchor_id=pairs.anchor_id,
        positive_id=pairs.positive_id,
        file=None if folder is None else Path(folder) / "warm_start.safetensors",
        progress=None if progress is None else lambda done, total: progress("warm start: denominators", done, total),
    )


def probe_memory(
    model: SentenceTransformer, pairs: PairData, loss: ContrastiveLoss, *, batch_size: int = 128, seed: int = 0
) -> dict[str, float]:
    """`memory_figures` of 256 rows against 1024 targets (all of a smaller data set), encoded by the model as it is now.

    The same rows for one `seed`, so that figures can be compared over a run. Cost: 2048 forward passes at most.
    """
    directions = len(running_denominator_of(loss).log_mean)
    rows = np.random.default_rng(seed).choice(len(pairs), min(PROBE_TARGETS, len(pairs)), replace=False)
    training = model.training
    sides = [
        embed_texts(model, pick(texts, rows), side=side, batch_size=batch_size)
        for side, texts in zip(get_args(Side), pairs.prompted, strict=False)
    ]
    model.train(training)
    figures = {}
    for direction in range(directions):
        of_direction = memory_figures(
            loss,
            sides[0],
            sides[1],
            index=torch.as_tensor(rows),
            probe=PROBE_ROWS,
            anchor_id=np.asarray(pairs.anchor_id)[rows],
            positive_id=np.asarray(pairs.positive_id)[rows],
            direction=direction,
        )
        figures |= {f"{name}_back" if direction else name: value for name, value in of_direction.items()}
    return figures


class MemoryCallback(TrainerCallback):
    """Puts the running denominators beside the exact ones into the log, every `probe_steps` steps (`probe_memory`).

    Give it to the Trainer before the callback that writes the log.

    Example:
        >>> from anybatch.data.pairs import PairData
        >>> from anybatch.losses import SogCLR
        >>> pairs = PairData(anchors=["a", "b"], positives=["A", "B"])
        >>> model = torch.nn.Linear(3, 2)  # a SentenceTransformer
        >>> callbacks = [MemoryCallback(model, pairs, SogCLR(num_rows=2), probe_steps=100)]
    """

    def __init__(self, model: SentenceTransformer, pairs: PairData, loss: ContrastiveLoss, *, probe_steps: int) -> None:
        if probe_steps < 1:
            raise AnybatchError(f"probe_steps is {probe_steps}; expected at least 1.")
        self.model, self.pairs, self.loss, self.probe_steps = model, pairs, loss, probe_steps
        self.figures: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, if it is time."""
        if state.global_step % self.probe_steps == 0:
            self.figures = probe_memory(self.model, self.pairs, self.loss)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the newest figures to the trainer's log, once."""
        if add_to_log(state, logs, self.figures):
            self.figures = {}
