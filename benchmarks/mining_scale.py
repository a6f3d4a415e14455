"""Mining from tens of thousands of rows to a million: time and peak memory of each stage, in one run each.

Usage: python -m benchmarks.mining_scale --anchor-embeddings A.npy --positive-embeddings P.npy [--rows N ...]

The first rows are the files' own. Further ones are made so that the neighbourhoods stay like theirs: a real pair i, one
of its 20 nearest pairs j, and the difference of two random pairs r, s, in the same proportions on both sides, so that
anchor and positive still belong together:

    row = normalised(w x_i + (1 - w) x_j + 0.3 (x_r - x_s)),  w uniform in [0.5, 1],  x the anchors or the positives

They are kept as float16 files in `--scratch`, where they are found again. Each size is a process of its own, and a
killed one goes on with its neighbours. Each line is appended to docs/benchmarks/mining_scale.jsonl; mining_scale.md is
made of that file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from anybatch.core.resources import Measure, resident_bytes
from anybatch.insight import markdown_table
from anybatch.mining import MiningConfig, exact_neighbors, mine_plan
from benchmarks.clusters import audit_of

FOLDER = Path("docs/benchmarks")
STAGES = ("neighbors", "graph", "communities", "refinement", "figures")
STEP = 20_000  # rows made at once
SKIP, TAKE = 30, 70  # a hundred neighbours


def main() -> None:
    """Every size in a process of its own, so that peaks do not mix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchor-embeddings", required=True)
    parser.add_argument("--positive-embeddings", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 200_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--neighbors", default="ivf", choices=["auto", "exact", "ivf"])
    parser.add_argument(
        "--scratch", type=Path, default=Path("runs/rows"), help="where made rows and neighbours are kept"
    )
    options = parser.parse_args()
    if len(options.rows) == 1:
        measure(options)
        return
    same = ["--anchor-embeddings", options.anchor_embeddings, "--positive-embeddings", options.positive_embeddings]
    same += ["--threads", str(options.threads), "--neighbors", options.neighbors, "--scratch", str(options.scratch)]
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    for rows in options.rows:
        command = [sys.executable, "-m", "benchmarks.mining_scale", *same, "--rows", str(rows)]
        subprocess.run(command, check=True, env={**os.environ, **threads})


def measure(options: argparse.Namespace) -> None:
    """Mine one size and append its line."""
    torch.set_num_threads(options.threads)
    num_rows = options.rows[0]
    anchors, positives = make_rows(options.anchor_embeddings, options.positive_embeddings, num_rows, options.scratch)
    folder = options.scratch / f"neighbors-{num_rows}-{options.neighbors}"
    resumed = folder.exists()
    last = {"stage": "", "done": -1.0}
    began: dict[str, tuple[float, float]] = {}
    seconds: dict[str, float] = {}
    used: dict[str, float] = {}  # processor seconds: on a shared machine they say more than the clock
    peaks: dict[str, int] = {}
    memory = Measure()

    def show(stage: str, done: float) -> None:
        if stage not in began:
            began[stage], memory.peak_bytes = (time.perf_counter(), time.process_time()), resident_bytes()
        seconds[stage] = time.perf_counter() - began[stage][0]
        used[stage], peaks[stage] = round(time.process_time() - began[stage][1], 2), memory.peak_bytes
        if stage != last["stage"] or done >= float(last["done"]) + 0.1:
            last.update(stage=stage, done=done)
            print(f"{num_rows}: {stage} {done:.0%}", flush=True)

    before = {"margin": None, "conflict_weight": 3.0}  # the defaults that the table was made with
    config = MiningConfig(cluster_size=32, window=(SKIP, TAKE), neighbors=options.neighbors, **before)
    with memory:
        result = mine_plan(anchors, positives, config=config, folder=folder, progress=show)
    audit = audit_of(result)
    shutil.rmtree(folder)
    line = {
        "rows": num_rows,
        "neighbors": options.neighbors,
        "threads": options.threads,
        "resumed": resumed,
        "load": round(os.getloadavg()[0], 1),
        "recall": result.report.recall,
        "seconds": seconds,
        "cpu_seconds": used,
        "peak_bytes": peaks,
        "window": audit.window_per_anchor,
        "conflicts": audit.conflicts_per_anchor,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "mining_scale.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))
    write_table()


def make_rows(
    anchor_file: str, positive_file: str, num_rows: int, scratch: Path, *, dtype: str = "float16"
) -> tuple[np.ndarray, np.ndarray]:
    """(n, D) anchors and positives as the module says, memory-mapped; the same first rows whatever their number."""
    real = [np.load(name, mmap_mode="r") for name in (anchor_file, positive_file)]
    num_real = len(real[0])
    if num_rows <= num_real and dtype == "float32":
        return real[0][:num_rows], real[1][:num_rows]
    scratch.mkdir(parents=True, exist_ok=True)
    paths = [scratch / f"{side}-{num_rows}-{dtype}.npy" for side in ("anchor", "positive")]
    if not all(path.exists() for path in paths):
        near = _nearest(real[0], real[1], scratch) if num_rows > num_real else np.empty((0, 0))
        partial = [path.with_suffix(".partial") for path in paths]
        shape = (num_rows, real[0].shape[1])
        made = [np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape) for path in partial]
        for start in range(0, num_rows, STEP):
            stop = min(start + STEP, num_rows)
            rows = np.arange(start, stop)
            generator = np.random.default_rng([0, start])
            one, two, three = (generator.integers(num_real, size=STEP)[: len(rows)] for _ in range(3))
            column = generator.integers(20, size=STEP)[: len(rows)]
            weight = generator.uniform(0.5, 1.0, size=STEP)[: len(rows), None].astype(np.float32)
            for side, array in zip(real, made, strict=True):
                if start < num_real:
                    array[start : min(stop, num_real)] = side[start : min(stop, num_real)]
                new = rows >= num_real
                if not new.any():
                    continue
                mixed = weight[new] * side[one[new]] + (1 - weight[new]) * side[near[one[new], column[new]]]
                mixed += 0.3 * (side[two[new]] - side[three[new]])
                array[rows[new]] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
        for old, path in zip(partial, paths, strict=True):
            os.replace(old, path)
    return np.load(paths[0], mmap_mode="r"), np.load(paths[1], mmap_mode="r")


def _nearest(anchors: np.ndarray, positives: np.ndarray, scratch: Path) -> np.ndarray:
    """(n, 20) nearest real pairs of each real pair."""
    every = np.arange(len(anchors))
    found = exact_neighbors(anchors, positives, 20, anchor_id=every, positive_id=every, folder=scratch / "nearest")
    return np.array(found.ids)


def write_table() -> None:
    """mining_scale.md from all lines so far."""
    lines = [json.loads(line) for line in (FOLDER / "mining_scale.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = []
    for line in lines:
        parts = ((line["seconds"][name], line["cpu_seconds"][name], line["peak_bytes"][name]) for name in STAGES)
        stages = [f"{wall:.0f} s ({cpu:.0f} s), {peak / 2**30:.1f} GiB" for wall, cpu, peak in parts]
        minutes, busy = (sum(line[name].values()) / 60 for name in ("seconds", "cpu_seconds"))
        total = f"{minutes:.1f} min ({busy:.1f} min), {max(line['peak_bytes'].values()) / 2**30:.1f} GiB"
        if line["resumed"]:
            stages[0] += " (resumed)"
        quality = f"{line['window']:.2f} / {line['conflicts']:.3f}"
        first = [f"{line['rows']:,}", line["neighbors"], str(line["threads"]), f"{line['recall']:.3f}"]
        rows.append([*first, *stages, f"**{total}**", quality, f"{line['load']:.1f}"])
    header = [
        "rows",
        "search",
        "threads",
        f"recall@{SKIP + TAKE}",
        *STAGES,
        "whole",
        "window / conflicts an anchor",
        "load",
    ]
    text = (
        "# Mining at scale\n\n"
        "`python -m benchmarks.mining_scale --anchor-embeddings A.npy --positive-embeddings P.npy`: `mine_plan` with "
        "its defaults but "
        f"skip {SKIP}, take {TAKE}; 384 dimensions in float16 files. Rows beyond the 60,000 real pairs of "
        "arxiv-title-abstract (all-MiniLM-L6-v2) are made of them, see the "
        "benchmark's docstring. Seconds of wall time, in brackets of processor time, and peak resident memory of the "
        "process in each stage; pages of mapped files that happen to be in memory count. Recall is "
        "measured on a sample by the search itself. Machine: 2-core x86 CPU, 24 GB, shared with other work (load: "
        "processes that wanted a core in the last minute).\n\n" + markdown_table(header, rows)
    )
    (FOLDER / "mining_scale.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
