"""Exact neighbours beside the matrix product alone and faiss's flat index, on the same rows in the same run.

Usage: python -m benchmarks.neighbors --anchor-embeddings A.npy --positive-embeddings P.npy [--rows 100000] [--queries
4096] [--threads 1 2]

The queries are a sample of the rows: time is proportional to their number (it is given per query and row). More rows
than the files hold are made as `benchmarks.mining_scale` makes them. Each line is appended to
docs/benchmarks/neighbors.jsonl; neighbors.md is made of that file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from anybatch.insight import markdown_table
from anybatch.mining import exact_neighbors
from benchmarks.mining_scale import make_rows

FOLDER = Path("docs/benchmarks")
NUM_NEIGHBORS = 130
ROUNDS = 3


def main() -> None:
    """One fresh process a number of threads, so that every library starts with it; then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchor-embeddings", required=True)
    parser.add_argument("--positive-embeddings", required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scratch", type=Path, default=Path("runs/rows"), help="where made rows are kept")
    options = parser.parse_args()
    if len(options.threads) > 1:
        for threads in options.threads:
            arguments = [*sys.argv[1 : _position("--threads")], "--threads", str(threads)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
            subprocess.run([sys.executable, "-m", "benchmarks.neighbors", *arguments], check=True, env=environment)
        return
    record = measure(options)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "neighbors.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record))
    write_table()


def _position(name: str) -> int:
    return sys.argv.index(name) if name in sys.argv else len(sys.argv)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Best of ROUNDS of each of the three, taken in turn so that other work on the machine meets all of them."""
    import faiss

    threads = options.threads[0]
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    anchors, positives = make_rows(
        options.anchor_embeddings, options.positive_embeddings, options.rows, options.scratch, dtype="float32"
    )
    documents = np.array(positives)
    rows = np.sort(np.random.default_rng(0).choice(len(documents), options.queries, replace=False))
    queries = np.ascontiguousarray(anchors[rows])
    every = np.arange(len(documents))
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(documents)  # pyright: ignore[reportCallIssue]
    block, tile = torch.from_numpy(queries), torch.empty(len(queries) * 2048)

    def product() -> None:
        for first in range(0, len(documents), 2048):
            part = torch.from_numpy(documents[first : first + 2048])
            torch.mm(block, part.T, out=tile[: len(block) * len(part)].view(len(block), len(part)))

    def ours() -> None:
        exact_neighbors(anchors, documents, NUM_NEIGHBORS, anchor_id=every, positive_id=every, rows=rows)

    def flat() -> None:
        index.search(queries, NUM_NEIGHBORS)  # pyright: ignore[reportCallIssue]

    runs: dict[str, Callable[[], None]] = {"product": product, "anybatch": ours, "faiss": flat}
    ours()  # compiles
    wall: dict[str, list[float]] = {name: [] for name in runs}
    busy: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            began, used = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - began)
            busy[name].append(time.process_time() - used)
    pairs = len(queries) * len(documents)
    record: dict[str, float] = {
        "rows": len(documents),
        "queries": len(queries),
        "dimensions": documents.shape[1],
        "num_neighbors": NUM_NEIGHBORS,
        "threads": threads,
        "load": os.getloadavg()[0],
    }
    for name in runs:
        record[f"{name}_ns"] = round(min(wall[name]) / pairs * 1e9, 3)
        record[f"{name}_cpu_ns"] = round(min(busy[name]) / pairs * 1e9, 3)
    return record


def write_table() -> None:
    """neighbors.md from all lines so far."""
    lines = [json.loads(line) for line in (FOLDER / "neighbors.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = []
    for line in lines:
        product, ours, flat = (line[f"{name}_ns"] for name in ("product", "anybatch", "faiss"))
        whole = ours * line["rows"] ** 2 / 1e9
        rows.append(
            [
                f"{line['rows']:,} x {line['dimensions']}",
                str(line["threads"]),
                f"{product:.2f}",
                f"{ours:.2f}",
                f"{flat:.2f}",
                f"**{ours / product:.2f}**",
                f"{flat / product:.2f}",
                f"{line['anybatch_cpu_ns'] / line['product_cpu_ns']:.2f}",
                f"{whole:.0f} s",
                f"{line['load']:.1f}",
            ]
        )
    header = [
        "rows",
        "threads",
        "product ns",
        "anybatch ns",
        "faiss ns",
        "anybatch / product",
        "faiss / product",
        "anybatch / product, processor time",
        "all rows",
        "load",
    ]
    text = (
        "# Exact neighbours\n\n"
        "`python -m benchmarks.neighbors --anchor-embeddings A.npy --positive-embeddings P.npy`: the 130 best "
        f"documents of each query, for {lines[-1]['queries']:,} sampled queries against all rows. Nanoseconds of wall "
        f"time a pair of query and document, best of {ROUNDS}, the three in turn: the matrix product alone (torch, "
        "tiles of 2,048 documents, nothing kept), `exact_neighbors` (which also leaves out the row's own texts), and "
        "faiss's `IndexFlatIP.search`. "
        '"All rows" is what the search of every row takes at that rate. Machine: 2-core x86 CPU, shared with other '
        "work (load: processes that wanted a core in the last minute).\n\n" + markdown_table(header, rows)
    )
    (FOLDER / "neighbors.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
