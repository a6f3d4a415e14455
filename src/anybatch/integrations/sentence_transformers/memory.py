"""A loss's memory and the model: warm start, and its denominators beside the exact ones in the log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.files import digest_of
from anybatch.core.progress import counter
from anybatch.data.images import Column, pick
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
    """Encode all pairs with the model as it is now, without dropout, and fill the memory of the loss from them.

    Args:
        model: The model that is trained. Anchors are its queries and positives its documents, with its own prompts and
            routes.
        pairs: The training pairs, in the order of the rows that the loss remembers; equal texts are no negatives of
            each other.
        loss: A loss of `anybatch.losses` with memory (not the `CachedLoss` around it).
        batch_size: Texts per forward pass.
        folder: Keep embeddings and progress there (warm_start*.npy, warm_start.safetensors): a killed one goes on where
            it stopped, and memory holds one shard of texts. None: in memory, nothing is kept.
        progress: Called with (stage, done, total).

    Raises:
        AnybatchError: A loss without memory; files of other weights in `folder`.

    Cost: one forward pass a text, then the warm start. Under several processes each encodes its share; without `folder`
    the embeddings are then gathered, with it every process must see the folder.
    """
    running_denominator_of(loss)
    sides = []
    training = model.training
    for name, side, texts in zip(("anchor", "positive"), get_args(Side), pairs.prompted, strict=False):
        total = len(texts) if folder is not None else distributed.shares(len(texts))[distributed.rank()]
        report = counter(progress, f"warm start: {name}s", total) if progress is not None else None
        if folder is None:
            sides.append(_embed_shared(model, texts, side=side, batch_size=batch_size, progress=report))
        else:
            identity = {"weights": _digest(model), "max_length": lengths_of(model)}
            path = Path(folder) / f"warm_start_{name}.npy"
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
    model: SentenceTransformer,
    pairs: PairData,
    loss: ContrastiveLoss,
    *,
    batch_size: int = 128,
    seed: int = 0,
) -> dict[str, float]:
    """`memory_figures` of 256 rows drawn by `seed` against 1024 targets, or all, encoded by the model as it is now.

    Args:
        model, pairs, loss, batch_size: See `warm_start_from_model`.
        seed: Which rows; the same at every call, so that figures can be compared over a run.

    Cost: 2048 forward passes at most.
    """
    memory = running_denominator_of(loss)
    rows = np.random.default_rng(seed).choice(len(pairs), min(PROBE_TARGETS, len(pairs)), replace=False)
    training = model.training
    sides = [
        embed_texts(model, pick(texts, rows), side=side, batch_size=batch_size)
        for side, texts in zip(get_args(Side), pairs.prompted, strict=False)
    ]
    model.train(training)
    figures = {}
    for direction in range(len(memory.log_mean)):
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
    """Puts the memory beside the exact denominators into the log, every so many steps.

    Args:
        model, pairs, loss: See `warm_start_from_model`.
        probe_steps: Steps between measurements (`probe_memory`), which go into the next line of the log.

    Give it to the Trainer before the callback that writes the log.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        pairs: PairData,
        loss: ContrastiveLoss,
        *,
        probe_steps: int,
    ) -> None:
        if probe_steps < 1:
            raise AnybatchError(f"probe_steps is {probe_steps}; expected at least 1.")
        self.model, self.pairs, self.loss = model, pairs, loss
        self.probe_steps = probe_steps
        self.figures: dict[str, float] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure."""
        if state.global_step % self.probe_steps == 0:
            self.figures = probe_memory(self.model, self.pairs, self.loss)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the newest figures to the trainer's log, once."""
        if logs is None or "loss" not in logs or not self.figures:
            return
        logs.update(self.figures)
        if state.log_history:
            state.log_history[-1].update(self.figures)
        self.figures = {}


def _embed_shared(
    model: SentenceTransformer,
    texts: Column,
    *,
    side: Side,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> np.ndarray:
    """`embed_texts`, each rank its own texts; the same array on all ranks."""
    sizes = distributed.shares(len(texts))
    first = sum(sizes[: distributed.rank()])
    own = texts[first : first + sizes[distributed.rank()]]
    embeddings = embed_texts(model, own, side=side, batch_size=batch_size, progress=progress)
    if not distributed.is_active():
        return embeddings
    return distributed.gather_rows(torch.from_numpy(embeddings).to(model.device), sizes).cpu().numpy()


def _digest(model: SentenceTransformer) -> str:
    tensors = (tensor.detach().cpu().contiguous().reshape(-1) for tensor in model.state_dict().values())
    return digest_of(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors)
