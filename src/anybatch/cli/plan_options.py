"""The options of `inspect plan` and `inspect gradient`, and where they find what belongs to a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anybatch.cli.options import AnchorOption, DataOption, ImagesOption, PositiveOption
from anybatch.core.errors import AnybatchError

if TYPE_CHECKING:
    import numpy as np

    from anybatch.data.pairs import PairData
    from anybatch.insight.gradient_error import FrozenPairs


FULL = 8192  # anchors whose losses the full-data gradient is taken of, at least: of more rows it is an estimate


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Which plan to look at; what belongs to it, where that does not lie beside it; how to look."""

    path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan (.safetensors), or the folder of its run.")]
    data: DataOption = None
    anchor: AnchorOption = None
    positive: PositiveOption = None
    images: ImagesOption = None
    embeddings: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="ANCHORS POSITIVES", help="Embeddings of the data, two .npy files in row order."),
    ] = None
    temperature: Annotated[float | None, typer.Option(help="Of the loss; by default the run's.")] = None
    anchors: Annotated[
        int, typer.Option(help="Anchors looked at, drawn at random. More is slower and more exact.", min=2)
    ] = 2000


class PlanSources:
    """A plan, and the run that it lies beside if it does. What is not found is said in `missing`, with its option. What
    an option names must be there and fit; what the run names may be gone by now.
    """

    def __init__(self, options: PlanOptions) -> None:
        from anybatch.core.yaml_files import load_config
        from anybatch.insight.gradient_methods import comparable
        from anybatch.losses.registry import LossConfig, first_temperature
        from anybatch.plans.plan import BatchPlan
        from anybatch.run.config import RunConfig
        from anybatch.run.recipe import with_batches

        self.options = options
        folder = options.path if options.path.is_dir() else options.path.parent
        written = folder / "config.yaml"
        self.config = load_config(RunConfig, written) if written.exists() else None
        self.path = folder / "plan.safetensors" if options.path.is_dir() else options.path
        self.plan = BatchPlan.load(self.path)
        self.loss = LossConfig(name="infonce")
        if self.config is not None:
            self.loss = with_batches(self.config, mined=self.plan.cluster_size > 1).loss
        self.loss, self.left_out = comparable(self.loss)
        given = options.temperature
        self.temperature = first_temperature(self.loss) if given is None else given
        self.missing: list[str] = []

    def pairs(self) -> PairData | None:
        """The plan's data: that of `--data`, read as the run's is, or the run's."""
        from anybatch.run.config import DataConfig
        from anybatch.run.read_data import read_data, split_for_plan

        options, source = self.options, self.config.data if self.config is not None else None
        if options.data is not None:
            columns = {name: getattr(options, name) for name in ("anchor", "positive", "images")}
            given = {name: value for name, value in columns.items() if value not in (None, [])}
            source = replace(source or DataConfig(path=options.data), path=options.data, sets=(), **given)
        if source is None:
            self.missing.append("Texts: the data is not known. Give it with --data.")
            return None
        try:
            pairs = read_data(source)
            if self.config is not None:
                pairs, _ = split_for_plan(self.config, pairs, self.plan)
            self.plan.check(num_rows=len(pairs), data_digest=pairs.digest)
        except AnybatchError as error:
            if options.data is not None:
                raise
            self.missing.append(f"Texts: {error} Give the data with --data.")
            return None
        if pairs.has_images and find_spec("PIL") is None:
            self.missing.append("Images: they need Pillow. Install it with: pip install 'anybatch[vision]'")
        return pairs

    def embeddings(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The teacher's embeddings: given, in the run's folder, or named by its configuration."""
        from anybatch.run.teacher import read_embeddings

        given = self.options.embeddings
        one_column = self.config is not None and self.config.data.views is not None
        names = ("teacher_anchor.npy", "teacher_anchor.npy" if one_column else "teacher_positive.npy")
        kept = tuple(map(self.path.with_name, names))
        files = given or (kept if all(path.exists() for path in kept) else None)
        if files is None and self.config is not None:
            files = self.config.teacher.embeddings
        if files is None:
            self.missing.append(
                "Softmax mass, gradient error, and the comparison with random batches: they need the teacher's "
                "embeddings. Give them with --embeddings ANCHORS.npy POSITIVES.npy."
            )
            return None
        try:
            anchors, positives = (read_embeddings(str(path), self.plan.num_rows) for path in files)
        except AnybatchError as error:
            if given is not None:
                raise
            self.missing.append(f"Softmax mass, gradient error: {error} Give the embeddings with --embeddings.")
            return None
        return anchors, positives

    def frozen(self, vectors: tuple[np.ndarray, np.ndarray], pairs: PairData | None) -> FrozenPairs:
        """The embeddings with the gradient over all data, as the run's loss has it."""
        from anybatch.insight.gradient_methods import frozen_pairs

        anchors = max(self.options.anchors, FULL)
        return frozen_pairs(vectors, pairs, self.plan, self.loss, temperature=self.temperature, num_anchors=anchors)
