"""`anybatch evaluate`: retrieval figures of any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from anybatch.cli.options import AnchorOption, DataOption, ImagesOption, LimitOption, PositiveOption, check_new
from anybatch.cli.progress import Bars, show
from anybatch.core.errors import AnybatchError


def command(
    model: Annotated[
        str, typer.Argument(help="A sentence-transformers model: a folder (such as RUN/model) or a hub name.")
    ],
    data: DataOption = None,
    anchor: AnchorOption = None,
    positive: PositiveOption = None,
    images: ImagesOption = None,
    labelled: Annotated[
        str | None,
        typer.Option(help="Images with classes (folders, or a column 'label') from which those of --data are told."),
    ] = None,
    limit: LimitOption = None,
    retrieval: Annotated[
        tuple[str, str, str] | None,
        typer.Option(metavar="CORPUS QUERIES QRELS", help="A retrieval set (BEIR's layout), in place of --data."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which split of the judgements.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a text is cut at.")] = None,
    anchor_prompt: Annotated[
        str | None, typer.Option(help="Text put before each anchor or query, in place of the model's own.")
    ] = None,
    positive_prompt: Annotated[
        str | None, typer.Option(help="Text put before each positive or document, in place of the model's own.")
    ] = None,
    quoting: Annotated[
        Literal["standard", "raw"] | None,
        typer.Option(help="Of CSV and TSV: standard, or raw where quotes are plain characters."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write the figures to this JSON file; it must be new.")
    ] = None,
) -> None:
    """Measure a model: recall, MRR and nDCG on held-out pairs or on a retrieval set, or classes of images."""
    from anybatch.core.files import write_text
    from anybatch.data.reading import read_pairs
    from anybatch.data.retrieval import read_retrieval
    from anybatch.insight.tables import metrics_table
    from anybatch.integrations.sentence_transformers.model import ModelConfig, load_model
    from anybatch.run.evaluate_model import evaluate_model
    from anybatch.vision.read_images import LabelledImages, read_images

    check_new(output, "--output")
    of_pairs = {"--data": data, "--anchor": anchor, "--positive": positive, "--images": images, "--limit": limit}
    of_retrieval = {"--retrieval": retrieval, "--split": split}
    given = [[name for name, value in kind.items() if value is not None] for kind in (of_pairs, of_retrieval)]
    if all(given):
        raise AnybatchError(
            f"Got {given[0][0]}, which belongs to pairs, and {given[1][0]}, which belongs to a retrieval set. Give "
            f"pairs ({', '.join(of_pairs)}) or a retrieval set ({', '.join(of_retrieval)})."
        )
    if labelled is not None:
        unfit = [name for name in ("--positive", "--images", *of_retrieval) if name in (*given[0], *given[1])]
        if data is None or unfit:
            raise AnybatchError(
                f"--labelled is given {f'with {unfit[0]}' if unfit else 'without --data'}: it is for images with "
                "classes, which --data are told by. Expected --labelled TRAIN --data TEST."
            )
        known, test = (read_images(path, column=anchor, limit=limit) for path in (labelled, data))
        held_out = LabelledImages(known=known, test=test)
    elif data is not None:
        held_out = read_pairs(
            data, anchor=anchor, positive=positive, negatives=(), images=images, quoting=quoting, limit=limit
        )
    elif retrieval is not None:
        held_out = read_retrieval(*retrieval, split=split, quoting=quoting)
    else:
        raise AnybatchError("Nothing to measure on: give --data, or --retrieval with its three files.")
    loaded = load_model(
        ModelConfig(name=model, max_length=max_length, anchor_prompt=anchor_prompt, positive_prompt=positive_prompt)
    )
    with Bars() as bars:
        metrics = evaluate_model(loaded, held_out, progress=bars)
    show(metrics_table({Path(model).name or model: metrics}))
    if output is not None:
        write_text(output, json.dumps(metrics, indent=2))
