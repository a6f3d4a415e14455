"""The configuration and the result of one run. Each part's settings are owned by the room that they configure."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from anybatch.core.configuration import Configuration, Count, Range, Seed
from anybatch.core.errors import AnybatchError
from anybatch.core.files import check_name, read_sealed
from anybatch.core.yaml_files import load_config
from anybatch.integrations.sentence_transformers.model import ModelConfig, check_kwargs
from anybatch.integrations.sentence_transformers.training import TrainConfig, TrainResult
from anybatch.losses.registry import AUTO, LossConfig
from anybatch.mining import MiningConfig, RankWindow

SPLIT = "evaluation.split is for a retrieval set, a folder in BEIR's layout. Leave it out."


@dataclass(frozen=True, kw_only=True)
class SetConfig(Configuration):
    """One of several data sets. What is None is as in `data` and `mining`.

    Attributes:
        path: As `data.path`, one data set.
        name: For plans, reports and folders, a plain file name; None for the file's.
        anchor, positive, images: As in `data`.
        anchor_prompt, positive_prompt: Instructions before its texts in training, behind the model's own; where there
            is an image alone, its text.
        window: Its own rank window, as `mining.window`.

    Example:
        >>> SetConfig(path="questions.jsonl", anchor_prompt="question: ").window
    """

    path: str
    name: str | None = None
    anchor: str | tuple[str, ...] | None = None
    positive: str | tuple[str, ...] | None = None
    images: str | None = None
    anchor_prompt: str = ""
    positive_prompt: str = ""
    window: RankWindow | None = None

    section: ClassVar[str] = "data.sets[]"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None:
            check_name(self.name, "data set (data.sets[].name)")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Configuration):
    """The training pairs.

    Attributes:
        path: JSONL(.gz), CSV, TSV, Parquet, a folder saved by `datasets`, or of the hub hf://OWNER/NAME, with :SPLIT
            or /CONFIGURATION/SPLIT behind it. A folder of such files, or of one folder a task, a pattern, or a saved
            `DatasetDict`, is several data sets with the same columns.
        sets: Several data sets, each with its own columns and instructions, instead of `path`.
        anchor, positive: Names of the columns, a text, images, or a text with images; None for conventional ones
            (anchor and positive, query and pos, question and answer and the like, with query_image, pos_image_path and
            the like beside them), which are said.
        negatives: Names of columns with explicit negatives; None for those called negative, neg_1, neg_image_path and
            the like, [] for none.
        images: The folder that paths of images start from; None for that of the file, "" where no column holds paths.
        quoting: Of CSV and TSV, the held-out ones too: "standard" (the usual rules), "raw" (quotes are plain
            characters); None for the usual rules, refusing a file that can be read both ways.
        views: 2: the data are one column of images without labels, of which two random views are a pair
            (docs/images.md).
        limit: Use only the first rows of each data set; None for all.
        skip_bad: Leave out rows that would be refused (an empty side, a value that is no text, a broken image), and say
            which.

    Example:
        >>> DataConfig(path="pairs.jsonl.gz", anchor="title", positive="abstract").limit
    """

    path: str | None = None
    sets: tuple[SetConfig, ...] = ()
    anchor: str | tuple[str, ...] | None = None
    positive: str | tuple[str, ...] | None = None
    negatives: tuple[str, ...] | None = None
    images: str | None = None
    quoting: Literal["standard", "raw"] | None = None
    views: Literal[2] | None = None
    limit: Count | None = None
    skip_bad: bool = False

    section: ClassVar[str] = "data"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.path is None) == (not self.sets):
            given = "both" if self.sets else "neither"
            raise AnybatchError(f"The training data need data.path (--data) or data.sets; {given} was given.")
        of_pairs = [name for name in ("sets", "positive", "negatives", "images", "quoting") if getattr(self, name)]
        if self.views is not None and of_pairs:
            raise AnybatchError(
                f"data.{of_pairs[0]} is given, and data.views, whose data are one column of images (data.anchor). "
                "Leave out one of the two."
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Configuration):
    """The held-out data: pairs in the training columns, or a retrieval set with relevance judgements.

    Attributes:
        path: Held-out pairs: each anchor must find its positive among all of them; or a folder in BEIR's layout. With
            `data.views` images with classes, which are told by those of the training images. "auto" holds out 5% of the
            training pairs, at least 50 and at most 1,000, that share no text or image with the others (none of fewer
            than 250 pairs, beside `data.views` or `teacher.embeddings`, or where the plan is one of all pairs); None
            for none.
        images: The folder that its paths of images start from; None for `data.images`, or that of its file.
        split: Which judgements of a folder in BEIR's layout: a file of its qrels/.

    Example:
        >>> EvaluationConfig(path="scifact").split
    """

    path: str | None = AUTO
    images: str | None = None
    split: str | None = None

    section: ClassVar[str] = "evaluation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split is not None and self.path in (None, AUTO):
            raise AnybatchError(SPLIT)
        if self.images is not None and self.path in (None, AUTO):
            raise AnybatchError(
                "evaluation.images is given, the folder of the images of evaluation.path, which names no data. Leave "
                "it out, or name them (--eval)."
            )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Configuration):
    """Who ranks the data for mining: a model, or embeddings that exist already.

    Attributes:
        name: A sentence-transformers model; None with precomputed embeddings, or when no mining is asked for.
        max_length: Tokens a text is cut at.
        anchor_prompt, positive_prompt, kwargs: As in `model`.
        precision: Of the embeddings on disk; "float16" halves them and ranks the same but for near ties.
        embeddings: Two `.npy` files, of anchors and of positives, each (rows, dimensions) in the rows' order.

    Example:
        >>> TeacherConfig(embeddings=("anchors.npy", "positives.npy")).name
    """

    name: str | None = None
    max_length: Annotated[int, Range(2)] | None = None
    anchor_prompt: str | None = None
    positive_prompt: str | None = None
    kwargs: dict[str, Any] | None = None
    precision: Literal["float32", "float16"] = "float32"
    embeddings: tuple[str, str] | None = None

    section: ClassVar[str] = "teacher"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kwargs(self.kwargs, "teacher.kwargs")
        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        if self.embeddings is not None and given != ["embeddings"]:
            raise AnybatchError(
                f"teacher.{given[0]} is for a teacher that embeds the data, and teacher.embeddings are given. Leave "
                "one of them out."
            )

    @property
    def is_named(self) -> bool:
        """Whether there is one: a model, or its embeddings."""
        return self.name is not None or self.embeddings is not None


@dataclass(frozen=True, kw_only=True)
class RunConfig(Configuration):
    """One run.

    Attributes:
        output: The folder of the run.
        data, model, teacher, mining, loss, train, evaluation: What the rooms that own them say.
        batch_size: The contrastive batch, over all processes.
        seed: Fixes batches, initialisation and dropout.
        plan: A plan made by `anybatch mine`; None to make one.

    Example:
        >>> config = RunConfig(output="runs/first", data=DataConfig(path="pairs.jsonl"), batch_size=128)
        >>> resolved(config).mining.batch_size
        128
    """

    output: str
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    batch_size: Count = 64
    seed: Seed = 0
    plan: str | None = None
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "seed"):
            of_mining, of_run = getattr(self.mining, name), getattr(self, name)
            if of_mining not in (getattr(MiningConfig(), name), of_run):
                raise AnybatchError(
                    f"mining.{name} is {of_mining} and {name} is {of_run}; set {name} alone, which holds for the whole "
                    "run."
                )
        if self.train.eval_steps is not None and self.evaluation.path is None:
            raise AnybatchError(
                f"train.eval_steps is {self.train.eval_steps}, and there is no held-out data to evaluate on. Give "
                "evaluation.path, or leave it out."
            )


def resolved(config: RunConfig) -> RunConfig:
    """The configuration as the run takes it: mining with the run's own batch_size and seed."""
    return replace(config, mining=replace(config.mining, batch_size=config.batch_size, seed=config.seed))


def read_config(folder: Path) -> RunConfig:
    """The configuration kept in a run's folder, refused if it was changed or damaged since."""
    path = folder / "config.yaml"
    read_sealed(
        path,
        "Put back the file that the run was started with; for other settings start another run, with --config and a "
        "new --output.",
    )
    return load_config(RunConfig, path)


@dataclass(frozen=True, kw_only=True)
class RunResult(TrainResult):
    """What a run left behind: how it trained; figures of the trained and the untrained model on held-out data."""

    metrics: dict[str, float]
    metrics_untrained: dict[str, float]
