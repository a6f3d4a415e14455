"""Is this checkout slower than another one: `python -m benchmarks.against CHECKOUT`, such as a `git worktree` of the
commit before.

One process for each checkout, asked in turn for the same piece of work, round after round, so that both meet the same
machine. Processor seconds; the ratio of a round is this checkout's over the other's, of which the median and the middle
half are printed. Exit code 1 where a median is above --limit. Some 3 minutes on one idle core.
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
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).parent.parent
REPEATS = {"loss, 256 rows": 20, "loss both ways, 256 rows": 20}  # for what takes milliseconds
CASES = (
    *("cached step", "cached step, graphs kept", "cached step, dropout", "cached step, auto"),
    *("loss, 4,096 rows", "loss both ways, 4,096 rows", *REPEATS),
    *("count-corrected, 4,096 rows", "SogCLR, 4,096 rows", "cross-batch, 1,024 rows"),
    "mining, 4,096 rows",
)


def make_cases() -> dict[str, Callable[[], Any]]:
    """By name, in the process of one checkout."""
    import torch
    from transformers import BertConfig, BertModel

    from anybatch.caching import StepMemory, cached_step
    from anybatch.losses import CountCorrectedInfoNCE, CrossBatchInfoNCE, InfoNCE, SogCLR
    from anybatch.mining import MiningConfig, mine_plan

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    def encoder(dropout: float) -> Callable[[Any], Any]:
        config = BertConfig(
            vocab_size=1000, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        model = BertModel(config, add_pooling_layer=False).train()

        def encode(batch: Any) -> Any:  # padding has no effect, as with any usual pooling
            mask = batch["attention_mask"][..., None].float()
            return (model(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)

        return encode

    def texts(rows: int, width: int) -> dict[str, Any]:
        lengths = torch.randint(1, width + 1, (rows,), generator=generator)
        mask = (torch.arange(width) < lengths[:, None]).long()
        return {"input_ids": torch.randint(1, 1000, (rows, width), generator=generator) * mask, "attention_mask": mask}

    batch, plain, dropout, memory = [texts(96, 16), texts(96, 48)], encoder(0.0), encoder(0.1), StepMemory("80%")
    loss = InfoNCE(temperature=0.05)

    def step(encode: Any, **options: Any) -> Callable[[], Any]:
        return lambda: cached_step(loss, encode, batch, **options)

    def alone(loss: Any, rows: int, **arguments: Any) -> Callable[[], Any]:
        sides = [torch.randn(rows, 384, generator=generator) for _ in range(2)]
        return lambda: loss(*(side.detach().requires_grad_() for side in sides), **arguments).backward()

    index = torch.arange(4096)
    topics = torch.randn(400, 64, generator=generator)[torch.arange(4096) % 400]
    anchors, positives = ((topics + torch.randn(4096, 64, generator=generator)).numpy() for _ in range(2))
    return {
        "cached step": step(plain, mini_batch_size=16),
        "cached step, graphs kept": step(plain, mini_batch_size=16, keep_graphs=1.0),
        "cached step, dropout": step(dropout, mini_batch_size=16),
        "cached step, auto": step(plain, mini_batch_size="auto", keep_graphs="auto", memory=memory),
        "loss, 4,096 rows": alone(loss, 4096),
        "loss both ways, 4,096 rows": alone(InfoNCE(temperature=0.05, direction="both"), 4096),
        "loss, 256 rows": alone(loss, 256),
        "loss both ways, 256 rows": alone(InfoNCE(temperature=0.05, direction="both"), 256),
        "count-corrected, 4,096 rows": alone(CountCorrectedInfoNCE(10_000), 4096),
        "SogCLR, 4,096 rows": alone(SogCLR(10_000), 4096, index=index),
        "cross-batch, 1,024 rows": alone(CrossBatchInfoNCE(10_000, memory_size=1024), 1024, index=index[:1024]),
        "mining, 4,096 rows": lambda: mine_plan(anchors, positives, config=MiningConfig()),
    }


def answer() -> None:
    """The child: a line with a case's name in, a line with its processor seconds out."""
    import torch

    import anybatch

    torch.set_num_threads(1)
    cases = make_cases()
    print(json.dumps(str(Path(anybatch.__file__ or "").parent)), flush=True)
    for line in sys.stdin:
        name = line.rstrip("\n")
        start = time.process_time()
        for _ in range(REPEATS.get(name, 1)):
            cases[name]()
        print(json.dumps(time.process_time() - start), flush=True)


class Checkout:
    """A process that imports one checkout."""

    def __init__(self, root: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child"],
            env=environment, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        found = Path(self._read())
        if found != (root / "src" / "anybatch").resolve():
            raise SystemExit(f"{found} was imported; expected the checkout at {root}.")

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("A child ended; its words are above.")
        return json.loads(line)

    def seconds(self, name: str) -> float:
        """Of one run of a case."""
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def compare(here: Checkout, there: Checkout, names: tuple[str, ...], rounds: int) -> dict[str, list[float]]:
    """By case, the ratio of every round."""
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        for name in names:
            order = (here, there) if round_ % 2 else (there, here)
            taken = {checkout: checkout.seconds(name) for checkout in order}
            if round_:  # the first warms up
                ratios[name].append(taken[here] / taken[there])
    return ratios


def main() -> None:
    """Compare, print."""
    if sys.argv[1:] == ["--child"]:
        answer()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the other one")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--limit", type=float, default=1.03, help="of a median ratio")
    args = parser.parse_args()
    here, there = Checkout(ROOT.resolve()), Checkout(args.checkout.resolve())
    ratios = compare(here, there, tuple(name for name in CASES if args.only in name), args.rounds)
    for checkout in (here, there):
        checkout.close()
    print("| work | this checkout over the other, median (middle half) |\n|---|---|")
    for name, values in ratios.items():
        low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
        print(f"| {name} | {median(values):.3f} ({low:.3f} - {high:.3f}) |")
    raise SystemExit(max(median(values) for values in ratios.values()) > args.limit)


if __name__ == "__main__":
    main()
