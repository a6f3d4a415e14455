"""The plan of a run: given, kept in its folder, or mined with the teacher's embeddings."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.files import digest_of, file_digest, write_json
from anybatch.core.progress import Progress, no_progress
from anybatch.data.pairs import PairData
from anybatch.losses.registry import AUTO, first_temperature
from anybatch.mining import MiningConfig, MiningReport, check_sizes, mine_plan, mine_shared, random_plan
from anybatch.mining.audit import marks
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import RunConfig, resolved
from anybatch.run.read_data import mining_sets
from anybatch.run.teacher import teacher_embeddings

logger = logging.getLogger("anybatch")
KEPT = "plan.safetensors"  # in the run's folder


def existing_plan(config: RunConfig) -> BatchPlan | None:
    """The plan that the configuration names; the run's own where that is gone, or none is named; None for none."""
    path = _existing(config)
    return None if path is None else BatchPlan.load(path)


def _existing(config: RunConfig) -> Path | None:
    kept = Path(config.output) / KEPT
    if config.plan is not None:
        return kept if kept.exists() and not Path(config.plan).exists() else Path(config.plan)
    return kept if kept.exists() else None


def check_start(config: RunConfig, pairs: PairData, plan: BatchPlan | None) -> None:
    """Refuse, before anything is written, what a new run could not get a plan from: a plan (the one given) of other
    data, sizes that do not fit, no teacher, embeddings of other data.
    """
    if config.plan is not None:
        assert plan is not None
        _check_plan(plan, config.plan, config, pairs)
        _name_unused(config)
        return
    check_sizes(len(pairs), config=resolved(config).mining, sets=mining_sets(config, pairs))
    if config.mining.method == "random":
        _name_unused(config)
    elif config.teacher.embeddings is not None or not config.teacher.name:
        teacher_embeddings(config, pairs)


def _name_unused(config: RunConfig) -> None:
    """Say what random batches, or a plan that is given, take no notice of: runs are compared by one setting."""
    default, teacher = MiningConfig(), config.teacher
    names = ("cluster_size", "window", "margin", "neighbors", "conflict_weight", "num_negatives")
    unused = [f"mining.{name}" for name in names if getattr(config.mining, name) != getattr(default, name)]
    unused += [f"teacher.{field.name}" for field in fields(teacher) if getattr(teacher, field.name) != field.default]
    if unused and distributed.rank() == 0:
        why = "mining.method is 'random', which ranks nothing" if config.plan is None else "A plan is given"
        logger.warning("Not used: %s. %s.", ", ".join(unused), why)


def make_plan(
    config: RunConfig, pairs: PairData, progress: Progress = no_progress, *, plan: BatchPlan | None = None
) -> BatchPlan:
    """The plan of the run: the one given (copied into the folder), the one in the folder, or a new one, saved there.

    `plan` is what `existing_plan` gave, if that was asked before. Under torchrun every rank embeds and searches its
    share; rank 0 does the rest, and all return the same plan.

    Raises:
        AnybatchError: A plan made for other data or another batch size; another plan than the run was started with.
    """
    path = Path(config.output) / KEPT
    exists = path.exists()
    distributed.barrier()  # before any rank can have written it
    if config.plan is not None or exists:
        plan = existing_plan(config) if plan is None else plan
        assert plan is not None
        _check_plan(plan, _existing(config), config, pairs)
        (_keep_given if config.plan is not None else _check_kept)(plan, path, exists, config, pairs)
        return plan
    if config.mining.method != "random":
        _mine(path, config, pairs, progress)
        return BatchPlan.load(path)
    with distributed.alone() as chosen:
        if chosen:
            settings, sets = resolved(config).mining, mining_sets(config, pairs)
            plan = random_plan(len(pairs), config=settings, sets=sets, data_digest=pairs.digest)
            _save(plan, path, mining_inputs(config, pairs))
    return BatchPlan.load(path)


def _keep_given(plan: BatchPlan, path: Path, exists: bool, config: RunConfig, pairs: PairData) -> None:
    """Keep a copy, in `path`, of the plan that the configuration names, as the file given may change or go."""
    given = Path(str(config.plan))
    if exists and not given.exists():
        logger.warning("%s is gone; the run's copy, %s, is used.", given, path)
    elif not exists:
        with distributed.alone() as chosen:
            if chosen:
                plan.save(path)
    elif (digest := BatchPlan.load(path).digest) != plan.digest:
        raise AnybatchError(
            f"{given} is another plan than the one this run was started with, of which {path} is a copy (digest "
            f"{plan.digest[:12]}, the run's {digest[:12]}). Put the old plan back, or start a new run in another "
            "output folder."
        )


def _check_kept(plan: BatchPlan, path: Path, exists: bool, config: RunConfig, pairs: PairData) -> None:
    """Refuse the plan in the run's folder if what it was mined from is not what would be mined from now."""
    with distributed.alone() as chosen:
        if not chosen:
            return
        made_from = plan.meta.get("inputs") or {}
        inputs = mining_inputs(config, pairs)
        changed = [name for name, digest in inputs.items() if made_from.get(name) != digest]
        if changed:
            raise AnybatchError(
                f"{path} was made from other inputs than the run has now: {', '.join(changed)} changed since. Put back "
                "what the plan was made from, or mine anew in another output folder."
            )
        for name in sorted(made_from.keys() - inputs.keys()):
            logger.warning("%s is gone; %s, which was made from it, is kept.", name, path)


def _mine(path: Path, config: RunConfig, pairs: PairData, progress: Progress) -> None:
    """Mine the plan into `path`, and what mining measured into mining.json beside it."""
    # 1. Embed, which the ranks share.
    settings, sets = resolved(config).mining, mining_sets(config, pairs)
    check_sizes(len(pairs), config=settings, sets=sets)
    anchors, positives = teacher_embeddings(config, pairs, progress)
    on_cpu = config.model.device is None or config.model.device.startswith("cpu")  # the compiled search is faster there
    device = None if on_cpu else config.model.device
    neighbors = path.with_name("neighbors")

    def report_stage(stage: str, fraction: float) -> None:
        progress(f"mining: {stage}", round(100 * fraction), 100)

    # 2. Search the neighbours, which the ranks share as well.
    search = {"config": settings, "sets": sets, "folder": neighbors, "device": device, "progress": report_stage}
    search |= pairs.ids
    if distributed.is_active():
        mine_shared(anchors, positives, **search)
    # 3. The first rank does the rest, and warns before the training, not after it.
    with distributed.alone() as chosen:
        if not chosen:
            return
        inputs = mining_inputs(config, pairs)
        result = mine_plan(
            anchors, positives, data_digest=pairs.digest, temperature=first_temperature(config.loss), **search
        )
        # 4. Of "auto" the figures decide; of a method that was named they warn.
        plan, facts = result.plan, {"teacher": config.teacher.name or "embeddings from files"}
        reports = {"": result.report, **result.report.sets}
        if config.mining.method == AUTO:
            taken, facts["decision"] = decision(reports)
            if not taken:
                plan = random_plan(len(pairs), config=settings, sets=sets, data_digest=pairs.digest)
                del facts["teacher"]
                for report in reports.values():
                    report.warnings.clear()  # of batches that are not used; the decision has their figures
        for name, report in reports.items():
            for warning in report.warnings:
                logger.warning("Before you train%s: %s", name and f" on {name}", warning)
        kept = {"plan": plan.digest, "decision": facts.get("decision"), **asdict(result.report)}
        write_json(path.with_name("mining.json"), kept)
        _save(plan, path, inputs, **facts)
        shutil.rmtree(neighbors, ignore_errors=True)  # larger than all else in the folder


def decision(reports: Mapping[str, MiningReport]) -> tuple[bool, str]:
    """Whether "auto" takes the mined batches, and why: all figures of every data set pass. See docs/recipe.md."""
    found = [
        (f"{name and f'{name}: '}{mark.name} {mark.value} (good: {mark.good})", mark.passed)
        for name, report in reports.items()
        for mark in (marks(report.figures) if report.figures else ())
    ]
    good, bad = ("; ".join(text for text, passed in found if passed == wanted) for wanted in (True, False))
    if found and not bad:
        return True, f"mining.method=auto takes the mined batches, whose figures are all good: {good}."
    return False, (
        "mining.method=auto takes random batches, as figures of the mined ones are not good: "
        f"{bad or 'no data set fills a cluster'}.{f' Good are: {good}.' if good else ''} To train on the mined ones "
        "all the same, set mining.method=anybatch. What the figures mean: docs/inspect.md."
    )


def mining_inputs(config: RunConfig, pairs: PairData) -> dict[str, str]:
    """Digests of what decides the plan that a run mines, beside its data: the settings and the teacher's files."""
    digests = {"the settings": digest_of([repr((resolved(config).mining, mining_sets(config, pairs))).encode()])}
    if config.mining.method == "random":
        return digests
    teacher = config.teacher
    weights = [
        path
        for path in sorted(Path(teacher.name).rglob("*") if teacher.name else ())  # a name on the hub has no files here
        if path.suffix in (".safetensors", ".bin")
    ]
    for name, paths in {"teacher.embeddings": teacher.embeddings or (), "teacher.name": weights}.items():
        present = [path for path in paths if Path(path).is_file()]
        if present:
            digests[name] = digest_of(file_digest(path).encode() for path in present)
    return digests


def _save(plan: BatchPlan, path: Path, inputs: dict[str, str], **facts: str) -> None:
    replace(plan, meta={**plan.meta, "inputs": inputs, **facts}).save(path)


def _check_plan(plan: BatchPlan, path: str | Path | None, config: RunConfig, pairs: PairData) -> None:
    plan.check(num_rows=len(pairs), data_digest=pairs.digest)
    if plan.batch_size != config.batch_size:
        raise AnybatchError(
            f"{path} has batches of {plan.batch_size}; the configuration says batch_size {config.batch_size}. Make "
            "them equal."
        )
