"""`anybatch train` on the whole of arxiv-title-abstract, once a method: one configuration file, another loss and plan.

Usage: python -m benchmarks.full_run --data FOLDER --model FOLDER [--anchor-embeddings A.npy --positive-embeddings
P.npy] [--only NAME]

Each finished method is appended to docs/benchmarks/full_run.jsonl at once; the table in full_run.md is made of that
file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from anybatch.insight import markdown_table

METHODS: dict[str, list[str]] = {
    "InfoNCE, random": [],
    "count-corrected, random": ["loss.name=count_corrected"],
    "cross-batch, random": ["loss.name=cross_batch"],
    "InfoNCE, random, batches of 1,024": ["batch_size=1024", "train.learning_rate=8e-4"],
    "InfoNCE, mined": ["mining.method=anybatch"],
    "SogCLR, mined, inclusion weights": ["mining.method=anybatch", "loss.name=sogclr", "loss.weights=inclusion"],
}
FOLDER = Path("docs/benchmarks")


def main() -> None:
    """Run, append, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of arxiv-title-abstract")
    parser.add_argument(
        "--model", required=True, help="folder of all-MiniLM-L6-v2: teacher, and student cut to one layer"
    )
    parser.add_argument("--anchor-embeddings", help="teacher embeddings of the titles, if they exist already")
    parser.add_argument("--positive-embeddings")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs go")
    parser.add_argument("--only", nargs="*", default=list(METHODS), help="names of methods")
    options = parser.parse_args()
    results = FOLDER / "full_run.jsonl"
    for name in options.only:
        folder = options.runs / name.replace(", ", "-").replace(" ", "_")
        settings = [
            f"output={folder}",
            f"data.path={options.data / 'train.jsonl.gz'}",
            f"evaluation.path={options.data / 'test.jsonl.gz'}",
            f"model.name={options.model}",
            *METHODS[name],
        ]
        vectors = f"teacher.embeddings=[{options.anchor_embeddings}, {options.positive_embeddings}]"
        settings.append(vectors if options.anchor_embeddings else f"teacher.name={options.model}")
        resume = ["--resume"] if (folder / "config.yaml").exists() else []
        arguments = [item for setting in settings for item in ("--set", setting)]
        subprocess.run(
            [
                sys.executable,
                "-m",
                "anybatch",
                "train",
                "--config",
                "benchmarks/configs/arxiv.yaml",
                *arguments,
                *resume,
            ],
            check=True,
        )
        line = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        line = {
            "method": name,
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            **{key: value for key, value in line.items() if key != "log"},
        }
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        write_table(results)


def write_table(results: Path) -> None:
    """The table of all results so far; the newest line of each method counts."""
    lines = {record["method"]: record for record in map(json.loads, results.read_text(encoding="utf-8").splitlines())}
    names = ("recall@1", "recall@10", "mrr@10", "ndcg@10")
    first = next(iter(lines.values()))
    rows = [["untrained student", *(f"{first['metrics_untrained'][name]:.4f}" for name in names), ""]]
    for name, record in lines.items():
        figures = [f"{record['metrics'][key]:.4f}" for key in names]
        rows.append([name, *figures, f"{record['train_peak_bytes'] / 2**30:.2f} GiB"])
    header = ["method", "recall@1", "recall@10", "MRR@10", "nDCG@10", "peak memory"]
    text = (
        "# One pass over 60,000 pairs\n\n"
        "`python -m benchmarks.full_run --data FOLDER --model FOLDER`: `anybatch train` with "
        "`benchmarks/configs/arxiv.yaml`; loss and plan are all that changes. Student: the first layer of "
        "all-MiniLM-L6-v2, 32 tokens; teacher for mining: all of it, 64 tokens; batch 64, one learning rate (2e-4; "
        f"8e-4 at 1,024), one seed. Test: title to abstract among 5,000. Machine: 2-core x86 CPU, {first['threads']} "
        "thread(s), shared with other work and paused for some of it, so wall times say nothing and are left out.\n\n"
        + markdown_table(header, rows)
        + "\nOne seed and one learning rate: differences of about .01 mean nothing.\n"
    )
    (FOLDER / "full_run.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
