"""Whether the tests would notice: `python -m benchmarks.mutations`, some 50 small mistakes, one at a time, two side by
side; 15 minutes.

Each is made in a copy of `src` in a temporary folder, never in the working tree, and the test file that mirrors the
changed module must fail. First the same files must pass on an unchanged copy: those that do not judge nothing. Exit
code 1 where a mistake survives or is not judged, 2 where its text is not in the source (any more): then name the new
text below, or drop the entry and say why.

A test that is caught here shows that the tests state the right value, not that the code is right.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT = 900  # seconds; a machine may be slow, so no end shows nothing
CAUGHT, SURVIVED, BROKEN, LATE, UNJUDGED = "caught", "SURVIVED", "DOES NOT RUN", "NO END", "NOT JUDGED"


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        file: Below src/anybatch.
        old: Its text, which the file must hold exactly once.
        new: The mistake.
        tests: The files, below tests, that mirror the module.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def of(file: str, tests: str | tuple[str, ...], *changes: tuple[str, str]) -> list[Mutation]:
    """The mistakes in one file."""
    mirror = (tests,) if isinstance(tests, str) else tests
    return [Mutation(file, old, new, mirror) for old, new in changes]


MUTATIONS = [
    *of(
        "losses/engine/__init__.py",
        "losses/test_engine.py",
        ("return (loss + loss_back) / 2, (*stats", "return loss + loss_back, (*stats"),  # a mean over two directions
        ("(positives, anchors, sides[1],", "(positives, anchors, sides[0],"),
        ("gradient * grad_output if needed", "gradient if needed"),
    ),
    *of(
        "losses/engine/solver.py",
        "losses/test_engine.py",
        ("(side.objective * side.row_weight).sum()", "side.objective.sum()"),
        ("num_rows_all = sum(layout.row_sizes) * len(sides)", "num_rows_all = sum(layout.row_sizes)"),
        ("d_anchors -= total_B1 * own_BD", "d_anchors += total_B1 * own_BD"),
        ("d_candidates[: len(anchors)] -= total_B1 * anchors", "pass"),
        (
            "= -(anchors * d_anchors).sum(dim=1) / forward.temperature",
            "= (anchors * d_anchors).sum(dim=1) / forward.temperature",
        ),
        (
            "-(forward.difference - forward.total() * positive_B)",
            "-(forward.difference + forward.total() * positive_B)",
        ),
    ),
    *of(
        "losses/engine/directions.py",
        "losses/test_engine.py",
        ("self.temperature.log() - self.row_weight.log()", "self.temperature.log() + self.row_weight.log()"),
        ("if self.removing else logits_bm.shape[1] - 1", "if self.removing else logits_bm.shape[1]"),
        ("counts[self.layout.shifted(rows)] -= 1", "pass"),
        ("torch.full_like(positive_B, sum(column_sizes) - 1)", "torch.full_like(positive_B, sum(column_sizes))"),
        ("peak = finite(logits.amax(dim=dim))", "peak = logits.amax(dim=dim)"),
        ("(difference_B - total_B * self.positive)", "difference_B"),
        ("(reference_b - finite(self.log_denominator[rows])).exp()", "1.0"),
        ("-self.positive_weight / self.temperature * self.row_weight", "-self.positive_weight / self.temperature"),
        (
            "self.reference_A = distributed.gather_rows(self.reference()",
            "self.reference_A = distributed.gather_rows(self.log_denominator",
        ),
    ),
    *of(
        "losses/engine/joint.py",
        "losses/test_joint.py",
        ("same_side & (queries", "~same_side & (queries"),
        ("of_texts.isneginf() | of_anchors.isneginf()", "of_texts.isneginf()"),
        ("ratio.log() if", "0.0 if"),
        ("num_positives=2 if", "num_positives=1 if"),
        ("2 * weight.repeat(2)", "weight.repeat(2)"),
    ),
    *of(
        "losses/engine/directions.py",
        "losses/test_several_positives.py",
        ("above if kept is None else above & ~kept", "above"),
        ("self.sum_further[rows] / (1 + self.num_further[rows])", "self.sum_further[rows] / self.num_further[rows]"),
        ("super().total() - self.num_further * self.share()", "super().total()"),
    ),
    *of(
        "losses/engine/directions.py",
        "losses/test_hardness.py",
        ("finite(self.factors[0, rows]) - finite(self.factors[1, rows])", "finite(self.factors[0, rows])"),
    ),
    *of(
        "losses/engine/solver.py",
        "losses/test_ranks.py",
        ("scale = distributed.world_size() / num_rows_all", "scale = 1 / num_rows_all"),
    ),
    *of(
        "losses/engine/directions.py",
        "losses/test_ranks.py",
        ("self.layout.own_columns.start + local", "local"),
    ),
    *of(
        "losses/log_weights.py",
        "losses/test_log_weights.py",
        ('same |= queries["anchor_id"][:, None] == candidates["anchor_id"]', "pass"),
        ("(candidates, queries) if back else (queries, candidates)", "(queries, candidates)"),
        ("place = torch.searchsorted(self.keys, wanted)", "place = torch.searchsorted(self.keys, wanted, right=True)"),
        ("(query_cluster < 0).long()", "(query_cluster >= 0).long()"),
        ("together &= ~remembered.bool()", "pass"),
        ("None if back else candidates.get(", "candidates.get("),
        ("torch.where(cluster < 0, loose, other)", "torch.where(cluster < 0, other, loose)"),
        ("_of_other_tasks(queries, candidates) & remembered.bool()", "_of_other_tasks(queries, candidates)"),
        ('(self.of == "anchor") != back', 'self.of == "anchor"'),
        ('any(getattr(term, "normalised"', 'all(getattr(term, "normalised"'),
        ('(task[:, None] == memory["task"]).sum(dim=1)', "num_remembered"),
    ),
    *of(
        "losses/denominators.py",
        "losses/test_losses.py",
        ("return Answer(objective - correction, objective)", "return Answer(objective, objective)"),
    ),
    *of(
        "losses/denominators.py",
        "losses/test_losses.py",
        ("return Answer(objective + correction, value, weight)", "return Answer(objective, value, weight)"),
    ),
    *of(
        "losses/denominators.py",
        "losses/test_memory.py",
        (
            "torch.logaddexp(old + log_stay, batch + log_gamma)",
            "torch.logaddexp(old + log_gamma, batch + log_stay)",
        ),
        ("torch.where(old.isnan(), batch, torch.logaddexp", "torch.where(old < -80, batch, torch.logaddexp"),
        ("return total - count.clamp(min=1).log(), count", "return total, count"),
    ),
    *of(
        "losses/state.py",
        "losses/test_memory.py",
        ("if width and own_width and width != own_width:", "if width and own_width and width < own_width:"),
    ),
    *of(
        "losses/cross_batch.py",
        "losses/test_cross_batch.py",
        ("return gradient / temperature", "return gradient"),
        ("min(1.0, num_rows / self.mean_rows) * (mean - before)", "(mean - before)"),
        ('(queue.rows >= 0) & ~torch.isin(queue.rows, pairs["row"])', "queue.rows >= 0"),
        ("one.objective + (1 +", "one.objective - (1 +"),
    ),
    *of(
        "losses/cross_batch.py",
        "losses/test_ranks.py",
        ("gradient *= distributed.world_size() / sum(layout.row_sizes)", "gradient *= 1 / sum(layout.row_sizes)"),
    ),
    *of(
        "losses/embedding_queue.py",
        "losses/test_cross_batch.py",
        ("torch.argsort(self.stamps, stable=True)[:", "torch.argsort(-self.stamps, stable=True)[:"),
    ),
    *of(
        "caching/step.py",
        "caching/test_step.py",
        ("(value * scale).backward()", "value.backward()"),
        ("torch.cat(list(leaves[1:]))", "torch.cat(list(leaves[:0:-1]))"),
    ),
    *of(
        "caching/replay.py",
        "caching/test_replay.py",
        ("else grad.detach() * scale for grad", "else grad.detach() for grad"),
        (", training_modes(step.facts.flags):", ":"),
    ),
    *of("caching/replay.py", "caching/test_state.py", ("    if difference > 1:", "    if difference == torch.inf:")),
    *of(
        "caching/recording.py",
        "caching/test_replay.py",
        ("self.random = before.now()", "self.random = before"),
    ),
    *of("caching/replay.py", "caching/test_step.py", ("grad.add_(found)", "grad.copy_(found)")),
    *of(
        "caching/ranks.py",
        "caching/test_distributed.py",
        ("flat /= dist.get_world_size()", "pass"),
        ("            if not used:\n                parameter.grad = None", "            pass"),
        ("stack.enter_context(module.no_sync())", "pass"),
    ),
    *of(
        "caching/spans.py",
        "caching/test_rows.py",
        ("torch.arange(1, width + 1, device", "torch.arange(0, width, device"),
    ),
    *of(
        "caching/pieces.py",
        "caching/test_pieces.py",
        ("+ torch.arange(int(sizes.sum()))", "+ torch.arange(1, int(sizes.sum()) + 1)"),
        ("torch.diff(reached, prepend=reached.new_zeros(1))", "torch.diff(reached, prepend=reached[:1])"),
        ("[:, : int(sizes.max())]", "[:, : int(sizes.max()) - 1]"),
    ),
    *of(
        "caching/on_demand.py",
        "caching/test_on_demand.py",
        ("value.index_select(0, rows.to(value.device)) if", "value if"),
        ("                del self._prepared[place]\n", ""),
    ),
    *of(
        "caching/rows.py",
        "caching/test_rows.py",
        ("value.index_select(0, rows.to(value.device))", "value.index_select(0, rows.sort().values.to(value.device))"),
    ),
    *of(
        "caching/schedule.py",
        "caching/test_schedule.py",
        ("tokens = wider * (count + 1) + visual", "tokens = wider * count + visual"),
        ("return int(keep_graphs * num_mini_batches + 0.5)", "return int(keep_graphs * num_mini_batches)"),
    ),
    *of(
        "plans/plan.py",
        "plans/test_plan.py",
        ("np.random.default_rng([self.seed, epoch])", "np.random.default_rng([self.seed, 0])"),
        (
            "share * self.batch_size : (share + 1) * self.batch_size",
            "share * self.batch_size : (share + 1) * self.batch_size - 1",
        ),
        ("self._start = self.position", "self._start = self.position + 1"),
    ),
    *of(
        "plans/sampling.py",
        "plans/test_plan.py",
        ("self._replace(members, clusters, _draw(", "(members, clusters, _draw("),
        ("mates = whole * (m - 1) +", "mates = whole * m +"),
        ("both = (self.num_single_rows - 1)", "both = self.num_single_rows"),
    ),
    *of(
        "losses/rows.py",
        "losses/test_rows.py",
        ("log_ways = self.ways[", "log_ways = -self.ways["),
        ("torch.where(cluster < 0, -2 - index, cluster)", "cluster"),
        ("-log_others - math.log(chance_same)", "-log_others + math.log(chance_same)"),
        ("same + math.log(ratio)", "same - math.log(ratio)"),
        ("* width + positive_id[pairs[:, 1]]", "* width + pairs[:, 1]"),
    ),
    *of(
        "mining/exchange.py",
        "mining/test_partition.py",
        ("in np.argsort(-value, kind=", "in np.argsort(value, kind="),
        ("- (2 * between if home < pool else between)", "+ (2 * between if home < pool else between)"),
        ("members[target]) - leaving\n", "members[target]) + leaving\n"),
        ("tie[other] -= graph.data[edge]", "tie[other] += graph.data[edge]"),
    ),
]


class NotFound(Exception):
    """The source does not hold an entry's text exactly once."""


def mutated(text: str, mutation: Mutation) -> str:
    """The file's text with the mistake in it.

    Raises:
        NotFound: Its text is not there exactly once, or changes nothing.
    """
    count = text.count(mutation.old)
    if count != 1 or mutation.old == mutation.new:
        raise NotFound(
            f"src/anybatch/{mutation.file} holds {mutation.old!r} {count} times; expected once. The code has changed: "
            "mend this entry of benchmarks/mutations.py."
        )
    return text.replace(mutation.old, mutation.new)


def check(mutations: Sequence[Mutation], root: Path = ROOT) -> list[str]:
    """What is wrong with the list: one message an entry."""
    wrong = []
    for mutation in mutations:
        try:
            mutated((root / "src" / "anybatch" / mutation.file).read_text(), mutation)
        except (NotFound, OSError) as error:
            wrong.append(str(error))
        wrong += [
            f"There is no tests/{name}, which mirrors {mutation.file}."
            for name in mutation.tests
            if not (root / "tests" / name).is_file()
        ]
    return wrong


def run(tests: Sequence[str], mutation: Mutation | None, root: Path = ROOT) -> tuple[str, str, float]:
    """Result, failing test and seconds of these files on a copy of src with the mistake in it (None: as it is; then all
    failing tests).
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "src"
        shutil.copytree(root / "src", copy, ignore=shutil.ignore_patterns("*.pyc"))  # keeps what Numba has compiled
        if mutation is not None:
            path = copy / "anybatch" / mutation.file
            path.write_text(mutated(path.read_text(), mutation))
        environment = {**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{root}", "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        imported = subprocess.run(
            [sys.executable, "-c", "import anybatch; print(anybatch.__file__)"],
            env=environment, cwd=root, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert imported.startswith(str(copy)), f"{imported} is imported, not the copy {copy}"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(["-x"] if mutation else [])]
        try:
            done = subprocess.run(
                [*command, *(f"tests/{test}" for test in tests)],
                env=environment, cwd=root, capture_output=True, text=True, timeout=TIMEOUT, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return LATE, "", time.perf_counter() - start
    failed = re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    # 1: a test failed. 2 and more: pytest was interrupted, as by a module that cannot be imported: that shows nothing.
    result = {0: SURVIVED, 1: CAUGHT}.get(done.returncode, BROKEN)
    said = done.stdout.strip().splitlines()[-1:] or [done.stderr[-200:]]
    return result, " ".join(failed or said), time.perf_counter() - start


def page(rows: Sequence[tuple[Mutation, str, str]], seconds: float, jobs: int) -> str:
    """The table as Markdown."""

    def code(text: str) -> str:
        return "`" + " ".join(text.split()).replace("|", "\\|") + "`"

    caught = sum(result == CAUGHT for _, result, _ in rows)
    lines = [
        "# Mistakes that the tests must notice",
        "",
        f"{caught} of {len(rows)} caught, each by the file that mirrors the changed module. {seconds / 60:.0f} "
        f"minutes, {jobs} at a time.",
        "`python -m benchmarks.mutations`; each mistake is made in a copy of `src`, and the same files pass without "
        "it.",
        "",
        "| module | text | mistake | result | first failing test |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {m.file} | {code(m.old)} | {code(m.new)} | {result} | {test} |" for m, result, test in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make every mistake, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="entries whose file, text or tests hold one of these; writes no page"
    )
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "mutations.md")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if any(part in " ".join([m.file, m.old, *m.tests]) for part in args.only)]
    wrong = check(chosen)
    if wrong or not chosen:
        print("\n".join(wrong) or f"No entry holds {args.only!r}.", file=sys.stderr)
        raise SystemExit(2)
    start = time.perf_counter()
    files = sorted({test for mutation in chosen for test in mutation.tests})
    with ThreadPoolExecutor(args.jobs) as pool:
        unchanged = pool.submit(run, files, None)
        pending = [pool.submit(run, mutation.tests, mutation) for mutation in chosen]
        results = []
        for mutation, future in zip(chosen, pending, strict=True):
            result, test, seconds = future.result()
            results.append((mutation, result, test))
            print(
                f"{result:12} {seconds:4.0f} s  {mutation.file}: {mutation.old!r} -> {mutation.new!r}  {test}",
                flush=True,
            )
        _, failing, seconds = unchanged.result()
    unfit = {test for test in files if any(name.startswith(test + "::") for name in failing.split())}
    print(f"unchanged: {len(files) - len(unfit)} of {len(files)} files pass, {seconds:.0f} s {sorted(unfit) or ''}")
    rows = [(m, UNJUDGED if unfit.intersection(m.tests) else result, test) for m, result, test in results]
    print("\n".join(f"{result}: {m.file}: {m.old!r}" for m, result, _ in rows if result != CAUGHT))
    caught = sum(result == CAUGHT for _, result, _ in rows)
    seconds = time.perf_counter() - start
    print(f"{caught} of {len(rows)} caught, {seconds / 60:.1f} minutes")
    if args.only == [""]:
        from anybatch.core.files import write_text

        write_text(args.out, page(rows, seconds, args.jobs))
    raise SystemExit(caught < len(rows))


if __name__ == "__main__":
    main()
