"""What each loss costs by itself, without an encoder: `python -m benchmarks.loss_cost`.

Time of the loss and its gradient on given embeddings, relative to InfoNCE in the same direction, interleaved, one
thread; and both directions in one run of the engine against two. Writes docs/benchmarks/loss_cost.md.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from anybatch.core.files import write_text
from anybatch.losses import InfoNCE
from anybatch.losses.registry import LossConfig, build_loss

NUM_ROWS = 100_000
CONFIGS: dict[str, dict[str, object]] = {
    "InfoNCE": {"name": "infonce"},
    "count-corrected": {"name": "count_corrected"},
    "cross-batch, 1,024 remembered": {"name": "cross_batch", "memory_size": 1024},
    "SogCLR": {"name": "sogclr"},
    "SCENT": {"name": "scent"},
    "FastCLIP v2": {"name": "fastclip", "version": "v2"},
    "FastCLIP v3": {"name": "fastclip"},
    "iSogCLR": {"name": "isogclr"},
    "TempNet": {"name": "tempnet"},
    "NUCLR": {"name": "nuclr"},
    "GloFND": {"name": "glofnd"},
    "EMC2": {"name": "emc2"},
}


class TwoRuns(nn.Module):
    """Both directions of InfoNCE as the mean of two losses, for comparison."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = InfoNCE(temperature=0.05)

    def forward(self, anchors: Tensor, candidates: Tensor, *, index: Tensor) -> Tensor:
        """See the class."""
        return (self.loss(anchors, candidates) + self.loss(candidates[: len(anchors)], anchors)) / 2


def measure(make: dict[str, nn.Module], batch: tuple[Tensor, Tensor, Tensor], repeats: int) -> dict[str, float]:
    """Median seconds of a call and its backward pass, by name."""
    anchors, candidates, index = batch

    def call(loss: nn.Module) -> None:
        loss(anchors, candidates, index=index).backward()

    times: dict[str, list[float]] = {name: [] for name in make}
    for repeat in range(repeats + 1):
        for name, loss in make.items():
            start = time.perf_counter()
            call(loss)
            if repeat:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/loss_cost.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, width = options.batch_size, options.dimensions
    batch = (
        torch.randn(rows, width, requires_grad=True),
        torch.randn(rows, width, requires_grad=True),
        torch.randperm(NUM_ROWS)[:rows],
    )

    def build(direction: str) -> Callable[[str], nn.Module]:
        def make(name: str) -> nn.Module:
            known = dict(CONFIGS[name])
            if name == "TempNet":
                known["dimensions"] = width
            return build_loss(LossConfig(**known, direction=direction), num_rows=NUM_ROWS)

        return make

    one = measure({name: build("one_way")(name) for name in CONFIGS}, batch, options.repeats)
    both = measure({**{name: build("both")(name) for name in CONFIGS}, "two runs": TwoRuns()}, batch, options.repeats)
    small = {"one run": InfoNCE(temperature=0.05, direction="both", tile_bytes=2**19)}
    tiled = measure(small, batch, options.repeats)  # pyright: ignore[reportArgumentType]
    lines = [
        "# What a loss costs by itself",
        "",
        f"Loss and gradient on given embeddings: {rows} pairs of {width} dimensions, float32, {NUM_ROWS:,} rows of "
        f"memory, one thread. Median of {options.repeats}, interleaved; the factor is to InfoNCE in the same column. "
        f"Made by `python -m benchmarks.loss_cost --batch-size {rows}` on a 2-core {platform.machine()} CPU, torch "
        f"{torch.__version__.split('+')[0]}. Next to an encoder all of this is small: compare with the seconds of its "
        "step.",
        "",
        "| loss | one way, ms | factor | both directions, ms | factor |",
        "|---|---|---|---|---|",
    ]
    for name in CONFIGS:
        lines.append(
            f"| {name} | {one[name] * 1e3:.0f} | {one[name] / one['InfoNCE']:.2f} | {both[name] * 1e3:.0f} | "
            f"{both[name] / both['InfoNCE']:.2f} |"
        )
    lines += [
        "",
        f"Both directions of InfoNCE in one run of the engine {both['InfoNCE'] * 1e3:.0f} ms (3 matrix products, one "
        f"tile), in many tiles {tiled['one run'] * 1e3:.0f} ms (4), as two runs {both['two runs'] * 1e3:.0f} ms (6).",
        "",
    ]
    write_text(options.output, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
