"""Tables, aims and figure of the study, from its lines: docs/benchmarks/study.md and quality.svg."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from anybatch.insight import markdown_table
from anybatch.insight.charts import COLOURS
from anybatch.losses.registry import recommended

Where = tuple[str, str, str, str, int]  # student, budget, task, arm, batch size
ASIDE = ("mixture", "arxiv60k")  # told beside the five tasks
MINED = ("arxiv", "arxiv60k")  # whose mined plans pass all marks: `python -m benchmarks.mined_or_random`, docs/log.md
SIZES = (16, 64, 256, 1024)
DRAWN = {
    "random/infonce": "InfoNCE",
    "random/corrected": "count-corrected",
    "random/cross_batch": "cross-batch",
    "ours/infonce": "ours, InfoNCE",
    "ours/cross_batch": "ours, cross-batch",
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Mean nDCG@10 of some seeds on test queries, its standard error, and whether the best rate was the last tried.

    Three seeds tell little of their own spread, so the error is of the standard deviation pooled over the arms of a
    task, student, batch size and budget.
    """

    mean: float
    error: float
    edge: bool

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}{'*' if self.edge else ''}".replace("0.", ".")

    def above(self, other: Figure, errors: float = 2.0) -> bool:
        """Whether it is higher by more than so many standard errors of the difference."""
        return self.mean - other.mean > errors * math.hypot(self.error, other.error)


class Results:
    """The figure of every cell whose three rates are done, with all seeds."""

    def __init__(
        self,
        lines: Iterable[Mapping[str, Any]],
        seeds: Sequence[int],
        tasks: Sequence[str],
        asked: Sequence[Where],
    ) -> None:
        runs: dict[Where, dict[float, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
        self.rows: dict[str, int] = {}
        for line in lines:
            self.rows[line["task"]] = line["rows"]
            where = (line["student"], line["budget"], line["task"], line["arm"], line["batch_size"])
            runs[where][line["rate"]][line["seed"]] = line
        found: dict[Where, tuple[list[float], bool]] = {}
        self.tasks, self.asked = tasks, asked
        for where, rates in runs.items():
            done = {rate: by_seed for rate, by_seed in rates.items() if len(by_seed) == len(seeds)}
            if len(done) < 3:
                continue
            best = max(done, key=lambda rate: statistics.fmean(line["dev"] for line in done[rate].values()))
            found[where] = [line["test"] for line in done[best].values()], best in (min(done), max(done))
        self.figures = {
            where: Figure(mean=statistics.fmean(tests), error=_pooled(found, where) / len(seeds) ** 0.5, edge=edge)
            for where, (tests, edge) in found.items()
        }
        arms = {arm for _, _, _, arm, _ in self.figures}
        self.arms = sorted(arms, key=lambda arm: (arm.split("/")[1], arm))

    def of(self, student: str, task: str, arm: str, size: int, budget: str = "pairs") -> Figure | None:
        """A cell's figure, if it is done."""
        return self.figures.get((student, budget, task, arm, size))

    def base(self, task: str, loss: str) -> str:
        """Random batches, within one task each."""
        return f"{'within' if task == 'mixture' else 'random'}/{loss}"

    def recommended(self, student: str, task: str, size: int, teacher: bool) -> str:
        """What `loss: auto` and `mining: auto` take (`anybatch.run.recipe`)."""
        pretrained = student.startswith("layers")
        mined = teacher and pretrained and task in MINED
        name, _ = recommended(size, self.rows.get(task, 0), pretrained=pretrained, mined=mined)
        loss = {"count_corrected": "corrected"}.get(name, name)
        return f"ours/{loss}" if mined else self.base(task, loss)


def _pooled(found: Mapping[Where, tuple[list[float], bool]], where: Where) -> float:
    """The standard deviation over seeds, of all arms in the same place."""
    place = (*where[:3], where[4])
    spreads = [statistics.variance(tests) for other, (tests, _) in found.items() if (*other[:3], other[4]) == place]
    return math.sqrt(statistics.fmean(spreads))


Comparison = tuple[Figure, Figure]


def write(
    lines: Sequence[Mapping[str, Any]], *, seeds: Sequence[int], tasks: Sequence[str], asked: Sequence[Where], out: Path
) -> None:
    """study.md and quality.svg in the folder `out`; `asked`: all cells that the study is to have."""
    results = Results(lines, seeds, tasks, asked)
    parts = [
        "# The study\n\n`python -m benchmarks.study --data FOLDER --model FOLDER` (what is trained and searched stands "
        f"in `benchmarks/study_tasks.py` and `small_models.py`); every run is a line of `study.jsonl`: {len(lines):,} "
        f"runs so far, {len(results.figures)} cells of {len(asked)} done. Machine: 2-core x86 CPU, one thread a run, "
        "float32.\n\nA figure is the mean nDCG@10 of three seeds on test queries ± its standard error, at the rate "
        "that was best on development queries over the same seeds (three rates or more; `*`: the best was still the "
        "last one tried). The error is of the seeds' standard deviation, pooled over the arms of a column. Teacher: "
        "all-MiniLM-L6-v2. Empty: not run.\n\n![quality against batch size](quality.svg)\n"
    ]
    students = list(dict.fromkeys(where[0] for where in results.figures))
    parts += [f"\n## Aims\n\n{_aims(results, students)}\n## Each arm against InfoNCE with random batches\n\n"]
    parts += [
        "At the same size, task, student and budget: mean difference, and in how many cells it is higher or lower by "
        "two standard errors. Share of the ceiling: of what a fresh memory of 1,024 random rows gains, the median "
        "over the cells where it gains more than two standard errors.\n\n" + _against(results)
    ]
    for student, budget in dict.fromkeys(where[:2] for where in results.figures):
        for task in tasks:
            cells = {where[3:]: f for where, f in results.figures.items() if where[:3] == (student, budget, task)}
            if cells:
                sizes = [size for size in SIZES if any(size == found for _, found in cells)]
                body = [
                    [arm, *(str(cells.get((arm, size), "")) for size in sizes)]
                    for arm in results.arms
                    if any(arm == found for found, _ in cells)
                ]
                parts.append(f"\n## {task}, {student}, equal {budget}\n\n")
                parts.append(markdown_table(["batches/loss", *map(str, sizes)], body))
    (out / "study.md").write_text("".join(parts), encoding="utf-8")
    (out / "quality.svg").write_text(_drawing(results), encoding="utf-8")


def _aims(results: Results, students: Sequence[str]) -> str:
    rows = []
    for student in students:
        places = [(where[2], where[4]) for where in results.asked if where[:2] == (student, "pairs")]
        places = sorted(set(places), key=lambda place: (results.tasks.index(place[0]), place[1]))
        single = [task for task, size in places if task not in ASIDE and size == 64]
        large = [task for task, size in places if size == 1024]

        def cell(task: str, arm: str, size: int = 64, budget: str = "pairs", student: str = student) -> Figure | None:
            return results.of(student, task, arm, size, budget)

        def best(task: str, arms: Sequence[str], get: Callable[..., Figure | None] = cell) -> Figure | None:
            found = [get(task, arm) for arm in arms]
            return None if None in found else max(found, key=lambda f: f.mean)  # pyright: ignore

        for loss in ("infonce", "corrected", "cross_batch"):
            pairs = {t: (cell(t, f"ours/{loss}"), cell(t, f"random/{loss}")) for t in single}
            rows.append(
                [student, f"mined > random within task, {loss}, at 64, on 3 of {len(single)}", *_verdict(pairs, 3)]
            )
        for budget in ("pairs", "steps"):
            for loss in ("infonce", "corrected") if large else ():
                pairs = {t: (cell(t, f"ours/{loss}"), cell(t, "random/infonce", 1024, budget)) for t in large}
                name = f"mined ({loss}) at 64 >= InfoNCE at 1,024, equal {budget}, on 3"
                rows.append([student, name, *_verdict(pairs, 3, at_least=True)])
        together = "ours+negatives/cross_batch"
        levers = ("ours/infonce", "ours/corrected", "random/corrected", "random/cross_batch")
        pairs = {t: (cell(t, together), best(t, levers)) for t in single}
        rows.append([student, "everything together >= best single lever, on 4", *_verdict(pairs, 4, at_least=True)])
        pairs = {t: (cell(t, "random/sogclr-batch"), cell(t, "random/corrected")) for t in ("docstrings", "snli")}
        rows.append([student, "SogCLR >= count-corrected where rows come 8 times", *_verdict(pairs, 2, at_least=True)])
        for teacher in (False, True):
            pairs = {
                f"{t} {size}": (cell(t, results.recommended(student, t, size, teacher), size), cell(t, base, size))
                for t, size in places
                if (base := results.base(t, "infonce"))
            }
            name = f"recommended with{'' if teacher else 'out'} a teacher: nowhere below InfoNCE by one error"
            rows.append([student, name, *_verdict(pairs, len(pairs), at_least=True, errors=1.0)])
    return markdown_table(["student", "aim", "verdict", "higher", "lower", "tasks (difference)"], rows)


def _verdict(
    pairs: Mapping[str, tuple[Figure | None, Figure | None]],
    wanted: int,
    *,
    at_least: bool = False,
    errors: float = 2.0,
) -> list[str]:
    """Held, not held, or not run; tasks higher and lower by so many standard errors; every difference.

    `at_least`: a task counts where it is not lower by them; else where it is higher.
    """
    known: dict[str, Comparison] = {t: (a, b) for t, (a, b) in pairs.items() if a is not None and b is not None}
    higher = [task for task, (a, b) in known.items() if a.above(b, errors)]
    lower = [task for task, (a, b) in known.items() if b.above(a, errors)]
    count = len(known) - len(lower) if at_least else len(higher)
    missing = len(pairs) - len(known)
    verdict = "held" if count >= wanted else "not run" if count + missing >= wanted else "not held"
    shown = ", ".join(f"{task} {a.mean - b.mean:+.3f}".replace("0.", ".") for task, (a, b) in known.items())
    return [verdict, str(len(higher)), str(len(lower)), f"{shown} ({len(known)} of {len(pairs)})"]


def _against(results: Results) -> str:
    rows = []
    for student in dict.fromkeys(where[0] for where in results.figures):
        for arm in results.arms:
            gaps, shares, counts = [], [], [0, 0]
            for (name, budget, task, other, size), figure in results.figures.items():
                base = results.of(name, task, results.base(task, "infonce"), size, budget)
                if (name, other) != (student, arm) or base is None or base is figure:
                    continue
                gaps.append(figure.mean - base.mean)
                counts[0] += figure.above(base)
                counts[1] += base.above(figure)
                ceiling = results.of(name, task, "random/fresh", size, budget)
                if ceiling is not None and ceiling.above(base):
                    shares.append(gaps[-1] / (ceiling.mean - base.mean))
            if gaps:
                figures = [f"{gap:+.3f}".replace("0.", ".") for gap in (statistics.fmean(gaps), min(gaps), max(gaps))]
                share = f"{statistics.median(shares):.0%} of {len(shares)}" if shares else ""
                rows.append([student, arm, *figures, f"{counts[0]} / {counts[1]} / {len(gaps)}", share])
    header = ["student", "batches/loss", "mean", "lowest", "highest", "higher / lower / of", "share of the ceiling"]
    return markdown_table(header, rows)


def _drawing(results: Results, student: str = "small", budget: str = "pairs") -> str:
    """Small multiples, one a task: nDCG@10 against the batch size, with error bars of one standard error."""
    tasks = [task for task in results.tasks if any(where[:3] == (student, budget, task) for where in results.figures)]
    wide, high, left, top, across = 250, 180, 44, 26, 3
    height = -(-len(tasks) // across) * high + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide * across} {height}" role="img" '
        'font-family="sans-serif" font-size="11"><title>nDCG@10 against batch size</title>'
        f'<rect width="{wide * across}" height="{height}" fill="white"/>'
    ]
    for number, name in enumerate(DRAWN.values()):
        x = left + number * 135
        parts.append(f'<rect x="{x}" y="{height - 14}" width="12" height="4" fill="{COLOURS[number]}"/>')
        parts.append(f'<text x="{x + 18}" y="{height - 8}">{escape(name)}</text>')
    for place, task in enumerate(tasks):
        x0, y0 = place % across * wide + left, place // across * high + top
        inner, deep = wide - left - 16, high - top - 30
        series = [
            [(size, figure) for size in SIZES if (figure := results.of(student, task, arm, size, budget))]
            for arm in DRAWN
        ]
        values = [f.mean + sign * f.error for points in series for _, f in points for sign in (-1, 1)]
        if not values:
            continue
        low, high_value = min(values), max(values)

        def at(size: int, value: float, x0=x0, y0=y0, inner=inner, deep=deep, low=low, top_value=high_value) -> str:
            x = x0 + (math.log2(size) - 4) / 6 * inner
            return f"{x:.1f},{y0 + deep - (value - low) / ((top_value - low) or 1) * deep:.1f}"

        parts.append(f'<text x="{x0}" y="{y0 - 8}" font-weight="bold">{escape(task)}</text>')
        parts.append(f'<path d="M{x0} {y0}V{y0 + deep}H{x0 + inner}" fill="none" stroke="#999"/>')
        for value in (low, high_value):
            y = at(16, value).split(",")[1]
            parts.append(f'<text x="{x0 - 4}" y="{y}" text-anchor="end">{value:.3f}</text>')
        for size in SIZES:
            x = at(size, low).split(",")[0]
            parts.append(f'<text x="{x}" y="{y0 + deep + 14}" text-anchor="middle">{size:,}</text>')
        for number, points in enumerate(series):
            aside = f'transform="translate({(number - 2) * 3} 0)"'  # so that no error bar hides another
            line = " ".join(at(size, figure.mean) for size, figure in points)
            bars = "".join(f"M{at(s, f.mean - f.error)}L{at(s, f.mean + f.error)}" for s, f in points)
            style = f'{aside} fill="none" stroke="{COLOURS[number]}"'
            parts.append(f'<polyline points="{line}" {style} stroke-width="2"/><path d="{bars}" {style}/>')
    return "".join([*parts, "</svg>\n"])
