"""How far the cached step is from the plain step: `python -m benchmarks.exactness`, under a minute on two cores.

Every case runs two steps on uneven text batches through a two-layer BERT with random weights. The reference is the
plain step (each tower whole, one graph, one process) in float64. Writes docs/benchmarks/exactness.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anybatch.caching import RowSlicer, cached_step, plan_mini_batches
from anybatch.core.files import write_text
from anybatch.losses import CountCorrectedInfoNCE, DecoupledInfoNCE, InfoNCE, SogCLR

SHARES = {1: [13], 2: [8, 5], 3: [5, 2, 6]}
NUM_ROWS = 40  # rows of the data set that the memory belongs to
STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table."""

    name: str
    make_loss: Callable[[], nn.Module] = lambda: InfoNCE(temperature=0.1)
    towers: int = 2
    tied: bool = True
    frozen: int | None = None
    lora: bool = False
    dropout: float = 0.0
    ids: bool = False
    options: dict[str, Any] = field(default_factory=lambda: {"mini_batch_size": 4})
    ranks: tuple[int, ...] = (1, 2, 3)


def plain_torch_loss() -> nn.Module:
    """A loss that knows nothing of this library."""
    return _CosineHinge()


CASES = (
    Case(name="tied towers, InfoNCE"),
    Case(name="untied towers, both directions", tied=False, make_loss=lambda: InfoNCE(direction="both")),
    Case(name="frozen anchors", tied=False, frozen=0),
    Case(name="frozen candidates", tied=False, frozen=1),
    Case(name="LoRA (peft)", lora=True),
    Case(name="three towers (one hard negative)", towers=3),
    Case(name="four towers, untied", towers=4, tied=False),
    Case(name="learned temperature", make_loss=lambda: InfoNCE(learnable_temperature=True)),
    Case(name="duplicates masked by id", ids=True),
    Case(name="decoupled", make_loss=lambda: DecoupledInfoNCE(temperature=0.1)),
    Case(name="count-corrected", make_loss=lambda: CountCorrectedInfoNCE(NUM_ROWS, temperature=0.1)),
    Case(name="SogCLR, both directions", make_loss=lambda: SogCLR(NUM_ROWS, gamma=0.4, direction="both")),
    Case(name="half of the graphs kept", options={"mini_batch_size": 4, "keep_graphs": 0.5}),
    Case(name="all graphs kept", options={"mini_batch_size": 4, "keep_graphs": 1.0}),
    Case(name="token budget", options={"mini_batch_size": None, "max_tokens": 40}),
    Case(name="not sorted by length", options={"mini_batch_size": 4, "sort_by_length": False}),
    Case(name="one row at a time", options={"mini_batch_size": 1}),
    Case(name="loss in plain torch", make_loss=plain_torch_loss, ranks=(1,)),
    Case(name="dropout 0.1", dropout=0.1, ranks=(1,)),
    Case(
        name="dropout 0.1, half kept, untied",
        dropout=0.1,
        tied=False,
        options={"mini_batch_size": 4, "keep_graphs": 0.5},
        ranks=(1,),
    ),
)


class _CosineHinge(nn.Module):
    def forward(self, anchors: Tensor, candidates: Tensor) -> Tensor:
        scores = nn.functional.normalize(anchors) @ nn.functional.normalize(candidates).T
        return (scores - scores.diagonal()[:, None] + 0.5).relu().mean()


class Encoder(nn.Module):
    """Mean-pooled BERT of two layers, width 32, random weights."""

    def __init__(self, *, seed: int, dropout: float, lora: bool) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, max_position_embeddings=64,
        )  # fmt: skip
        self.bert: Any = BertModel(config, add_pooling_layer=False)
        if lora:
            from peft import LoraConfig, get_peft_model

            self.bert = get_peft_model(self.bert, LoraConfig(r=4, target_modules=["query", "value"]))
            for name, parameter in self.bert.named_parameters():
                if "lora_B" in name:  # zero at the start, which would make half of the gradients zero
                    nn.init.normal_(parameter, std=0.1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeddings (b, 32) of a padded batch."""
        hidden = self.bert(**batch).last_hidden_state
        weight = batch["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)


def texts(step: int, tower: int) -> dict[str, Tensor]:
    """A padded batch of 13 rows, 1 to 10 * (tower + 1) tokens long."""
    generator = torch.Generator().manual_seed(100 * step + tower)
    rows, width = sum(SHARES[1]), 10 * (tower + 1)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0] = width
    mask = (torch.arange(width) < lengths[:, None]).long()
    return {"input_ids": torch.randint(1, 200, (rows, width), generator=generator) * mask, "attention_mask": mask}


def build(case: Case, dtype: torch.dtype) -> tuple[list[nn.Module], nn.Module]:
    """The encoders of the towers and the loss: the same float32 weights, then cast."""
    encoders = [Encoder(seed=0 if case.tied else k, dropout=case.dropout, lora=case.lora) for k in range(case.towers)]
    if case.tied:
        encoders = [encoders[0]] * case.towers
    if case.frozen is not None:
        encoders[case.frozen].requires_grad_(False)
    return [encoder.to(dtype).train() for encoder in encoders], case.make_loss().to(dtype).train()


def loss_arguments(case: Case, step: int, rows: slice) -> dict[str, Tensor]:
    """Row numbers (one occurs twice) for a memory, ids where the case has duplicates."""
    count = sum(SHARES[1])
    arguments: dict[str, Tensor] = {}
    if isinstance(case.make_loss(), SogCLR):
        index = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(step))[:count]
        index[3] = index[9]
        arguments["index"] = index[rows]
    if case.ids:
        anchor_id, candidate_id = torch.arange(count), torch.arange(count)
        anchor_id[4], candidate_id[7] = anchor_id[10], candidate_id[2]
        arguments.update(anchor_id=anchor_id[rows], candidate_id=candidate_id[rows])
    return arguments


def outcome(encoders: Sequence[nn.Module], loss: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Gradients and memory, by name."""
    grads = {}
    for number, module in enumerate([*dict.fromkeys(encoders), loss]):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                grads[f"{number}.{name}"] = parameter.grad.clone()
    memory = {name: value.clone() for name, value in loss.named_buffers() if value.is_floating_point()}
    return {"gradient": grads, "memory": memory}


def run_plain(case: Case, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """The reference; with dropout, one graph over the same mini-batches, so that the masks have the same shapes."""
    encoders, loss = build(case, dtype)
    torch.manual_seed(9)
    for step in range(STEPS):
        for module in (*encoders, loss):
            module.zero_grad()
        outputs = []
        for tower, encoder in enumerate(encoders):
            slicer = RowSlicer(texts(step, tower))
            if case.dropout:
                plan = plan_mini_batches(slicer, mini_batch_size=case.options["mini_batch_size"])
                parts = torch.cat([encoder(slicer.take(rows)) for rows in plan])
                outputs.append(parts[torch.argsort(torch.cat(plan))])
            else:
                outputs.append(encoder(slicer.inputs))
        loss(outputs[0], torch.cat(outputs[1:]), **loss_arguments(case, step, slice(None))).backward()
    return outcome(encoders, loss)


def run_cached(case: Case, dtype: torch.dtype, rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    """This rank's share by cached steps, under DistributedDataParallel where there are several ranks."""
    encoders, loss = build(case, dtype)
    start = sum(SHARES[world][:rank])
    rows = slice(start, start + SHARES[world][rank])
    called: list[nn.Module] = list(encoders)
    if world > 1:
        trained = [encoder for encoder in dict.fromkeys(encoders) if any(p.requires_grad for p in encoder.parameters())]
        wrapped = {encoder: DistributedDataParallel(encoder) for encoder in trained}
        called = [wrapped.get(encoder, encoder) for encoder in encoders]
    torch.manual_seed(9)
    for step in range(STEPS):
        for module in (*encoders, loss):
            module.zero_grad()
        inputs = [{key: value[rows] for key, value in texts(step, tower).items()} for tower in range(case.towers)]
        cached_step(loss, called, inputs, loss_kwargs=loss_arguments(case, step, rows), **case.options)
    return outcome(encoders, loss)


def on_rank(rank: int, world: int, folder: str) -> None:
    """All cases on one of several gloo ranks."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    results = {
        (case.name, str(dtype)): run_cached(case, dtype, rank, world)
        for case in CASES
        if world in case.ranks
        for dtype in (torch.float64, torch.float32)
    }
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def relative_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of the reference, over all tensors; infinite if one is missing."""
    if got.keys() != wanted.keys():
        return float("inf")
    # A memory marks rows never visited by NaN; they must be the same rows.
    pairs = [(got[name].double().nan_to_num(7.0), wanted[name].double().nan_to_num(7.0)) for name in wanted]
    top = sum(float((a - b).square().sum()) for a, b in pairs)
    bottom = sum(float(b.square().sum()) for _, b in pairs)
    return (top / bottom) ** 0.5


def measure() -> dict[tuple[str, str, str, int], float]:
    """Relative errors by (case, what, dtype or "plain", ranks)."""
    errors: dict[tuple[str, str, str, int], float] = {}
    wanted = {case.name: run_plain(case, torch.float64) for case in CASES}

    def note(case: Case, how: str, ranks: int, got: dict[str, dict[str, Tensor]]) -> None:
        for what, reference in wanted[case.name].items():
            if reference:
                key = (case.name, what, how, ranks)
                errors[key] = max(errors.get(key, 0.0), relative_error(got[what], reference))

    for case in CASES:
        note(case, "plain", 1, run_plain(case, torch.float32))
        for dtype in (torch.float64, torch.float32):
            note(case, str(dtype), 1, run_cached(case, dtype, 0, 1))
    for world in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(on_rank, args=(world, folder), nprocs=world)
            for rank in range(world):
                results = torch.load(os.path.join(folder, f"{rank}.pt"))
                for case in CASES:
                    for dtype in (torch.float64, torch.float32):
                        if world in case.ranks:
                            note(case, str(dtype), world, results[case.name, str(dtype)])
    return errors


def page(errors: dict[tuple[str, str, str, int], float]) -> str:
    """The table as Markdown."""
    columns = [("torch.float64", 1), ("torch.float64", 2), ("torch.float64", 3)]
    columns += [("plain", 1), ("torch.float32", 1), ("torch.float32", 2), ("torch.float32", 3)]
    worst = max(error for (_, _, how, _), error in errors.items() if how == "torch.float64")
    lines = [
        "# Exactness of the cached step",
        "",
        f"Relative error of all gradients together, `|cached - plain| / |plain|`, in the last of {STEPS} steps.",
        "The reference is the plain step in float64 (each tower whole, one graph, one process). Ranks hold uneven",
        "shares (8 + 5 and 5 + 2 + 6 of 13 rows) under DistributedDataParallel; the worst rank counts. The column",
        "*float32 plain* is what float32 itself costs without caching. With dropout the reference is one graph over",
        "the same mini-batches, because a mask has the shape of what goes through together; one rank.",
        "",
        f"Largest float64 error: **{worst:.1e}**. Made by `python -m benchmarks.exactness` on a "
        f"{os.cpu_count()}-core {platform.machine().replace('_64', '')} CPU, torch {torch.__version__.split('+')[0]}.",
        "",
        "| case | float64, 1 rank | 2 ranks | 3 ranks | float32 plain | float32 cached, 1 rank | 2 ranks | 3 ranks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        for what in ("gradient", "memory"):
            if (case.name, what, "plain", 1) in errors:
                cells = [errors.get((case.name, what, how, ranks)) for how, ranks in columns]
                shown = ["" if cell is None else f"{cell:.1e}" for cell in cells]
                label = case.name if what == "gradient" else f"{case.name}: memory"
                lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/exactness.md"))
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    text = page(measure())
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)


if __name__ == "__main__":
    main()
