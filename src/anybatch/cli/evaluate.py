"""`anybatch evaluate`: retrieval figures of any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.options import AnchorOption, DataOption, ImageOption, PositiveOption
from anybatch.cli.progress import Bars, console
from anybatch.core.errors import AnybatchError
from anybatch.core.files import write_text
from anybatch.data.pairs import read_pairs, read_retrieval
from anybatch.insight.tables import metrics_table
from anybatch.integrations.sentence_transformers.model import ModelConfig, load_model
from anybatch.run.pipeline import evaluate_model


def command(
    model: Annotated[
        str, typer.Argument(help="A sentence-transformers model: a folder (such as RUN/model) or a hub name.")
    ],
    data: DataOption = None,
    anchor: AnchorOption = None,
    positive: PositiveOption = None,
    image: ImageOption = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Use only the first pairs.")] = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="Documents of a retrieval set (BEIR's layout), in place of --data.")
    ] = None,
    queries: Annotated[str | None, typer.Option("--queries", help="Queries of the retrieval set.")] = None,
    qrels: Annotated[str | None, typer.Option("--qrels", help="Relevance judgements of the retrieval set.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Which split of the judgements.")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens a text is cut at.")] = None,
    anchor_prompt: Annotated[
        str | None,
        typer.Option("--anchor-prompt", help="Text put before each anchor or query, in place of the model's own."),
    ] = None,
    positive_prompt: Annotated[
        str | None,
        typer.Option(
            "--positive-prompt", help="Text put before each positive or document, in place of the model's own."
        ),
    ] = None,
    quoting: Annotated[
        str | None,
        typer.Option("--quoting", help="Of CSV and TSV: standard, or raw where quotes are plain characters."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the figures to this JSON file; it must be new.")
    ] = None,
) -> None:
    """Measure a model: recall, MRR and nDCG on held-out pairs or on a retrieval set."""
    if output is not None and output.exists():
        raise AnybatchError(f"{output} exists. Choose another file for --output.")
    if output is not None and not output.absolute().parent.is_dir():
        raise AnybatchError(f"There is no folder {output.absolute().parent} for --output. Make it, or choose another.")
    of_pairs = {"--data": data, "--anchor": anchor, "--positive": positive, "--image": image, "--limit": limit}
    of_retrieval = {"--corpus": corpus, "--queries": queries, "--qrels": qrels, "--split": split}
    given = [[name for name, value in side.items() if value is not None] for side in (of_pairs, of_retrieval)]
    if all(given):
        raise AnybatchError(
            f"Got {given[0][0]}, which belongs to pairs, and {given[1][0]}, which belongs to a retrieval set. Give pairs ({', '.join(of_pairs)}) "
            f"or a retrieval set ({', '.join(of_retrieval)})."
        )
    if data is not None:
        columns = {"anchor": anchor, "positive": positive, "negatives": (), "quoting": quoting}
        columns["images"] = None if image is None else [name for name in image if name]
        held_out = read_pairs(data, limit=limit, **columns)
    elif corpus is not None and queries is not None and qrels is not None:
        held_out = read_retrieval(corpus, queries, qrels, split=split, quoting=quoting)  # pyright: ignore[reportArgumentType] - refused by name
    else:
        raise AnybatchError("Nothing to measure on: give --data, or all of --corpus, --queries and --qrels.")
    loaded = load_model(
        ModelConfig(name=model, max_length=max_length, anchor_prompt=anchor_prompt, positive_prompt=positive_prompt)
    )
    with Bars() as bars:
        metrics = evaluate_model(loaded, held_out, progress=bars)
    console.print(metrics_table({Path(model).name or model: metrics}))
    if output is not None:
        write_text(output, json.dumps(metrics, indent=2))
