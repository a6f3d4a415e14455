"""`anybatch inspect plan`: what a plan's batches hold, on the terminal and as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from anybatch.cli.options import AnchorOption, DataOption, NegativeOption, PictureOption, PositiveOption
from anybatch.cli.progress import Bars, console
from anybatch.core.configuration import load_config
from anybatch.core.errors import AnybatchError
from anybatch.core.files import read_json, write_text
from anybatch.data.pairs import PairData
from anybatch.data.pictures import PictureColumn, describe
from anybatch.insight import Figure, plan_sizes, render_plan_page, set_figures
from anybatch.insight.inspection import PlanInspection, inspect_plan, inspect_sets
from anybatch.losses.config import LossConfig, first_temperature
from anybatch.mining import MiningSet
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import DataConfig, RunConfig
from anybatch.run.data import read_data
from anybatch.run.plan import read_embeddings

EXAMPLES = 3  # suspects of a data set whose texts are printed; the page has more
WIDTH = 100  # characters of a printed text


def command(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan (.safetensors), or the folder of its run.")],
    data: DataOption = None,
    anchor: AnchorOption = None,
    positive: PositiveOption = None,
    negative: NegativeOption = None,
    picture: PictureOption = None,
    limit: Annotated[int | None, typer.Option("--limit", help="The plan was made of the first rows only.")] = None,
    embeddings: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--embeddings", metavar="ANCHORS POSITIVES", help="The teacher's embeddings, two .npy files in row order."
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of the expected loss; by default the run's.")
    ] = None,
    anchors: Annotated[
        int, typer.Option("--anchors", help="Anchors looked at, drawn at random. More is slower and more exact.", min=1)
    ] = 2000,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write a page that explains itself; the file must be new.")
    ] = None,
) -> None:
    """Show what a plan holds beside random batches, with warnings where mining is likely to hurt.

    Data, embeddings and temperature are found in the run's folder; the options are for plans kept elsewhere.
    """
    if html is not None and html.exists():
        raise AnybatchError(f"{html} exists. Choose another file for --html.")
    folder, config, plan_path = find_plan(path)
    plan = BatchPlan.load(plan_path)
    missing: list[str] = []
    columns = {"negatives": tuple(negative or ()), "pictures": tuple(picture or ())}
    given = _given(config, data, {"anchor": anchor, "positive": positive, "limit": limit, **columns})
    pairs = _pairs(plan, given, config, missing)
    vectors = _embeddings(plan, embeddings, folder, config, missing)
    figures = plan_path.with_name("mining.json")
    if not figures.exists() and config is not None and config.plan is not None:
        figures = Path(config.plan).with_name("mining.json")  # a plan made elsewhere left them there
    mining = _stored(figures, plan, missing)
    inspections: dict[str, PlanInspection] = {}
    if vectors is not None:
        if pairs is None:
            missing.append("Repeated texts are not recognised without the data: their rows count as different.")
        if temperature is None:
            temperature = first_temperature(LossConfig() if config is None else config.loss)
        with Bars() as bars:
            settings: dict[str, Any] = {
                "anchor_id": None if pairs is None else pairs.anchor_id,
                "positive_id": None if pairs is None else pairs.positive_id,
                "temperature": temperature,
                "num_anchors": anchors,
                "progress": lambda fraction: bars("ranking", round(100 * fraction), 100),
            }
            if plan.task is None:
                inspections[""] = inspect_plan(plan, *vectors, **settings)
            else:
                inspections = inspect_sets(plan, *vectors, sets=_windows(plan, config), **settings)
    _print(plan_path, plan, pairs, inspections, mining, missing)
    if html is not None:
        page = render_plan_page(
            plan,
            title=f"Plan {plan_path}",
            pairs=pairs,
            inspection=inspections.get(""),
            sets=inspections,
            mining=mining,
            missing=missing,
        )
        write_text(html, page)
        console.print(f"Page: {html}", highlight=False, markup=False, soft_wrap=True)


def find_plan(path: Path) -> tuple[Path, RunConfig | None, Path]:
    """The folder that a plan's file or a run's folder stands for, the configuration in it if there is one, and the plan's file."""
    folder = path if path.is_dir() else path.parent
    config = load_config(RunConfig, folder / "config.yaml") if (folder / "config.yaml").exists() else None
    plan_path = folder / "plan.safetensors" if path.is_dir() else path
    return folder, config, plan_path


def _windows(plan: BatchPlan, config: RunConfig | None) -> list[MiningSet]:
    """The rank windows that the run gave its data sets, which the plan does not keep."""
    if config is None or len(config.data.sets) != len(plan.task_names):
        return []
    return [
        MiningSet(name=name, num_rows=0, skip=one.skip, take=one.take, margin=one.margin)
        for name, one in zip(plan.task_names, config.data.sets, strict=True)
    ]


def _given(config: RunConfig | None, path: str | None, settings: dict[str, Any]) -> DataConfig | None:
    """The data of `--data`, in the run's columns where the options name none."""
    chosen = {name: value for name, value in settings.items() if value not in (None, ())}
    if path is None:
        if chosen:
            raise AnybatchError(
                "--anchor, --positive, --negative, --picture and --limit describe the file of --data, which is not given. Add --data."
            )
        return None
    base = config.data if config is not None else DataConfig(path=path)
    return replace(base, path=path, sets=(), **chosen)


def _pairs(plan: BatchPlan, given: DataConfig | None, config: RunConfig | None, missing: list[str]) -> PairData | None:
    """The plan's data: what was given must fit; what the run names may be gone by now."""
    source = given or (config.data if config is not None else None)
    if source is None:
        missing.append("Texts: the data is not known. Give it with --data (and --anchor, --positive).")
        return None
    try:
        pairs = read_data(source)
        plan.check(num_rows=len(pairs), data_digest=pairs.digest)
    except AnybatchError as error:
        if given is not None:
            raise
        missing.append(f"Texts: {error} Give the data with --data.")
        return None
    if find_spec("PIL") is None and any(isinstance(side, PictureColumn) for side in (pairs.anchors, pairs.positives)):
        missing.append("Pictures: they need Pillow. Install it with: pip install 'anybatch[images]'")
    return pairs


def _embeddings(
    plan: BatchPlan, given: tuple[Path, Path] | None, folder: Path, config: RunConfig | None, missing: list[str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """The teacher's embeddings: given, in the run's folder, or named by its configuration."""
    kept = (folder / "teacher_anchor.npy", folder / "teacher_positive.npy")
    found = given or (kept if all(path.exists() for path in kept) else None)
    if found is None and config is not None:
        teacher = config.teacher
        if teacher.anchor_embeddings and teacher.positive_embeddings:
            found = (Path(teacher.anchor_embeddings), Path(teacher.positive_embeddings))
    if found is None:
        missing.append(
            "Scores, expected loss, example clusters, and the comparison with random batches: they need the teacher's embeddings. Give them with "
            "--embeddings ANCHORS.npy POSITIVES.npy."
        )
        return None
    try:
        return read_embeddings(str(found[0]), plan.num_rows), read_embeddings(str(found[1]), plan.num_rows)
    except AnybatchError as error:
        if given is not None:
            raise
        missing.append(f"Scores, expected loss, example clusters: {error} Give the embeddings with --embeddings.")
        return None


def _stored(path: Path, plan: BatchPlan, missing: list[str]) -> dict[str, Any] | None:
    """What mining left beside the plan, if it is this plan's."""
    stored = (
        read_json(path, "Delete it, or bring back the file that mining wrote.", "plan", "audit")
        if path.exists()
        else None
    )
    if stored is not None and stored.get("plan", plan.digest) == plan.digest:
        return stored
    if plan.cluster_size > 1:
        missing.append(
            "Kept weight, isolated rows, exact hubs, time and memory of each stage: mining writes them to mining.json beside the plan, and "
            f"{path} {'is missing' if stored is None else 'belongs to another plan'}. Keep the two files together."
        )
    return None


def _print(
    path: Path,
    plan: BatchPlan,
    pairs: PairData | None,
    inspections: Mapping[str, PlanInspection],
    mining: dict[str, Any] | None,
    missing: list[str],
) -> None:
    of_sets = (mining or {}).get("sets") or {}
    names = ("",) if plan.task is None else plan.task_names
    stored = {name: (of_sets.get(name) if name else mining) or {} for name in names}
    for name in names:
        statistics = (
            inspections[name].statistics.as_dict() if name in inspections else stored[name].get("statistics") or {}
        )
        for warning in statistics.get("warnings") or ():
            console.print(f"Warning{name and f' ({name})'}: {warning}", highlight=False, markup=False)
    figures = plan_sizes(plan)
    if plan.task is None:
        figures += set_figures(plan, inspection=inspections.get(""), mining=mining)
    table = _table(f"Plan {escape(str(path))}", figures)
    for stage, seconds in (mining or {}).get("seconds", {}).items():
        peak = (mining or {}).get("peak_bytes", {}).get(stage, 0)
        table.add_row(f"mining: {stage}", f"{seconds:.1f} s", "", f"peak {peak / 2**30:.2f} GiB")
    console.print(table)
    for name in plan.task_names:
        own = set_figures(plan, inspection=inspections.get(name), mining=stored[name])
        if own:
            console.print(_table(f"Data set {escape(name)}", own))
    for name in names:
        _print_suspects(name, inspections.get(name), pairs)
    for line in missing:
        console.print(f"Not shown: {line}", highlight=False, markup=False)


def _table(title: str, figures: Sequence[Figure]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("", "this plan", "random", "good"):
        table.add_column(name, justify="right" if name in ("this plan", "random") else "left")
    for figure in figures:
        table.add_row(figure.name, figure.plan, figure.random, figure.good)
    return table


def _print_suspects(name: str, inspection: PlanInspection | None, pairs: PairData | None) -> None:
    if inspection is None or pairs is None or not inspection.suspects:
        return
    of = name and f" of {name}"
    console.print(
        f"The most suspect pairs{of} (is the second positive a right answer to the anchor?):",
        highlight=False,
        markup=False,
    )
    for pair in inspection.suspects[:EXAMPLES]:
        for label, column, row in (
            (f"row {pair.row} anchor", pairs.anchors, pair.row),
            ("own positive", pairs.positives, pair.row),
            (f"row {pair.other} positive", pairs.positives, pair.other),
        ):
            console.print(f"  {label}: {describe(column[row], row)[:WIDTH]}", highlight=False, markup=False)
        console.print("")
