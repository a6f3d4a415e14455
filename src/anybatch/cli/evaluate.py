"""`anybatch evaluate`: retrieval figures of any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.options import AnchorOption, DataOption, PositiveOption
from anybatch.cli.progress import Bars, console
from anybatch.data import read_pairs, read_retrieval
from anybatch.errors import AnybatchError
from anybatch.files import write_text
from anybatch.integrations.sentence_transformers.model import ModelConfig, load_model
from anybatch.pipeline import evaluate_model
from anybatch.report.tables import metrics_table


def command(
    model: Annotated[
        str, typer.Argument(help="A sentence-transformers model: a folder (such as RUN/model) or a hub name.")
    ],
    data: DataOption = None,
    anchor: AnchorOption = None,
    positive: PositiveOption = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Use only the first pairs.")] = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="Documents of a retrieval set (BEIR's layout), in place of --data.")
    ] = None,
    queries: Annotated[str | None, typer.Option("--queries", help="Queries of the retrieval set.")] = None,
    qrels: Annotated[str | None, typer.Option("--qrels", help="Relevance judgements of the retrieval set.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Which split of queries and judgements.")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens a text is cut at.")] = None,
    anchor_prompt: Annotated[str, typer.Option("--anchor-prompt", help="Text put before each anchor or query.")] = "",
    positive_prompt: Annotated[
        str, typer.Option("--positive-prompt", help="Text put before each positive or document.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the figures to this JSON file; it must be new.")
    ] = None,
) -> None:
    """Measure a model: recall, MRR and nDCG on held-out pairs or on a retrieval set."""
    if output is not None and output.exists():
        raise AnybatchError(f"{output} exists. Choose another file for --output.")
    if data is not None and corpus is not None:
        raise AnybatchError(
            "Got both --data and --corpus. Give pairs (--data) or a retrieval set (--corpus, --queries, --qrels)."
        )
    if data is not None:
        held_out = read_pairs(data, anchor=anchor or "anchor", positive=positive or "positive", limit=limit)
    elif corpus is not None and queries is not None and qrels is not None:
        held_out = read_retrieval(corpus, queries, qrels, split=split)
    else:
        raise AnybatchError("Nothing to measure on: give --data, or all of --corpus, --queries and --qrels.")
    loaded = load_model(ModelConfig(name=model, max_length=max_length))
    with Bars() as bars:
        metrics = evaluate_model(loaded, held_out, prompts=(anchor_prompt, positive_prompt), progress=bars)
    console.print(metrics_table({Path(model).name or model: metrics}))
    if output is not None:
        write_text(output, json.dumps(metrics, indent=2))
