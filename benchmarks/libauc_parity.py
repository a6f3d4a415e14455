"""Gradients of LibAUC's contrastive losses beside ours, step by step on embeddings that stand still.

Usage: python -m benchmarks.libauc_parity --data FOLDER

FOLDER as for `benchmarks.global_loss`; LibAUC (`pip install libauc`, MIT) is not a dependency. Both losses see the same
batches in the same order and keep their own state. Where a line is not 1, the column `why` says which of the two does
what. The table goes to docs/benchmarks/libauc_parity.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anybatch.family import ISogCLR
from anybatch.family.temperatures import PerRowTemperature
from anybatch.insight import markdown_table
from anybatch.losses import SogCLR

FOLDER = Path("docs/benchmarks")
RHO, TEMPERATURE_RANGE, TEMPERATURE_LR = 0.3, (0.02, 0.7), 0.01


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pair of losses.

    Attributes:
        name: What is compared.
        views: "two views" (`GCLoss_v1`: each view against all others of both views) or "two modalities" (`GCLoss_v2`:
            each against the other side).
        learned: Temperatures of single examples (iSogCLR).
        shared: Two views: our state and temperature is one an image, as theirs in storage; False: one a view.
        gamma: Weight of the new batch.
        why: What explains a difference.
    """

    name: str
    views: bool
    learned: bool = False
    shared: bool = True
    gamma: float = 0.9
    why: str = ""


OWN_VIEW = "theirs weighs a view by its own new average and stores the mean of both, which is a state an image"
MOVED = "theirs uses a state as it is at a temperature that has moved"
CASES = (
    Case(name="SogCLR, two views, gamma 1", views=True, shared=False, gamma=1.0),
    Case(name="SogCLR, two views, state a view", views=True, shared=False, why=OWN_VIEW),
    Case(name="SogCLR, two views, state an image", views=True),
    Case(name="SogCLR, two views, state an image, gamma .2", views=True, gamma=0.2),
    Case(name="iSogCLR, two views", views=True, learned=True, why=MOVED),
    Case(name="SogCLR, two modalities", views=False),
    Case(name="SogCLR, two modalities, gamma .2", views=False, gamma=0.2),
    Case(name="iSogCLR, two modalities", views=False, learned=True),
)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Over the steps of an epoch: the least and the mean cosine of the two gradients, and theirs over ours in length.

    `temperature` is the mean absolute difference of the learned temperatures after it; NaN where none is learned.
    """

    least: float
    cosine: float
    scale: float
    temperature: float


def compare(
    case: Case, anchors: Tensor, positives: Tensor, *, batch_size: int, epochs: int, temperature: float, seed: int = 0
) -> list[Epoch]:
    """Both losses over the same batches.

    Args:
        case: Which.
        anchors, positives: (n, D) float, unit rows.
        batch_size: Rows a batch; the last rows of an epoch's order are left out. Where there are any, LibAUC gives a
            row that comes first after epoch 0
            gamma times its batch's value, not the whole.
        epochs: Times through the rows.
        temperature: Of both, at first.
        seed: Of the order.

    Cost: two losses a step.
    """
    num_rows, generator = len(anchors), torch.Generator().manual_seed(seed)
    theirs, ours = _theirs(case, num_rows, temperature), _ours(case, num_rows, temperature)
    lines = []
    for epoch in range(epochs):
        with contextlib.redirect_stdout(io.StringIO()):
            theirs.adjust_gamma(epoch)
        cosines, scales = [], []
        order = torch.randperm(num_rows, generator=generator)
        for index in order[: num_rows // batch_size * batch_size].split(batch_size):
            gradients = [_gradient(step, anchors[index], positives[index], index) for step in (theirs, ours)]
            cosines.append(float(nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0)))
            scales.append(float(gradients[0].norm() / gradients[1].norm()))
        lines.append(
            Epoch(
                least=min(cosines),
                cosine=float(np.mean(cosines)),
                scale=float(np.mean(scales)),
                temperature=_temperature_gap(case, theirs, ours),
            )
        )
    return lines


def expected_scale(case: Case, batch_size: int, temperature: float) -> float:
    """Theirs over ours, from the definitions.

    Two views: the sum of the two, where ours is the mean (2). Two modalities: not divided by the B - 1 negatives.
    SogCLR: tau times the log, where ours is the log; iSogCLR carries tau in both.
    """
    factor = 2.0 if case.views else batch_size - 1.0
    return factor if case.learned else factor * temperature


def _gradient(loss: Callable[[Tensor, Tensor, Tensor], Tensor], a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    loss(nn.functional.normalize(leaves[0], dim=1), nn.functional.normalize(leaves[1], dim=1), index).backward()
    return torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None])


class _Ours:
    """Our loss in the calling convention of theirs."""

    def __init__(self, loss: nn.Module, case: Case, num_rows: int) -> None:
        self.loss, self.case, self.num_rows = loss, case, num_rows

    def __call__(self, a: Tensor, b: Tensor, index: Tensor) -> Tensor:
        if not self.case.views:
            return self.loss(a, b, index=index)
        # 2B anchors, each against the other view of all and its own view of all others: ids take out the image itself.
        image = torch.cat([index, index])
        rows = image if self.case.shared else torch.cat([index, index + self.num_rows])
        sides = torch.cat([a, b]), torch.cat([b, a])
        return self.loss(*sides, index=rows, anchor_id=image, candidate_id=image)


def _ours(case: Case, num_rows: int, temperature: float) -> _Ours:
    rows = 2 * num_rows if case.views and not case.shared else num_rows
    arguments: dict[str, Any] = {
        "gamma": case.gamma,
        "eps": 0.0,
        "temperature": temperature,
        "direction": "one_way" if case.views else "both",
        "state": "absolute" if case.views else "relative",
    }
    if not case.learned:
        return _Ours(SogCLR(rows, **arguments), case, num_rows)
    loss = ISogCLR(
        rows,
        rho=RHO,
        temperature_range=TEMPERATURE_RANGE,
        temperature_lr=TEMPERATURE_LR,
        temperature_momentum=0.1,
        temperature_clip=1e9,  # theirs has none
        **arguments,
    )
    return _Ours(loss, case, num_rows)


def _theirs(case: Case, num_rows: int, temperature: float) -> Any:
    from libauc.losses.contrastive import GCLoss_v1, GCLoss_v2  # pyright: ignore[reportMissingImports]

    arguments: dict[str, Any] = {"N": num_rows, "tau": temperature, "gamma": case.gamma, "enable_isogclr": case.learned}
    arguments |= {"rho": RHO, "eta": TEMPERATURE_LR, "beta": 0.9}
    arguments |= dict(zip(("tau_min", "tau_max"), TEMPERATURE_RANGE, strict=True))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its gamma
        if case.views:
            return GCLoss_v1(device=torch.device("cpu"), **arguments)
        loss = GCLoss_v2(**arguments)

    class Bimodal:
        """Only the value, without the temperatures beside it."""

        inner = loss
        adjust_gamma = staticmethod(loss.adjust_gamma)

        def __call__(self, a: Tensor, b: Tensor, index: Tensor) -> Tensor:
            return loss(a, b, index)[0]

    return Bimodal()


def _temperature_gap(case: Case, theirs: Any, ours: _Ours) -> float:
    if not case.learned:
        return float("nan")
    assert isinstance(ours.loss, ISogCLR)
    assert isinstance(ours.loss.temperatures, PerRowTemperature)
    values = ours.loss.temperatures.rows.values  # (directions, n)
    if case.views:
        return float((values[0] - theirs.learnable_tau.detach()[:, 0]).abs().mean())
    both = torch.stack([theirs.inner.learnable_tau_img[:, 0], theirs.inner.learnable_tau_txt[:, 0]])
    return float((values - both).abs().mean())


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2_048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=FOLDER / "libauc_parity.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sides = [
        np.array(np.load(next(iter(sorted(options.data.glob(f"*{side}.npy")))), mmap_mode="r")[: options.rows])
        for side in ("anchor", "positive")
    ]
    anchors, positives = (nn.functional.normalize(torch.from_numpy(side).float(), dim=1) for side in sides)
    rows = []
    for case in CASES:
        lines = compare(
            case,
            anchors,
            positives,
            batch_size=options.batch_size,
            epochs=options.epochs,
            temperature=options.temperature,
        )
        first, last = lines[0], lines[-1]
        gap = "" if np.isnan(last.temperature) else f"{last.temperature:.1e}"
        expected = expected_scale(case, options.batch_size, options.temperature)
        figures = [
            f"{1 - first.least:.1e}",
            f"{1 - last.least:.1e}",
            f"{last.cosine:.4f}",
            f"{last.scale:.4g}",
            f"{expected:.4g}",
        ]
        rows.append([case.name, *figures, gap, case.why])
        print(" | ".join(rows[-1][:-1]), flush=True)
    text = (
        f"# Parity with LibAUC\n\n`python -m benchmarks.libauc_parity --data FOLDER` with LibAUC {version('libauc')}: "
        f"{options.rows:,} pairs of arxiv-title-abstract embedded by all-MiniLM-L6-v2, standing still; batches of "
        f"{options.batch_size}, {options.epochs} epochs, gamma .9 where no other is named, first temperature "
        f"{options.temperature:g}. The gradient of all embeddings of a step, theirs against ours; both keep their own "
        "state.\n\n"
        "Two views is `GCLoss_v1`, two modalities `GCLoss_v2`. 1 - cosine is the largest of an epoch's steps; scale is "
        "theirs over ours in length, beside what follows from the definitions: tau times the log where ours is the log "
        "(SogCLR), the sum of two views where ours is the mean, and in `GCLoss_v2` not divided by the B - 1 negatives. "
        "The last number is how far learned temperatures are apart. `GCLoss_v1` with iSogCLR does not detach the step "
        "of its temperatures, so its table keeps the autograd graph of every step so far; neither does it save any "
        "state (`state_dict()` is empty in both).\n\n"
    )
    header = ["case", "1 - cosine, epoch 1", "last epoch", "mean cosine", "scale", "expected", "temperatures", "why"]
    options.out.write_text(text + markdown_table(header, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
