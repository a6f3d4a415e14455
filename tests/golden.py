"""Golden values: what losses, plans, the cached step and a short run gave before the code was rearranged.

    python -m tests.golden --write tests/golden.safetensors     # all cases, a minute at most
    python -m tests.golden --exact tests/golden.safetensors     # bit for bit, on the machine and torch that wrote it
    python -m tests.golden tests/golden.safetensors             # within the tolerances of `tests/test_golden.py`
    python -m tests.golden --exact --only "loss: sogclr" tests/golden.safetensors       # the cases whose names begin so

Every case is a line of a table: a loss x a direction x a form of arguments; a mining method x its data sets; and so on.
A case gives labelled tensors. Of small ones the file keeps all numbers, of others the norm and two random
projections, and of each a digest of its bytes. A rearrangement of the code must keep the digests; one that adds numbers
up in another order must keep float64 to 1e-12.

What a renaming in the library touches here: the imports, `build`, `registered`, `row_table`, `call_arguments`,
`plan_of_rows`, `set_tile_bytes`, `grow`, `mined`, `cached_case`, `small_run`, and `STATE_NAMES`, which gives every
buffer and parameter a name that has nothing to do with the class that holds it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from anybatch.caching import cached_step
from anybatch.integrations.sentence_transformers.model import ModelConfig
from anybatch.integrations.sentence_transformers.training import TrainConfig
from anybatch.losses import GammaSchedule, Matryoshka, registry
from anybatch.losses.rows import RowTable
from anybatch.mining import MiningConfig, MiningSet, mine_plan
from anybatch.plans.plan import BatchPlan, PlanSampler
from anybatch.run import job
from anybatch.run.config import DataConfig, RunConfig, TeacherConfig
from tests.conftest import make_tiny_model, write_pairs

FILE = Path(__file__).with_name("golden.safetensors")
BATCH, WIDTH, ROWS, STEPS = 7, 6, 30, 4
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
}  # relative to the norm; other types exactly
RUN_TOLERANCE = 1e-4  # of the training run, whose every step carries the rounding of the one before it
REMOVED = "loss: late_interaction"  # a loss that is no more (docs/log.md); the file is as it was written
Case = dict[str, Tensor]  # label -> tensor


# --- 1. How the library is called: what a renaming changes -----------------------------------------------------------

# Names of buffers and parameters in a state, by what they hold. An order matters only in that the first match counts.
STATE_NAMES = {
    r"denominator\.(log_mean|log_weight)": "denominator",
    r"denominator\.made_at": "denominator made at",
    r"temperatures\.log_temperature": "log temperature",
    r"(temperatures\.rows|others\.0\.(margins|thresholds))\.values": "learned values",
    r"(temperatures\.rows|others\.0\.(margins|thresholds))\.velocity": "velocities",
    r"temperatures\.net\.(\d+)\.0\.(weight|bias)": r"network \1 first \2",
    r"temperatures\.net\.(\d+)\.2\.(weight|bias)": r"network \1 second \2",
    r"bias": "bias",
    r"(denominator|others\.0)\.num_steps": "steps",
    r"denominator\.gamma\.position": "steps of the schedule",
    r"mean": "running mean",
    r"queue\.embeddings": "queue embeddings",
    r"queue\.log_denominator": "queue denominators",
    r"queue\.rows": "queue rows",
    r"queue\.stamps": "queue stamps",
}
# Not compared: constants of the format, and how the queue encodes what it knows of its rows.
STATE_IGNORED = r".*\.(version|relative|embedding_width|data_rows)|queue\.(records|kinds)"


def build(name: str, *, num_rows: int = ROWS, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """A loss by its name in the registry. Its state and its parameters are in `dtype`."""
    loss = _make(name, num_rows, options).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # the first weights of a network come from here, whoever would draw them
        for _, parameter in sorted(named_state(loss, parameters=True)):
            if parameter.ndim:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return loss


def _make(name: str, num_rows: int, options: dict[str, Any]) -> nn.Module:
    options = dict(options)
    steps, steps_per_epoch = options.pop("gamma_steps", None), options.pop("gamma_steps_per_epoch", 1)
    if steps is not None:
        options["gamma"] = GammaSchedule(options["gamma"], num_steps=steps, steps_per_epoch=steps_per_epoch)
    widths, weights = options.pop("matryoshka", None), options.pop("matryoshka_weights", None)
    if widths is None:
        return registry.make_loss(name, num_rows, **options)
    return Matryoshka([registry.make_loss(name, num_rows, **options) for _ in widths], widths, weights=weights)


def registered() -> tuple[str, ...]:
    """The names in the registry of losses."""
    return tuple(registry.METHODS)


def set_tile_bytes(loss: nn.Module, tile_bytes: int) -> None:
    """Let the loss hold so many bytes of scores at a time."""
    for module in loss.modules():
        if hasattr(module, "tile_bytes"):
            module.tile_bytes = tile_bytes  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]


def grow(loss: nn.Module, num_rows: int) -> None:
    """Make room for appended rows."""
    loss.grow(num_rows)  # pyright: ignore[reportCallIssue]


def row_table(*, plan: BatchPlan | None = None, **options: Any) -> RowTable:
    """What losses know of the rows: equal anchors and positives, anchors with several positives, explicit negatives."""
    rows = np.arange(ROWS)
    anchor_id = np.where(rows % 7 == 3, rows - 3, rows)
    positive_id = np.where(rows % 11 == 5, rows - 4, rows)
    negative_id = np.stack([(rows * 7 + 3) % (ROWS + 4), (rows * 5 + 11) % (ROWS + 9)], axis=1)
    return RowTable(anchor_id, positive_id, negative_id=negative_id, plan=plan, **options)


def call_arguments(table: RowTable | None, index: Tensor, num_negatives: int) -> dict[str, Any]:
    """The arguments of a loss for a batch, besides the embeddings."""
    return {"index": index} if table is None else table.arguments(index, num_negatives=num_negatives)


@cache
def plan_of_rows(mixing: str | None) -> BatchPlan:
    """A plan of the rows of the loss cases: one data set, or two of 18 and 12 rows. Some rows are in no cluster."""
    generator = np.random.default_rng(11)
    sizes, names = ((ROWS,), ()) if mixing is None else ((18, 12), ("first", "second"))
    cluster, begin, first = np.full(ROWS, -1, np.int32), 0, 0
    for size in sizes:
        count = (size - 1) // 3  # of 3 rows each; the rest are remainder rows
        placed = begin + generator.permutation(size)[: 3 * count]
        cluster[placed] = first + np.arange(3 * count) // 3
        begin, first = begin + size, first + count
    suspects = generator.integers(0, ROWS, (40, 2))
    suspects = np.unique(np.concatenate([suspects, suspects[:, ::-1]]), axis=0)  # each in both directions
    sets: dict[str, Any] = {}
    if mixing is not None:
        task = np.repeat(np.arange(2, dtype=np.int32), sizes)
        sets = {"task": task, "task_names": names, "mixing": mixing}
    return BatchPlan(
        num_rows=ROWS,
        batch_size=6,
        cluster_size=3,
        cluster=cluster,
        seed=0,
        data_digest="",
        suspects=suspects[suspects[:, 0] != suspects[:, 1]].astype(np.int32),
        **sets,
    )


# --- 2. Losses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A form of arguments: `table` has the options of `row_table`, None for no table; `mixing`: a plan of two sets."""

    table: dict[str, Any] | None = None
    planned: bool = False
    mixing: str | None = None
    negatives: int = 0  # explicit ones a row
    matrix: bool = False  # log-weights and masks as one tensor
    tiles: bool = False
    grows: bool = False


INCLUSION = {"weights": "inclusion"}
EVERYTHING: dict[str, Any] = {"weights": "inclusion", "mask_suspects": True}
ARGUMENTS = {
    "plain": Arguments(),
    "matrix": Arguments(matrix=True, negatives=1),
    "ids": Arguments(table={}),
    "negatives": Arguments(table={}, negatives=2),
    "suspects": Arguments(table={"mask_suspects": True}, planned=True),
    "inclusion": Arguments(table=INCLUSION, planned=True),
    "inclusion, mixed": Arguments(table=INCLUSION, planned=True, mixing="mixed"),
    "inclusion, within": Arguments(table=INCLUSION, planned=True, mixing="within"),
    "sets within": Arguments(table={}, planned=True, mixing="within", negatives=1),
    "everything": Arguments(table=EVERYTHING, planned=True, mixing="mixed", negatives=2),
    "everything, tiles": Arguments(table=EVERYTHING, planned=True, mixing="mixed", negatives=1, tiles=True),
    "plain, tiles": Arguments(tiles=True),
    "grown": Arguments(grows=True),
}
FEW = ("plain", "suspects", "everything", "plain, tiles")
LEARNED: dict[str, Any] = {"learnable_temperature": True}
# Label -> name, options, forms of arguments. The first of a name goes through all forms.
LOSSES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "infonce": ("infonce", {}, tuple(ARGUMENTS)),
    "infonce, learned": ("infonce", LEARNED, FEW),
    "decoupled": ("decoupled", LEARNED, tuple(ARGUMENTS)),
    "count_corrected": ("count_corrected", {}, tuple(ARGUMENTS)),
    "count_corrected, learned": ("count_corrected", LEARNED, FEW),
    "cross_batch": ("cross_batch", {"memory_size": 11, "mean_rows": 9}, tuple(ARGUMENTS)),
    "cross_batch, learned": ("cross_batch", {"memory_size": 40, **LEARNED}, FEW),
    "cross_batch, as it is": ("cross_batch", {"memory_size": 11, "centred": False}, FEW),
    "sogclr": ("sogclr", {"gamma": 0.4, **LEARNED}, tuple(ARGUMENTS)),
    "sogclr, schedule": ("sogclr", {"gamma": 0.2, "gamma_steps": 4, "gamma_steps_per_epoch": 2, "eps": 0.01}, FEW),
    "sogclr, sharded": ("sogclr", {"gamma": 0.4}, FEW),  # sharding went; what it gave is what the whole state gives
    "fastclip v3": ("fastclip", {"gamma": 0.4}, tuple(ARGUMENTS)),
    "fastclip v2": ("fastclip", {"version": "v2", "gamma": 0.4, "temperature_lr": 0.05}, FEW),
    "fastclip v1": ("fastclip", {"version": "v1", "gamma": 0.2, "gamma_steps": 4}, FEW),
    "fastclip v0": ("fastclip", {"version": "v0", "gamma": 0.4}, FEW),
    "isogclr": ("isogclr", {"gamma": 0.4, "temperature_lr": 0.05, "rho": 0.5}, tuple(ARGUMENTS)),
    "tempnet": ("tempnet", {"gamma": 0.4, "dimensions": WIDTH, "temperature_range": (0.05, 1.0)}, tuple(ARGUMENTS)),
    "nuclr": ("nuclr", {"gamma": 0.4, "margin_lr": 0.05, "learn_from": 1}, tuple(ARGUMENTS)),
    "glofnd": (
        "glofnd",
        {"gamma": 0.4, "alpha": 0.3, "threshold_lr": 0.1, "learn_from": 1, **LEARNED},
        tuple(ARGUMENTS),
    ),
    "emc2": ("emc2", LEARNED, tuple(ARGUMENTS)),
    "scent": ("scent", {"alpha": 0.3, **LEARNED}, tuple(ARGUMENTS)),
    "siglip": ("siglip", {"bias": -2.0}, tuple(ARGUMENTS)),
    "auc_cl": ("auc_cl", {}, tuple(ARGUMENTS)),
    "matryoshka of infonce": ("infonce", {"matryoshka": (6, 3), "matryoshka_weights": (1.0, 0.5), **LEARNED}, FEW),
    "matryoshka of sogclr": ("sogclr", {"matryoshka": (4, 2), "gamma": 0.4, **LEARNED}, (*FEW, "grown")),
}
ONE_WAY = ("siglip", "auc_cl")
OWN_DENOMINATOR = ("infonce", "decoupled", "siglip")  # inclusion weights are not defined for them
FLOAT32 = ("infonce, learned", "sogclr", "fastclip v3", "cross_batch", "siglip")


def loss_cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names and cases of `LOSSES` x directions x `ARGUMENTS`."""
    for label, (name, options, forms) in LOSSES.items():
        directions = ("one_way",) if name in ONE_WAY else ("one_way", "both")
        for direction, form in itertools.product(directions, forms):
            dtypes = (torch.float64, torch.float32) if label in FLOAT32 and form == "plain" else (torch.float64,)
            for dtype in dtypes:
                case = f"loss: {label}, {direction}, {form}{'' if dtype == torch.float64 else ', float32'}"
                settings = {**options, "direction": direction}
                if name not in ("auc_cl",):
                    settings["temperature"] = 0.2
                if name in ("siglip", "auc_cl"):
                    del settings["direction"]
                yield case, _bound(loss_case, name, settings, form, dtype)


def loss_case(name: str, settings: dict[str, Any], form: str, dtype: torch.dtype) -> Case:
    """Some training steps with plain gradient descent of the loss's own parameters, then one call in eval mode.

    Labels: the losses; gradients of both sides and of parameters, over all steps; entries of the state after each one.
    """
    chosen = ARGUMENTS[form]
    grows, table = chosen.grows, None
    if chosen.table is not None:
        table_options = dict(chosen.table)
        if name in OWN_DENOMINATOR:
            table_options = {key: value for key, value in table_options.items() if not key.startswith("weight")}
        table = row_table(plan=plan_of_rows(chosen.mixing) if chosen.planned else None, **table_options)
    loss = build(name, num_rows=ROWS - 6 * grows, dtype=dtype, **settings)
    if chosen.tiles:
        set_tile_bytes(loss, 2 * 8 * BATCH * (1 + chosen.negatives))
    generator, seen = torch.Generator().manual_seed(1), {}
    for step in range(STEPS + 1):
        training = step < STEPS
        if grows and step == 2:
            grow(loss, ROWS)
        loss.train(training)
        index = _batch_rows(step, low=ROWS - 6 if grows and step < 2 else ROWS, mixing=chosen.mixing)
        num_columns = BATCH * (1 + chosen.negatives)
        arguments = call_arguments(table, index, chosen.negatives)
        if chosen.matrix:
            matrix = _log_weight_matrix(num_columns, generator).to(dtype)
            arguments["log_weight"] = (
                matrix[:1] if name == "cross_batch" else matrix
            )  # which knows no matrix of old pairs
        anchors, candidates = _sides(num_columns, generator, dtype)
        value = loss(anchors, candidates, **arguments)
        loss.zero_grad()
        value.backward()
        _append(seen, "losses", value)
        _append(seen, "anchor gradients", anchors.grad)
        _append(seen, "candidate gradients", candidates.grad)
        for stable, parameter in named_state(loss, parameters=True):
            _append(seen, f"gradient of {stable}", parameter.grad)
            if training and parameter.grad is not None:
                with torch.no_grad():
                    parameter.sub_(0.05 * parameter.grad)
        for stable, entry in named_state(loss):
            _append(seen, f"state: {stable}", entry)
    return {label: torch.cat(parts) for label, parts in seen.items()}


def _batch_rows(step: int, *, low: int, mixing: str | None) -> Tensor:
    """Rows of a step: batches that overlap, one of them with a row twice; of one data set where batches are."""
    generator = torch.Generator().manual_seed(100 + step)
    first, end = (0, low) if mixing != "within" else ((0, 18) if step % 2 == 0 else (18, ROWS))
    index = first + torch.randperm(end - first, generator=generator)[:BATCH]
    if step == 2:
        index[-1] = index[0]
    return index


def _sides(num_columns: int, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Anchors and candidates; the positives resemble their anchors."""
    shapes = (BATCH, WIDTH), (num_columns, WIDTH)
    anchors, candidates = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    candidates[:BATCH] += 0.7 * anchors
    return anchors.to(dtype).requires_grad_(), candidates.to(dtype).requires_grad_()


def _log_weight_matrix(num_columns: int, generator: torch.Generator) -> Tensor:
    weight = torch.randn(BATCH, num_columns, generator=generator, dtype=torch.float64)
    return torch.where(weight > 1.0, -torch.inf, 0.5 * weight)


def named_state(loss: nn.Module, *, parameters: bool = False) -> list[tuple[str, Tensor]]:
    """The entries of a state (or the parameters) under names that survive a renaming, in their order.

    Raises:
        KeyError: An entry that `STATE_NAMES` does not name.
    """
    named = loss.named_parameters() if parameters else loss.state_dict().items()
    found = []
    for name, tensor in named:
        prefix = re.match(r"losses\.(\d+)\.", name)  # of a Matryoshka prefix
        rest = name[prefix.end() :] if prefix else name
        if re.fullmatch(STATE_IGNORED, rest):
            continue
        stable = next((re.sub(p, new, rest) for p, new in STATE_NAMES.items() if re.fullmatch(p, rest)), None)
        if stable is None:
            raise KeyError(f"STATE_NAMES of tests/golden.py has no name for {name}.")
        found.append((f"prefix {prefix[1]}, {stable}" if prefix else stable, tensor))
    return sorted(found, key=lambda pair: pair[0])


# --- 3. Plans --------------------------------------------------------------------------------------------------------

MINING_ROWS, SET_ROWS = 240, (131, 109)
MINING: dict[str, dict[str, Any]] = {
    "ours": {"method": "anybatch"},
    "published": {"method": "published"},
    "k-means": {"method": "kmeans"},
    "bandwidth": {"method": "bandwidth"},
    "loss order": {"method": "loss_ordered"},
    "random": {"method": "random"},
    "ours, hard negatives": {"method": "anybatch", "num_negatives": 2},
    "ours, margin": {"method": "anybatch", "margin": 0.9},
    "ours, approximate neighbours": {"method": "anybatch", "neighbors": "ivf"},
    "published, hard negatives": {"method": "published", "num_negatives": 2},
}
SETS = {"one set": None, "mixed": "mixed", "within": "within"}


def plan_cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names and cases of `MINING` x data sets."""
    for label, sets in itertools.product(MINING, SETS):
        yield f"plan: {label}, {sets}", _bound(plan_case, label, SETS[sets])


def plan_case(label: str, mixing: str | None) -> Case:
    """The arrays of a plan and the batches of two epochs."""
    plan = mined(MINING[label], mixing)
    found = {name: getattr(plan, name) for name in ("cluster", "suspects", "negatives", "task")}
    for epoch in range(2):
        sampler = PlanSampler(plan, epoch=epoch)
        found[f"batches of epoch {epoch}"] = np.array(list(sampler))
    return {name: torch.as_tensor(array.astype(np.int64)) for name, array in found.items() if array is not None}


def mined(options: dict[str, Any], mixing: str | None) -> BatchPlan:
    """A plan of the rows of `teacher_embeddings`, the texts of some of which are equal."""
    anchors, positives = teacher_embeddings(MINING_ROWS)
    sets: list[MiningSet] = []
    if mixing is not None:
        options = {**options, "mixing": mixing}
        first, second = SET_ROWS
        sets = [
            MiningSet(name="first", num_rows=first),
            MiningSet(name="second", num_rows=second, window=(2, 12)),
        ]
    rows = np.arange(MINING_ROWS)
    options = {"margin": None, "conflict_weight": 3.0 if options["method"] == "anybatch" else "auto", **options}
    config = MiningConfig(batch_size=24, cluster_size=8, window=(2, 16), seed=4, **options)
    return mine_plan(
        anchors,
        positives,
        config=config,
        anchor_id=np.where(rows % 29 == 11, rows - 3, rows),
        positive_id=np.where(rows % 17 == 6, rows - 5, rows),
        sets=sets,
    ).plan


@cache
def teacher_embeddings(num_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(n, 16) float32 each, in groups, on a grid so coarse that float32 products are exact in any order of adding up.

    With these seeds and sizes no two of a row's 40 best scores are equal, so that nobody's way with ties shows.
    """
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(num_rows // 12, 16))
    anchors = centres[generator.integers(0, len(centres), num_rows)] + 0.5 * generator.normal(size=(num_rows, 16))
    positives = anchors + 0.4 * generator.normal(size=anchors.shape)
    grid = [(np.round(side.clip(-3.9, 3.9) * 256) / 256).astype(np.float32) for side in (anchors, positives)]
    return grid[0], grid[1]


# --- 4. The cached step ----------------------------------------------------------------------------------------------

CACHED: dict[str, dict[str, Any]] = {
    "plain": {"mini_batch_size": 4},
    "kept graphs": {"mini_batch_size": 4, "keep_graphs": 0.5},
    "tokens": {"mini_batch_size": None, "max_tokens": 20, "sort_by_length": False},
    "dropout": {"mini_batch_size": 3},
}


class TinyEncoder(nn.Module):
    """The mean of token embeddings, a layer, dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.embedding, self.layer, self.dropout = nn.Embedding(40, 8), nn.Linear(8, WIDTH), nn.Dropout(dropout)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.double()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        weight = batch["attention_mask"][..., None].double()
        hidden = torch.tanh(self.embedding(batch["input_ids"]))
        return self.layer(self.dropout((hidden * weight).sum(dim=1) / weight.sum(dim=1)))


def cached_case(label: str) -> Case:
    """Gradients of two steps of SogCLR with explicit negatives."""
    encoder = TinyEncoder(0.2 if label == "dropout" else 0.0)
    loss = build("sogclr", gamma=0.4, temperature=0.2, learnable_temperature=True, direction="both")
    generator, seen = torch.Generator().manual_seed(3), {}
    for step in range(2):
        inputs = []
        for width in (5, 9, 7):
            lengths = torch.randint(1, width + 1, (BATCH, 1), generator=generator)
            mask = (torch.arange(width) < lengths).long()
            inputs.append(
                {
                    "input_ids": torch.randint(1, 40, (BATCH, width), generator=generator) * mask,
                    "attention_mask": mask,
                }
            )
        index = _batch_rows(step, low=ROWS, mixing=None)
        with torch.random.fork_rng():
            torch.manual_seed(step)
            value = cached_step(loss, encoder, inputs, loss_kwargs={"index": index}, **CACHED[label])
        _append(seen, "losses", value)
    for name, parameter in [*encoder.named_parameters(), *named_state(loss, parameters=True)]:
        _append(seen, f"gradient of {name}", parameter.grad)
    return {name: torch.cat(parts) for name, parts in seen.items()}


# --- 5. A short run --------------------------------------------------------------------------------------------------


def small_run() -> Case:
    """Mine and train for six steps, from files to a saved model: the log's losses, and the trained weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs, model = write_pairs(folder / "pairs.jsonl"), make_tiny_model(folder / "tiny")
        paths = [str(folder / f"{side}.npy") for side in ("anchors", "positives")]
        for path, side in zip(paths, teacher_embeddings(97, seed=1), strict=True):
            np.save(path, side)
        config = RunConfig(
            output=str(folder / "run"),
            data=DataConfig(path=str(pairs)),
            model=ModelConfig(name=str(model), device="cpu"),
            batch_size=12,
            seed=3,
            teacher=TeacherConfig(embeddings=(paths[0], paths[1])),
            mining=MiningConfig(cluster_size=4, window=(1, 6), margin=None, conflict_weight=3.0, num_negatives=1),
            loss=registry.LossConfig(
                name="sogclr", direction="both", gamma=0.5, weights="inclusion", mask_suspects=True
            ),
            train=TrainConfig(
                mini_batch_size=5, save_steps=6, learning_rate=1e-3, args={"max_steps": 6, "logging_steps": 1}
            ),
        )
        log = job.train(config).log
        trained = SentenceTransformer(str(folder / "run" / "model"), device="cpu").state_dict()
    found = {"losses": torch.tensor([line["loss"] for line in log if "loss" in line])}
    assert len(found["losses"]) == 6, f"six steps make six lines; the log is {log}"
    # Attention does not depend on the keys' bias: its gradient is rounding, which AdamW turns into whole steps.
    weights = {name: value for name, value in trained.items() if value.is_floating_point() and "key.bias" not in name}
    return found | {f"weights: {name}": value for name, value in sorted(weights.items())}


# --- 6. Comparing ----------------------------------------------------------------------------------------------------


def _bound(function: Callable[..., Case], *arguments: Any) -> Callable[[], Case]:
    return lambda: function(*arguments)


def _append(seen: dict[str, list[Tensor]], label: str, tensor: Tensor | None) -> None:
    if tensor is not None:
        seen.setdefault(label, []).append(tensor.detach().clone().reshape(-1))


def all_cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Every case by name, each to be computed when called."""
    yield from loss_cases()
    yield from plan_cases()
    for label in CACHED:
        yield f"cached step: {label}", _bound(cached_case, label)
    yield "short run", small_run


def computed(*, only: str = "", progress: bool = False) -> dict[str, Tensor]:
    """Every tensor of every case whose name begins with `only`, under "case | label"; on one thread."""
    threads, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for case, function in all_cases():
            if not case.startswith(only):
                continue
            try:
                found |= {f"{case} | {label}": tensor for label, tensor in function().items()}
            except Exception as error:
                error.add_note(f"In the golden case '{case}'.")
                raise
            if progress:
                print(f"\r{len(found)} tensors, {case}\033[K", end="", file=sys.stderr, flush=True)
    finally:
        torch.set_num_threads(threads)
    return found


def tolerance(name: str, tensor: Tensor) -> float:
    """How far a tensor may be from the file, relative to its norm; 0 for bit for bit."""
    if name.startswith("short run"):
        return RUN_TOLERANCE
    if "float16" in name:  # also what is read from a memory in float16
        return TOLERANCES[torch.float16]
    return TOLERANCES.get(tensor.dtype, 0.0)


def summary(tensor: Tensor) -> np.ndarray:
    """Float64: up to 6 numbers as they are; else norm and two random projections. What is not finite counts as -3."""
    flat = tensor.detach().reshape(-1).to(torch.float64).numpy()
    flat = np.where(np.isfinite(flat), flat, -3.0)
    if len(flat) <= 6:
        return flat
    rays = np.random.default_rng(len(flat)).normal(size=(2, len(flat)))
    return np.array([np.sqrt((flat**2).sum()), (rays[0] * flat).sum(), (rays[1] * flat).sum()])


def digest(tensor: Tensor) -> int:
    """Of type, shape and bytes: 64 bits."""
    content = tensor.detach().contiguous()
    hashed = hashlib.blake2b(f"{content.dtype} {tuple(content.shape)}".encode(), digest_size=8)
    hashed.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
    return int.from_bytes(hashed.digest(), "little", signed=True)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Names, summaries and digests, in a file that does not change unless they do."""
    summaries = [summary(tensor) for tensor in tensors.values()]
    save_file(
        {
            "names": np.frombuffer(zlib.compress("\n".join(tensors).encode(), 9), np.uint8),
            "lengths": np.array([len(one) for one in summaries], np.uint8),
            "values": np.concatenate(summaries),
            "digests": np.array([digest(tensor) for tensor in tensors.values()], np.int64),
        },
        path,
    )


def read(path: Path) -> dict[str, tuple[np.ndarray, int]]:
    """Summary and digest by name."""
    kept = load_file(path)
    names = zlib.decompress(kept["names"].tobytes()).decode().split("\n")
    values = np.split(kept["values"], np.cumsum(kept["lengths"].astype(np.int64))[:-1])
    cases = zip(names, zip(values, kept["digests"].tolist(), strict=True), strict=True)
    return {name: case for name, case in cases if not name.startswith(REMOVED)}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One tensor against the file: whether its bytes are the same, its relative difference, and what is allowed."""

    name: str
    same: bool
    difference: float
    allowed: float

    @property
    def good(self) -> bool:
        """Whether it is within the tolerance; without one, whether it is the same."""
        return self.same or 0 < self.allowed >= self.difference


def compare(path: Path, tensors: dict[str, Tensor], *, only: str = "") -> list[Comparison]:
    """Every tensor of the file whose name begins with `only`; what one side lacks has a difference of infinity."""
    kept, found = {name: one for name, one in read(path).items() if name.startswith(only)}, []
    for name in [*kept, *(name for name in tensors if name not in kept)]:
        same, difference = False, np.inf
        allowed = tolerance(name, tensors[name]) if name in tensors else 0.0
        if name in tensors and name in kept:
            wanted, got = kept[name][0], summary(tensors[name])
            same = digest(tensors[name]) == kept[name][1]
            if wanted.shape == got.shape:
                scale = np.abs(wanted).max(initial=0.0)
                # Near zero what is compared is rounding: gradients that vanish, and the temperature's among them.
                difference = np.abs(wanted - got).max(initial=0.0) / max(scale, 1e-3)
        found.append(Comparison(name=name, same=same, difference=float(difference), allowed=allowed))
    return found


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden")
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", action="store_true", help="write the file")
    parser.add_argument("--exact", action="store_true", help="compare bit for bit")
    parser.add_argument("--only", default="", help="only the cases whose names begin with this")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--only is for comparing; a file holds all cases")
    tensors = computed(only=options.only, progress=sys.stderr.isatty())
    if options.write:
        write(options.file, tensors)
        print(f"{len(tensors)} tensors, {options.file.stat().st_size} bytes")
        return 0
    found = compare(options.file, tensors, only=options.only)
    bad = [one for one in found if not (one.same if options.exact else one.good)]
    worst: dict[str, Comparison] = {}
    for one in bad:
        case = one.name.split(" | ")[0]
        worst[case] = max(worst.get(case, one), one, key=lambda either: either.difference)
    for case, one in worst.items():
        print(f"{one.difference:.1e}  (allowed {one.allowed:.0e})  {case}: {one.name.split(' | ')[1]}")
    print(f"{len(found)} tensors: {len(found) - len(bad)} as they were, {len(bad)} not, in {len(worst)} cases")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
