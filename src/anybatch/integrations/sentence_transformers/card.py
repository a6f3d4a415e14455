"""The model card of a run: what was trained and how, figures before and after, and the papers behind it.

The guest's card data in a template of ours (card.md). Card data of a user's own class keep their template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers.base.model_card import format_duration
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

from anybatch import __version__
from anybatch.core import distributed
from anybatch.core.resources import Measure
from anybatch.losses.rows import RowTable
from anybatch.plans.plan import BatchPlan

TEMPLATE = Path(__file__).with_name("card.md")
# As docstrings cite a paper: authors year, "Title" (a remark), arXiv number.
PAPER = re.compile(r'([^".:;()]+?(?: et al\.)?) (\d{4}), "([^"]+)"(?: \([^)]*\))?, arXiv (\d{4}\.\d{4,5})')


@dataclass
class ModelCard(SentenceTransformerModelCardData):
    """The guest's data for a model card, with what a run tells of itself.

    Attributes:
        training: Lines of the table "Training", by label.
        figures: On held-out data, by name: before training, and after it.

    Example:
        >>> card = ModelCard(model_name="My model")
        >>> card.training["Loss"] = "InfoNCE, temperature 0.05"
    """

    training: dict[str, str] = field(default_factory=dict, init=False)
    figures: dict[str, tuple[float, float]] = field(default_factory=dict, init=False)
    template_path: Path = field(default=TEMPLATE, init=False, repr=False)


def describe(
    model: Any,
    training: Mapping[str, str],
    *,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
) -> None:
    """Add lines to the table of the model's card, and figures on held-out data. A user's own class of card has our tags
    alone.
    """
    card = model.model_card_data
    card.version["anybatch"] = __version__
    card.add_tags(["anybatch", f"anybatch:{__version__}"])
    if type(card) is SentenceTransformerModelCardData:
        card.__class__ = ModelCard
        vars(card).update(training={}, figures={}, template_path=TEMPLATE)
    if isinstance(card, ModelCard):
        card.training |= training
        card.figures |= {name: ((before or {})[name], value) for name, value in (after or {}).items()}


def loss_line(cached: Any) -> str:
    """A loss and its temperature: "InfoNCE, temperature 0.05"."""
    settings = cached.get_config_dict()
    learned = ", learned" if any("temperature" in name for name, _ in cached.loss.named_parameters()) else ""
    temperature = f", temperature {settings['temperature']:.4g}{learned}" if "temperature" in settings else ""
    return settings["loss"] + temperature


def batch_line(rows: int, cached: Any) -> str:
    """Pairs of a batch over all ranks, and how many are encoded at once."""
    ranks, size = distributed.world_size(), cached.mini_batch_size
    over = f" over {ranks} processes" if ranks > 1 else ""
    encoded = "encoded as many at a time as fit" if size in ("auto", None) else f"encoded {size} at a time"
    return f"{rows * ranks:,} pairs{over}, {encoded}; the gradient is that of the whole batch"


def plan_lines(plan: BatchPlan | None, rows: RowTable | None) -> dict[str, str]:
    """How the batches were chosen, by which teacher, and what the loss made of it."""
    lines = {}
    if plan is None or plan.cluster_size == 1:
        lines["Batches"] = "random"
    else:
        negatives = f"; {plan.negatives_per_row} hard negatives a row" if plan.negatives_per_row else ""
        lines["Batches"] = f"mined: clusters of {plan.cluster_size} similar rows{negatives} (plan {plan.digest[:12]})"
        if plan.meta.get("teacher"):
            name = str(plan.meta["teacher"])
            lines["Teacher"] = f"`{Path(name).name if Path(name).exists() else name}`, which says what is similar"
    masked = [] if rows is None else ["rows with equal inputs"]
    if rows is not None and rows.suspects is not None:
        masked.append(f"{len(rows.suspects):,} pairs suspected by mining")
    if masked:
        lines["Not negatives"] = " and ".join(masked)
    if rows is not None and rows.weights == "inclusion":
        lines["Weights"] = "by the inverse chance that mining puts two rows into one batch"
    return lines


def cost_line(steps: int, measure: Measure, device: torch.device, *, resumed: bool) -> str:
    """Steps, wall time and peak memory of a training."""
    kind, peak = "process", measure.peak_bytes
    if device.type == "cuda":
        kind, peak = "GPU", torch.cuda.max_memory_allocated(device)
    since = " since it was resumed" if resumed else ""
    return (
        f"{steps:,} steps; {format_duration(measure.seconds)}{since}; peak memory of the {kind} {peak / 2**30:.2f} GiB"
    )


def shown(dataset: Any, *, numbered: bool) -> Any:
    """Data as a card reads them: without row numbers, and with "" for a text that a row lacks."""
    if isinstance(dataset, dict):
        return type(dataset)({name: shown(part, numbered=numbered) for name, part in dataset.items()})
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return dataset
    if numbered and "label" in dataset.column_names:
        dataset = dataset.remove_columns("label")
    return dataset.with_transform(
        lambda cells: {name: ["" if cell is None else cell for cell in column] for name, column in cells.items()}
    )


def bibtex(*sources: Any) -> str:
    """The papers that docstrings cite, as BibTeX, each once.

    >>> from anybatch.losses import InfoNCE
    >>> print(bibtex(InfoNCE, InfoNCE))
    @misc{oord2018,
        title={Representation Learning with Contrastive Predictive Coding},
        author={van den Oord and others},
        year={2018},
        eprint={1807.03748},
        archivePrefix={arXiv},
    }
    """
    entries: dict[str, str] = {}
    for source in sources:
        _, _, references = " ".join((source.__doc__ or "").split()).partition("Reference: ")
        for authors, year, title, number in PAPER.findall(references):
            authors = authors.strip(" ,").replace(" et al.", " and others")
            key = re.split(r" and ", authors)[0].split()[-1].lower() + year
            facts = {"title": title, "author": authors, "year": year, "eprint": number, "archivePrefix": "arXiv"}
            lines = "".join(f"    {name}={{{value}}},\n" for name, value in facts.items())
            entries.setdefault(number, f"@misc{{{key},\n{lines}}}")
    return "\n".join(entries.values())
