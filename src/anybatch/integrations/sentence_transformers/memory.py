"""A loss's running denominators, filled from the model before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from anybatch.core import distributed
from anybatch.core.progress import counter
from anybatch.integrations.sentence_transformers.embed import embed_texts, embed_to_file
from anybatch.integrations.sentence_transformers.model import Side, lengths_of
from anybatch.losses import ContrastiveLoss
from anybatch.losses.warm_start import running_denominator_of, warm_start

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from anybatch.data.pairs import PairData

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
        folder: Keep embeddings there (warm_start*.npy): after a kill no text is encoded twice, and memory holds one
            shard of texts. Every process must see it. None: in memory.
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
        progress=None if progress is None else lambda done, total: progress("warm start: denominators", done, total),
    )
