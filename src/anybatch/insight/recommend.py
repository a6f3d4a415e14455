"""What to train with: the recipe that a run takes by itself, what it costs, and what was measured against it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.core.progress import Progress, no_progress
from anybatch.data.held_out import select_pairs
from anybatch.data.inputs import kind_of
from anybatch.data.pairs import PairData
from anybatch.insight.cost import StepCost, step_cost
from anybatch.insight.gradient_error import NUM_BATCHES
from anybatch.insight.gradient_methods import (
    beside_plain,
    bias_sentence,
    comparable,
    compare_methods,
    frozen_pairs,
    gradient_figures,
    is_further,
)
from anybatch.insight.plan_figures import plan_warnings, set_figures
from anybatch.insight.sample import BATCHES, LEAST, Looked, look_at
from anybatch.insight.tables import Figure
from anybatch.integrations.sentence_transformers.model import is_pretrained, load_model
from anybatch.integrations.sentence_transformers.training import TrainConfig
from anybatch.losses.registry import AUTO, first_temperature
from anybatch.mining import mine_plan
from anybatch.mining.audit import advice
from anybatch.mining.inspection import inspect_plan
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import RunConfig, resolved
from anybatch.run.read_data import check_one_batch, hold_out, mining_sets, read_data
from anybatch.run.recipe import Choice, recipe, with_batches
from anybatch.run.try_step import inputs_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SIZES = (64, 256, 1024)
SMALLEST = 4
FASTER = 1.5  # times as fast per row, from which a larger batch is taken: other work on a machine fakes less
DENSE = 2  # times as many rows as the sample: of more, near ones are missing from it, and mining is another
MOST_WIDTH = 1024  # of embeddings whose gradients are compared: the map is as wide and as high
UNTRAINED = 0.05  # own positives first: of fewer a gradient says how a model starts, not how it goes on
TOKENISED = 256  # rows whose texts' lengths are looked at
MUCH_EQUAL, MUCH_CUT, MUCH_MEMORY = 0.1, 0.1, 0.8


@dataclass(kw_only=True)
class Recommendation:
    """What `recommend` found."""

    config: RunConfig  # with the recipe in it
    step: StepCost
    choices: list[Choice]
    figures: list[Figure] = field(default_factory=list)
    against: list[str] = field(default_factory=list)  # what the figures say against the choices, in sentences
    notes: list[str] = field(default_factory=list)  # what the figures rest on
    num_steps: int = 0
    step_seconds: float = 0.0
    run_seconds: float = 0.0  # with embedding and evaluation


def recommend(
    config: RunConfig, *, keep_batch_size: bool = False, seconds: float = 60.0, progress: Progress = no_progress
) -> Recommendation:
    """Look at data, models and machine of a run that is not begun; nothing is written.

    Args:
        config, keep_batch_size: The run, and whether its batch size is settled.
        seconds: To spend, about, once data and models are loaded: with more of them more rows are looked at.

    Raises:
        AnybatchError: What training would refuse of data and models; a plan, or images without labels (`data.views`).
    """
    # 1. Data and student.
    if config.plan is not None or config.data.views is not None:
        raise AnybatchError(
            "A recommendation is for pairs whose batches are not chosen yet, and --plan or --views is given. See a "
            "plan with anybatch inspect plan; for images without labels see docs/images.md."
        )
    pairs = read_data(config.data)
    if not keep_batch_size:
        config = replace(config, batch_size=_first_size(len(pairs)))
    check_one_batch(config, pairs)
    pairs, held_out = hold_out(config, pairs, None)
    student = load_model(config.model)
    begun = time.perf_counter()

    # 2. The machine decides on larger batches, a rule on the recipe.
    config, step, why_size = _sized(config, pairs, student, keep_batch_size, seconds / 3, progress)
    config, chosen = recipe(config, pairs, pretrained=is_pretrained(student))
    found = Recommendation(config=config, step=step, choices=[Choice("batch_size", str(config.batch_size), why_size)])
    if config.train.mini_batch_size == "auto":
        why = "as many rows at once through the model as memory has room for"
        found.choices.append(Choice("train.mini_batch_size", "auto", why))
    why = "the recipe was measured at .05, and no figure from before training tells a better one"
    found.choices += [*chosen, Choice("loss.temperature", f"{first_temperature(config.loss):g}", why)]
    rate = config.train.learning_rate
    why = f"the default; it matters more than the loss: compare {4 * rate:g} and {20 * rate:g} too, on held-out pairs"
    why = why if rate == TrainConfig.learning_rate else "given"
    found.choices.append(Choice("train.learning_rate", f"{rate:g}", why))

    # 3. A sample, seen by student and teacher.
    left = max(seconds - (time.perf_counter() - begun), seconds / 3)
    looked = look_at(config, pairs, student, left, progress)
    vectors, ranked, rates = looked.vectors, looked.ranked, looked.rates
    sample = select_pairs(pairs, looked.rows)
    found.figures += [_equal_texts(pairs, config.batch_size), *_cut_texts(student, pairs), _memory(step)]
    texts = len(held_out) if isinstance(held_out, PairData) else 0
    most = config.train.args.get("max_steps") or 0
    found.num_steps = most if most > 0 else config.train.epochs * (len(pairs) // config.batch_size)
    found.step_seconds = step.seconds_per_row * config.batch_size
    found.run_seconds = found.num_steps * found.step_seconds + 4 * texts / rates[0]
    if len(rates) > 1:
        found.run_seconds += 2 * len(pairs) / rates[1]
    if len(sample) == len(pairs):
        found.notes.append(f"Looked at all {len(pairs):,} pairs.")
    else:
        found.notes.append(
            f"Looked at {len(sample):,} of {len(pairs):,} pairs; among all of them the own positive comes first less "
            "often."
        )
    if looked.cut is not None:
        found.notes.append(
            f"To look at more of them, their texts were cut at {looked.cut} tokens here; the run reads "
            f"{student.max_seq_length}. For whole texts: --seconds {looked.seconds_whole}."
        )
    if step.rows < config.batch_size:
        found.notes.append(f"Time and memory: of steps on {step.rows} rows, scaled to {config.batch_size}.")
    if len(sample) < min(LEAST * config.batch_size, len(pairs)):
        found.notes.append(
            f"These are too few for the gradient's figures and the teacher's: they need {looked.wanted:,} pairs, about "
            f"--seconds {looked.seconds_needed}."
        )
        return found
    telling = len(pairs) <= DENSE * len(sample)

    # 4. What mining would put into the batches, where the sample can tell; how near they bring the gradient.
    plan = BatchPlan.random(len(sample), config.batch_size, seed=config.seed)
    if ranked is not None:
        progress("teacher", 0, 1)
        if telling:
            sets = mining_sets(config, sample)
            plan = mine_plan(*ranked, config=resolved(config).mining, sets=sets, **sample.ids).plan
        else:
            found.notes.append(
                "What mined batches hold depends on all rows, and so is not shown: run anybatch mine with these "
                "options, then anybatch inspect plan on its folder."
            )
        if not _look_at_teacher(found, sample, ranked, plan):
            plan = BatchPlan.random(len(sample), config.batch_size, seed=config.seed)
        progress("teacher", 1, 1)
    if sample.sets or vectors[0].shape[1] > MOST_WIDTH:
        why = "each data set has an own, look at one by itself" if sample.sets else "the embeddings are too wide for it"
        found.notes.append(f"No gradient was measured: {why}.")
        return found
    _look_at_gradients(found, sample, vectors, plan, telling or len(sample) >= looked.most, looked, progress)
    return found


def _first_size(num_rows: int) -> int:
    """The smallest batch size in question: 64, less of fewer rows."""
    if num_rows < BATCHES * SMALLEST:
        raise AnybatchError(
            f"The data have {num_rows} rows; a recommendation needs at least {BATCHES * SMALLEST}. Give more of them, "
            f"or a batch size of at most {num_rows} with --batch-size."
        )
    return min(SIZES[0], 2 ** int(math.log2(num_rows // BATCHES)))


def _sized(
    config: RunConfig, pairs: PairData, model: SentenceTransformer, keep: bool, seconds: float, progress: Progress
) -> tuple[RunConfig, StepCost, str]:
    """The batch size, what its step costs, and why it was taken: the smallest, unless a larger one is faster by far."""

    def cost_of(config: RunConfig, seconds: float) -> StepCost:
        progress("steps", 0, 1)
        config, _ = recipe(config, pairs, pretrained=is_pretrained(model))
        cost = step_cost(with_batches(config, mined=True), pairs, model, seconds=seconds)
        progress("steps", 1, 1)
        return cost

    begun = time.perf_counter()
    cost = cost_of(config, seconds if keep else seconds / 2)
    if keep:
        return config, cost, "given"
    smallest = config.batch_size
    why = (
        "for small encoders 64 was as good as larger batches with this recipe (docs/recipe.md)"
        if smallest == SIZES[0]
        else f"larger batches would be more than an eighth of {len(pairs):,} rows, which leaves little to correct"
    )
    for size in SIZES[1:]:
        left = seconds - (time.perf_counter() - begun)
        if smallest < SIZES[0] or size * BATCHES > len(pairs) or 3 * cost.seconds_per_row * size > left:
            break
        larger = replace(config, batch_size=size, train=replace(config.train, mini_batch_size="auto"))
        of_larger = cost_of(larger, left)
        if cost.seconds_per_row < FASTER * of_larger.seconds_per_row:
            break
        times = cost.seconds_per_row / of_larger.seconds_per_row
        why = f"on this machine {times:.1f} times as fast per row as batches of {config.batch_size}"
        config, cost = larger, of_larger
    return config, cost, why


def _look_at_teacher(found: Recommendation, sample: PairData, ranked: tuple[np.ndarray, ...], plan: BatchPlan) -> bool:
    """How well it knows the pairs, and what mined batches hold; whether a run would take these."""
    taken = mined = plan.cluster_size > 1
    loss = with_batches(found.config, mined=mined).loss
    parts = inspect_plan(plan, *ranked, temperature=first_temperature(loss), **sample.ids)
    for name, seen in parts.items():
        found.figures += [replace(f, name=f"{name} {f.name}".lstrip()) for f in set_figures(seen, plan)]
        found.against += plan_warnings(plan, seen, mask_suspects=loss.mask_suspects is True)
    if mined and found.config.mining.method == AUTO:
        taken = not any(advice(seen.figures) for seen in parts.values())
        found.notes.append(
            f"By these figures the run takes {'the mined' if taken else 'random'} batches (mining.method=auto); it "
            "decides by those of all rows."
        )
    return taken


def _look_at_gradients(
    found: Recommendation,
    sample: PairData,
    vectors: tuple[np.ndarray, ...],
    plan: BatchPlan,
    telling: bool,
    looked: Looked,
    progress: Progress,
) -> None:
    """The recipe's gradient beside that of plain InfoNCE on random batches, at the student's start. A sample that is
    not `telling` shows less bias than there is, and so speaks against nothing.
    """
    known = inspect_plan(BatchPlan.random(len(sample), plan.batch_size), *vectors, **sample.ids)[""].own_first
    if known < UNTRAINED:
        found.notes.append(
            f"The student finds the own positive first for {known:.1%} of the anchors: it knows nothing of such pairs "
            "yet, all negatives weigh alike, and the gradient at its start says nothing of later. Ask again with a "
            "checkpoint."
        )
        return
    loss, left_out = comparable(with_batches(found.config, mined=plan.cluster_size > 1).loss)
    found.notes += [f"Not in the gradient: {line}" for line in left_out]
    comparison = compare_methods(
        frozen_pairs(vectors, sample, plan, loss),
        plan,
        methods=beside_plain(loss, plan),
        num_batches=NUM_BATCHES // 2,
        progress=lambda done, total: progress("gradients", done, total),
    )
    last = comparison.order[-1]
    of_recipe = comparison.of(last, "plan") or comparison.of(last, "random") or comparison.plain
    if of_recipe is not comparison.plain:
        found.figures += gradient_figures("this recipe", of_recipe, "InfoNCE", comparison.plain)
    if not telling and not comparison.plain.bias_to_remove:
        found.notes.append(
            "Small batches change more of what is learned than so few pairs show, and so this does not speak against "
            f"the recommended loss. More pairs are looked at with --seconds {looked.seconds_most}."
        )
        return
    found.notes.append(bias_sentence(comparison.plain, plan.batch_size))
    if not telling:
        return
    found.against += plan_warnings(plan, None, comparison)
    if loss.name != "infonce" and not comparison.plain.bias_to_remove:
        found.against.append(
            f"Small batches hardly change what is learned (above), and {loss.name} is for that change: plain InfoNCE, "
            "which is simpler, may train as well. Train both for a while (--loss infonce); compare on held-out pairs."
        )
    elif loss.name != "infonce" and is_further(of_recipe, comparison.plain):
        found.against.append(
            f"{loss.name} brings the gradient no nearer to that over all pairs than plain InfoNCE on random batches "
            "does. Train both for a while (--loss infonce --set mining.method=random) and compare on held-out pairs."
        )


def _equal_texts(pairs: PairData, batch_size: int) -> Figure:
    """How much of a random batch is masked as equal."""
    pairs_of = len(pairs) * (len(pairs) - 1)
    counts = [np.unique(ids, return_counts=True)[1] for ids in (pairs.anchor_id, pairs.positive_id)]
    share = min(1.0, sum(float((count * (count - 1.0)).sum()) for count in counts) / pairs_of)
    return Figure(
        name="negatives that are equal texts",
        value=f"{share:.2%}",
        good=f"{MUCH_EQUAL:.0%} or less",
        passed=share <= MUCH_EQUAL,
        why="Of the other rows of a random batch, those with the same anchor or positive. They are masked, never "
        f"pushed away; a batch of {batch_size} counts as {1 + (1 - share) * (batch_size - 1):.0f}.",
    )


def _cut_texts(model: SentenceTransformer, pairs: PairData) -> list[Figure]:
    """How many texts are longer than the model reads; none where it reads no tokens."""
    longest = getattr(model, "max_seq_length", None)
    inputs = inputs_of(model, pairs, np.sort(np.random.default_rng(0).permutation(len(pairs))[:TOKENISED]))
    lengths = [side["attention_mask"].sum(dim=-1) for side in inputs if "attention_mask" in side]
    if not lengths or not longest or kind_of(pairs.anchors) != "text" or kind_of(pairs.positives) != "text":
        return []
    share = float(np.mean([(length >= longest).float().mean().item() for length in lengths]))
    mean = " and ".join(f"{length.float().mean().item():.0f}" for length in lengths)
    return [
        Figure(
            name=f"texts cut at {longest} tokens",
            value=f"{share:.1%}",
            good=f"{MUCH_CUT:.0%} or less",
            passed=share <= MUCH_CUT,
            why="What is cut is not learned; --set model.max_length=N moves the limit. The saved model keeps it "
            f"and is measured with it: a low one saves time and loses the rest of a text. Tokens in the mean: {mean}.",
        )
    ]


def _memory(step: StepCost) -> Figure:
    return Figure(
        name="memory of a step",
        value=f"{step.peak_bytes / 2**30:.2f} GiB",
        beside=f"there are {step.total_bytes / 2**30:.1f} GiB",
        good=f"{MUCH_MEMORY:.0%} or less",
        passed=step.peak_bytes <= MUCH_MEMORY * step.total_bytes,
        why="At its peak, the optimiser's state included. If it does not fit, lower train.memory or "
        "train.mini_batch_size: the batch size costs next to nothing.",
    )
