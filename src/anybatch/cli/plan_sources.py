"""Where `inspect plan` and `inspect gradient` find what belongs to a plan: options, the run's folder, its settings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from anybatch.core.configuration import load_config
from anybatch.core.errors import AnybatchError
from anybatch.core.files import read_json
from anybatch.data.images import ImageColumn
from anybatch.data.pairs import PairData
from anybatch.losses.config import LossConfig
from anybatch.mining import MiningSet
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import DataConfig, RunConfig
from anybatch.run.read_data import read_data
from anybatch.run.teacher import read_embeddings


@dataclass
class PlanSources:
    """A plan, and the run that it lies beside if it does. What is not found is said in `missing`, with its option.

    What an option names must be there and fit; what the run names may be gone by now.
    """

    path: Path
    plan: BatchPlan
    config: RunConfig | None
    missing: list[str] = field(default_factory=list)

    @classmethod
    def find(cls, path: Path) -> PlanSources:
        """From a plan's file or a run's folder."""
        folder = path if path.is_dir() else path.parent
        written = folder / "config.yaml"
        config = load_config(RunConfig, written) if written.exists() else None
        file = folder / "plan.safetensors" if path.is_dir() else path
        return cls(file, BatchPlan.load(file), config)

    @property
    def loss(self) -> LossConfig:
        """The loss of the run, or the default one."""
        return LossConfig() if self.config is None else self.config.loss

    def pairs(self, path: str | None, columns: dict[str, Any]) -> PairData | None:
        """The plan's data: that of `--data`, in the run's columns where the options name none, or the run's."""
        chosen = {name: value for name, value in columns.items() if value not in (None, ())}
        if path is None and chosen:
            raise AnybatchError(
                "--anchor, --positive, --negative, --image and --limit describe the file of --data, which is not "
                "given. Add --data."
            )
        source = self.config.data if self.config is not None else None
        if path is not None:
            source = replace(source or DataConfig(path=path), path=path, sets=(), **chosen)
        if source is None:
            self.missing.append("Texts: the data is not known. Give it with --data (and --anchor, --positive).")
            return None
        try:
            pairs = read_data(source)
            self.plan.check(num_rows=len(pairs), data_digest=pairs.digest)
        except AnybatchError as error:
            if path is not None:
                raise
            self.missing.append(f"Texts: {error} Give the data with --data.")
            return None
        images = any(isinstance(side, ImageColumn) for side in (pairs.anchors, pairs.positives))
        if images and find_spec("PIL") is None:
            self.missing.append("Images: they need Pillow. Install it with: pip install 'anybatch[images]'")
        return pairs

    def embeddings(self, given: tuple[Path, Path] | None) -> tuple[np.ndarray, np.ndarray] | None:
        """The teacher's embeddings: given, in the run's folder, or named by its configuration."""
        kept = (self.path.with_name("teacher_anchor.npy"), self.path.with_name("teacher_positive.npy"))
        files = given or (kept if all(path.exists() for path in kept) else None)
        if files is None and self.config is not None:
            files = self.config.teacher.embeddings
        if files is None:
            self.missing.append(
                "Scores, expected loss, example clusters, and the comparison with random batches: they need the "
                "teacher's embeddings. Give them with --embeddings ANCHORS.npy POSITIVES.npy."
            )
            return None
        try:
            anchors, positives = (read_embeddings(str(path), self.plan.num_rows) for path in files)
        except AnybatchError as error:
            if given is not None:
                raise
            self.missing.append(
                f"Scores, expected loss, example clusters: {error} Give the embeddings with --embeddings."
            )
            return None
        return anchors, positives

    def mining(self) -> dict[str, Any] | None:
        """What mining left beside the plan, or beside the plan that the run was given, if it is this plan's."""
        path = self.path.with_name("mining.json")
        if not path.exists() and self.config is not None and self.config.plan is not None:
            path = Path(self.config.plan).with_name("mining.json")
        remedy = "Delete it, or bring back the file that mining wrote."
        stored = read_json(path, remedy, "plan", "audit") if path.exists() else None
        if stored is not None and stored.get("plan", self.plan.digest) == self.plan.digest:
            return stored
        if self.plan.cluster_size > 1:
            self.missing.append(
                "Kept weight, isolated rows, exact hubs, time and memory of each stage: mining writes them to "
                f"mining.json beside the plan, and {path} "
                f"{'is missing' if stored is None else 'belongs to another plan'}. Keep the two files together."
            )
        return None

    def windows(self) -> list[MiningSet]:
        """The first ranks of the rows' windows that the run gave its data sets, which the plan does not keep."""
        names = self.plan.task_names
        if self.config is None or len(self.config.data.sets) != len(names):
            return []
        return [
            MiningSet(name=name, num_rows=0, skip=of_set.skip)
            for name, of_set in zip(names, self.config.data.sets, strict=True)
        ]
