"""What a GPU says, in under 8 minutes: `python -m benchmarks.gpu [--output FOLDER]`, the most telling first.

    exactness   gradient of the cached and of the plain step, in float32 and bf16, against the plain step in float64
    loss        time and peak memory of the loss alone, at 8,192 and 65,536 rows, beside plain PyTorch and the products
                of matrices alone
    step        time and peak memory of a whole step in bf16, beside plain training and sentence-transformers' cached
                loss, method after method in every round; encoders of MiniLM's and of BERT-base's size

Needs torch and this checkout (anybatch need not be installed) and no network: encoders have random weights, inputs are
random token ids of natural lengths. transformers gives the encoder where it is installed, else torch's own layers of
the same size; sentence-transformers, of any release with a cached loss, is measured where it is installed. Each
measurement is a line of FOLDER/gpu.jsonl as soon as it is done, also the one that fails or finds no memory;
FOLDER/gpu.md is the table. FOLDER is $OUT or docs/benchmarks if not given. On a CPU the sizes are those of a toy, to
see that all of it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))  # this checkout, installed or not

import anybatch  # noqa: E402 - from there

SCALE = 20.0  # 1 / temperature, as sentence-transformers' losses have it
VOCABULARY = 30_522
SHAPES = {
    "MiniLM": (6, 384, 12, 1536),
    "BERT-base": (12, 768, 12, 3072),
    "toy": (2, 16, 2, 32),
}  # layers, width, heads, inner width
PLAIN, PEER, TOKENS, ROWS_, AUTO = (
    "plain PyTorch",
    "sentence-transformers, cached",
    "anybatch, token budget",
    "anybatch, mini-batch",
    "anybatch, auto",
)
STEPS = (TOKENS, PEER, ROWS_, AUTO, PLAIN)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is.

    Attributes:
        exact: Encoder and pairs of the exactness check.
        loss_rows, width: Of the loss alone.
        peer_rows: The most rows that the peer's loss alone is given.
        steps: Encoder, pairs.
        mini_batch_size: Rows that go through the encoder together.
        lengths: Longest anchor and positive, in tokens.
        rounds: Of all methods.
    """

    exact: tuple[str, int]
    loss_rows: tuple[int, ...]
    width: int
    peer_rows: int
    steps: tuple[tuple[str, int], ...]
    mini_batch_size: int
    lengths: tuple[int, int]
    rounds: int


LARGE = Sizes(
    exact=("MiniLM", 256),
    loss_rows=(8192, 65_536),
    width=768,
    peer_rows=8192,
    steps=(("MiniLM", 4096), ("BERT-base", 4096), ("MiniLM", 32_768)),
    mini_batch_size=256,
    lengths=(32, 128),
    rounds=3,
)
TOY = Sizes(
    exact=("toy", 9),
    loss_rows=(64, 130),
    width=8,
    peer_rows=64,
    steps=(("toy", 9),),
    mini_batch_size=4,
    lengths=(5, 11),
    rounds=1,
)


class Report:
    """The lines so far, and how much time is left. A measurement that fails is a line as well, and the next one goes
    on.
    """

    def __init__(self, folder: Path, device: torch.device, seconds: float) -> None:
        self.folder, self.device, self.end = folder, device, time.monotonic() + seconds
        self.lines: list[dict[str, Any]] = []
        self.failed: set[tuple[Any, ...]] = set()
        self.took: dict[tuple[Any, ...], float] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, **line: Any) -> None:
        """Write a line."""
        self.lines.append(line)
        text = json.dumps(line)
        print(text, flush=True)
        with (self.folder / "gpu.jsonl").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def measure(self, measurement: Callable[[], dict[str, Any]], **key: Any) -> None:
        """Run it and write what it returns, unless there is no time, or the same failed in an earlier round."""
        name = tuple(value for entry, value in key.items() if entry != "round")
        if name in self.failed:
            return
        if time.monotonic() + 1.2 * self.took.get(name, 5.0) > self.end:
            self.failed.add(name)
            self.add(**key, result="no time")
            return
        start = time.monotonic()
        try:
            figures = {"result": "done", **measurement()}
        except Exception as error:
            self.failed.add(name)
            short = "out of memory" if out_of_memory(error) else f"{type(error).__name__}: {error}"[:300]
            figures = {"result": short}
            if not out_of_memory(error):
                figures["where"] = traceback.format_exc().splitlines()[-8:]
            del error
        if self.device.type == "cuda":
            gc.collect()  # the frames of an error hold its tensors
            torch.cuda.empty_cache()
        self.took[name] = time.monotonic() - start
        self.add(**key, **figures)


def out_of_memory(error: BaseException) -> bool:
    """Whatever this release of torch calls it."""
    return "out of memory" in str(error).lower() or type(error).__name__ == "OutOfMemoryError"


def timed(function: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Seconds of one call, all of its kernels included, and the memory that it takes beside what is there already."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return {"seconds": time.perf_counter() - start, "mib": None}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, start = torch.cuda.memory_allocated(device), time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "mib": (torch.cuda.max_memory_allocated(device) - before) / 2**20}


class Encoder(nn.Module):
    """A transformer with random weights and mean pooling, called as sentence-transformers calls its models."""

    def __init__(self, size: str, device: torch.device, *, dropout: float = 0.1) -> None:
        super().__init__()
        layers, width, heads, inner = SHAPES[size]
        torch.manual_seed(0)
        self.hugging_face = True
        try:
            from transformers import BertConfig, BertModel

            config = BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=inner,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
            self.body: nn.Module = BertModel(config, add_pooling_layer=False)
        except ImportError:
            self.hugging_face = False
            self.embed = nn.Embedding(VOCABULARY, width)
            layer = nn.TransformerEncoderLayer(width, heads, inner, dropout, "gelu", batch_first=True)
            self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.to(device).train()

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Adds `sentence_embedding` (b, D)."""
        ids, mask = features["input_ids"], features["attention_mask"]
        if self.hugging_face:
            hidden = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
        else:
            hidden = self.body(self.embed(ids), src_key_padding_mask=mask == 0)
        weight = mask[..., None].to(hidden.dtype)
        return {**features, "sentence_embedding": (hidden * weight).sum(1) / weight.sum(1)}


def features_of(rows: int, longest: int, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Token ids of uneven lengths, most of them well below the longest, right-padded."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(rows, generator=generator) * torch.rand(rows, generator=generator).sqrt()
    lengths = 1 + (share * longest).long().clamp(max=longest - 1)
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(5, VOCABULARY, (rows, longest), generator=generator) * mask
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def batch_of(rows: int, sizes: Sizes, device: torch.device) -> list[dict[str, Tensor]]:
    """Anchors and positives."""
    return [features_of(rows, longest, device, seed) for seed, longest in enumerate(sizes.lengths)]


def peer_module(model: nn.Module, mini_batch_size: int) -> Any:
    """sentence-transformers' cached loss, wherever this release keeps it."""
    for name in ("sentence_transformers.sentence_transformer.losses", "sentence_transformers.losses"):
        with contextlib.suppress(ImportError):
            loss = importlib.import_module(name).CachedMultipleNegativesRankingLoss
            return loss(model, scale=SCALE, mini_batch_size=mini_batch_size)
    raise ImportError("sentence-transformers with a cached loss is not installed")


def plain_loss(anchors: Tensor, candidates: Tensor) -> Tensor:
    """InfoNCE as everybody writes it."""
    anchors, candidates = (nn.functional.normalize(side, dim=1) for side in (anchors, candidates))
    scores = anchors @ candidates.T * SCALE
    return nn.functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def step_of(
    name: str, model: nn.Module, features: list[dict[str, Tensor]], precision: torch.dtype, mini_batch_size: int
) -> Callable[[], Any]:
    """One step's gradients; bf16 by autocast."""
    device = features[0]["input_ids"].device
    longest = max(column["input_ids"].shape[1] for column in features)

    def casting() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)

    def encode(batch: Any) -> Tensor:
        return model(batch)["sentence_embedding"]

    if name == PLAIN:

        def plain() -> None:
            with casting():
                embeddings = [encode(column) for column in features]
            at_least = torch.promote_types(embeddings[0].dtype, torch.float32)
            plain_loss(*(side.to(at_least) for side in embeddings)).backward()

        return plain
    if name == PEER:
        loss = peer_module(model, mini_batch_size)

        def peer() -> None:
            with casting():
                value = loss([dict(column) for column in features], None)
            value.backward()

        return peer
    from anybatch.caching import StepMemory, cached_step
    from anybatch.losses import InfoNCE

    options: dict[str, Any] = {
        TOKENS: {"mini_batch_size": None, "max_tokens": mini_batch_size * longest},
        ROWS_: {"mini_batch_size": mini_batch_size},
        AUTO: {"mini_batch_size": "auto", "keep_graphs": "auto", "memory": StepMemory("80%")},
    }[name]
    ours = InfoNCE(temperature=1 / SCALE)

    def cached() -> None:
        with casting():
            cached_step(ours, encode, features, **options)

    return cached


def gradient(model: nn.Module, step: Callable[[], Any]) -> Tensor:
    """All of it, float64."""
    model.zero_grad(set_to_none=True)
    step()
    found = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def exactness(report: Report, sizes: Sizes) -> None:
    """Relative distances of gradients, dropout off."""
    size, rows = sizes.exact
    features = batch_of(rows, sizes, report.device)
    model = nn.Sequential(
        Encoder(size, report.device, dropout=0.0)
    )  # sentence-transformers looks at the first of several modules
    reference: list[Tensor] = []

    def of_float64() -> dict[str, Any]:
        model.double()
        try:
            reference.append(gradient(model, step_of(PLAIN, model, features, torch.float64, sizes.mini_batch_size)))
        finally:
            model.float()  # the weights were float32 and are so again
        return {"norm": float(reference[0].norm())}

    report.measure(of_float64, stage="reference", encoder=size, rows=rows)
    for precision in (torch.float32, torch.bfloat16):
        plain: list[Tensor] = []

        def distances(name: str, precision: torch.dtype = precision, plain: list[Tensor] = plain) -> dict[str, Any]:
            found = gradient(model, step_of(name, model, features, precision, sizes.mini_batch_size))
            if name == PLAIN:
                plain.append(found)
            return {
                "to_float64": float((found - reference[0]).norm() / reference[0].norm()),
                "to_plain": float((found - plain[0]).norm() / plain[0].norm()) if plain else None,
            }

        for name in (PLAIN, TOKENS, AUTO, PEER):
            report.measure(
                lambda name=name, distances=distances: distances(name),
                stage="exactness", precision=str(precision)[6:], name=name, encoder=size, rows=rows,
            )  # fmt: skip


def loss_stage(report: Report, sizes: Sizes) -> None:
    """The loss alone, on embeddings that are there already, forward and backward."""
    for rows in sizes.loss_rows:
        generator = torch.Generator().manual_seed(0)
        sides = [torch.randn(rows, sizes.width, generator=generator).to(report.device) for _ in range(2)]
        for tf32 in (False, True):
            for name, step in loss_contenders(sizes).items():
                if name == PEER and rows > sizes.peer_rows:
                    continue
                with matrix_precision(tf32):
                    report.measure(
                        partial(time_loss, step, sides, sizes.rounds, report.device),
                        stage="loss", name=name, rows=rows, width=sizes.width, tf32=tf32,
                    )  # fmt: skip


def time_loss(
    step: Callable[[list[Tensor]], Any], sides: list[Tensor], rounds: int, device: torch.device
) -> dict[str, Any]:
    """The median of some rounds."""

    def leaves(rows: int) -> list[Tensor]:
        return [side[:rows].detach().requires_grad_() for side in sides]

    step(leaves(64))  # warms up
    runs = []
    for _ in range(rounds):
        given = leaves(len(sides[0]))
        runs.append(timed(lambda given=given: step(given), device))
    return {"seconds": median(run["seconds"] for run in runs), "mib": runs[-1]["mib"]}


def loss_contenders(sizes: Sizes) -> dict[str, Callable[[list[Tensor]], Any]]:
    """By name, what makes the gradients of two leaves."""
    from anybatch.losses import InfoNCE

    def products(leaves: list[Tensor]) -> None:
        """What no method can do without, in tiles of the engine's height."""
        anchors, candidates = (leaf.detach() for leaf in leaves)
        height = max(1, 32 * 2**20 // (4 * len(candidates)))
        sums = torch.zeros_like(candidates)
        for rows in anchors.split(height):
            scores = rows @ candidates.T
            _ = scores @ candidates
            sums.addmm_(scores.T, rows)

    def ours(direction: Any) -> Callable[[list[Tensor]], Any]:
        loss = InfoNCE(temperature=1 / SCALE, direction=direction)
        return lambda leaves: loss(*leaves).backward()

    def peer(leaves: list[Tensor]) -> None:
        loss: Any = peer_module(nn.Sequential(nn.Identity()), sizes.mini_batch_size)
        chunks = [[part.detach().requires_grad_() for part in leaf.split(sizes.mini_batch_size)] for leaf in leaves]
        if hasattr(loss, "calculate_loss"):
            loss.calculate_loss(chunks, None, with_backward=True)
        else:  # its name in earlier releases
            loss.calculate_loss_and_cache_gradients(chunks)

    return {
        "three products of matrices": products,
        "anybatch InfoNCE": ours("one_way"),
        PLAIN: lambda leaves: plain_loss(*leaves).backward(),
        "anybatch InfoNCE, both directions": ours("both"),
        PEER: peer,
    }


@contextlib.contextmanager
def matrix_precision(tf32: bool) -> Iterator[None]:
    """Products of float32 matrices in TF32 or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def steps(report: Report, sizes: Sizes, size: str, rows: int) -> None:
    """Whole steps in bf16, dropout on."""
    features = batch_of(rows, sizes, report.device)
    model = nn.Sequential(Encoder(size, report.device))
    made: dict[str, Callable[[], Any]] = {}

    def measurement(name: str) -> dict[str, Any]:
        if name not in made:
            made[name] = step_of(name, model, features, torch.bfloat16, sizes.mini_batch_size)
            small = [{key: value[: 2 * sizes.mini_batch_size] for key, value in column.items()} for column in features]
            step_of(
                name, model, small, torch.bfloat16, sizes.mini_batch_size
            )()  # warms up kernels; then all shapes of the real step
            model.zero_grad(set_to_none=True)
            made[name]()
        model.zero_grad(set_to_none=True)
        return timed(made[name], report.device)

    for round_ in range(sizes.rounds):
        for name in STEPS:
            report.measure(
                lambda name=name: measurement(name), stage="step", name=name, encoder=size, rows=rows, round=round_
            )
            model.zero_grad(set_to_none=True)


def page(report: Report, machine: str) -> str:
    """The tables as Markdown."""
    text = ["# On a GPU", "", f"{machine}. `python -m benchmarks.gpu`; every measurement is a line of gpu.jsonl.", ""]
    text += [
        "Relative distance of a step's gradient to that of the plain step in float64, and to the plain step's in the "
        "same precision:",
        "",
    ]
    text += ["| precision | step | to float64 | to plain |", "|---|---|---|---|"]
    for line in report.lines:
        if line["stage"] == "exactness":
            cells = [
                f"{line[key]:.1e}" if line.get(key) is not None else line["result"]
                for key in ("to_float64", "to_plain")
            ]
            text.append(f"| {line['precision']} | {line['name']} | {' | '.join(cells)} |")
    text += [
        "",
        "The loss alone, forward and backward:",
        "",
        "| rows | TF32 | loss | seconds | MiB |",
        "|---|---|---|---|---|",
    ]
    for line in report.lines:
        if line["stage"] == "loss":
            text.append(f"| {line['rows']:,} | {line['tf32']} | {line['name']} | {_figures([line])} |")
    text += [
        "",
        "A whole step in bf16, median of the rounds:",
        "",
        "| encoder | pairs | step | seconds | MiB |",
        "|---|---|---|---|---|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in report.lines:
        if line["stage"] == "step":
            groups.setdefault((line["encoder"], line["rows"], line["name"]), []).append(line)
    text += [f"| {size} | {rows:,} | {name} | {_figures(lines)} |" for (size, rows, name), lines in groups.items()]
    failed = [line for line in report.lines if line["stage"] == "failed"]
    text += ["", *(f"Failed: {line['part']}: {line['result']}" for line in failed)] if failed else []
    return "\n".join(text) + "\n"


def _figures(lines: list[dict[str, Any]]) -> str:
    done = [line for line in lines if line["result"] == "done"]
    if not done:
        return f"{lines[-1]['result']} | "
    memory = [line["mib"] for line in done if line["mib"] is not None]
    return f"{median(line['seconds'] for line in done):.4f} | {f'{max(memory):,.0f}' if memory else ''}"


def versions() -> dict[str, str]:
    """Of what is measured; empty where it is not installed."""
    found = {}
    for name in ("torch", "transformers", "sentence_transformers"):
        try:
            found[name] = importlib.import_module(name).__version__
        except Exception as error:  # an installation of its own may be broken
            found[name] = "" if isinstance(error, ImportError) else repr(error)[:100]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("OUT") or str(ROOT / "docs" / "benchmarks")
    parser.add_argument("--output", type=Path, default=Path(default), help="folder for gpu.jsonl and gpu.md")
    parser.add_argument("--seconds", type=float, default=430.0, help="no measurement begins that would end later")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = LARGE if device.type == "cuda" else TOY
    report = Report(args.output, device, args.seconds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, toy sizes"
    found = versions()
    report.add(stage="machine", device=name, anybatch=str(Path(anybatch.__file__ or "").parent), **found)
    parts: dict[str, Callable[[], None]] = {
        "exactness": lambda: exactness(report, sizes),
        "first step": lambda: steps(report, sizes, *sizes.steps[0]),
        "loss": lambda: loss_stage(report, sizes),
    }
    parts |= {f"step {number}": lambda of=of: steps(report, sizes, *of) for number, of in enumerate(sizes.steps[1:])}
    for part, run in parts.items():
        try:
            run()
        except Exception as error:  # what lies outside a measurement, such as making the encoder
            report.add(
                stage="failed", part=part, result=repr(error)[:300], where=traceback.format_exc().splitlines()[-8:]
            )
        gc.collect()
    machine = ", ".join([name, *(f"{key} {value}" for key, value in found.items() if value)])
    text = page(report, machine)
    (args.output / "gpu.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
