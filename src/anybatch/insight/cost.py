"""What a training step costs here: a few real steps are taken, of as many rows as the time allows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from anybatch.caching.device_memory import parse_memory, total_memory
from anybatch.caching.state import untouched
from anybatch.core.resources import Measure
from anybatch.data.pairs import PairData
from anybatch.run.config import RunConfig
from anybatch.run.try_step import TRIED_ROWS, precision_of, step_of, telling_rows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

STEPS = 3  # timed at most; their median counts


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What `step_cost` measured.

    Attributes:
        rows: Of the steps that were taken; fewer than the batch where time was short.
        seconds_per_row: Of a step, the tokenising of its rows included.
        peak_bytes: In use at most in a step of the whole batch: on a CPU by this process, on a GPU by its tensors.
        total_bytes: What the device has.
    """

    rows: int
    seconds_per_row: float
    peak_bytes: int
    total_bytes: int


def step_cost(config: RunConfig, pairs: PairData, model: SentenceTransformer, *, seconds: float) -> StepCost:
    """Take a few training steps on random rows, with the state of an optimiser that changes nothing.

    Args:
        config, pairs, model: Of the run, its recipe settled; the model is left as it is.
        seconds: To spend, about. Where a batch would take too long, steps are taken on a half of it, a quarter and so
            on.
    """
    device, random = model.device, np.random.default_rng(config.seed)
    batch_size = config.batch_size
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    begun = time.perf_counter()

    def left() -> float:
        return seconds - (time.perf_counter() - begun)

    with untouched([model]):
        step = step_of(config, pairs, model)

        def timed(rows: np.ndarray) -> float:
            start = time.perf_counter()
            with precision_of(config, device):
                step(rows)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - start

        def steps(size: int, most: int) -> tuple[list[float], int]:
            """Seconds per row of up to `most` steps while there is time, and the memory at their peak."""
            times = []
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with Measure() as measure:
                while not times or (len(times) < most and times[-1] * size < left()):
                    times.append(timed(np.sort(random.choice(len(pairs), size, replace=False))) / size)
            on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else measure.peak_bytes
            return times, on_device

        # 1. The first steps load and compile; then a small one says how many rows there is time for.
        for rows in telling_rows(model, pairs, 2 * TRIED_ROWS):
            timed(rows)
        size = small = min(2 * TRIED_ROWS, batch_size)
        (taken,), small_peak = steps(small, 1)
        while size < batch_size and 2 * size * taken < left():
            size = min(2 * size, batch_size)
        # 2. The step itself. More rows keep more graphs, as far as the budget goes.
        times, peak = steps(size, STEPS)
    total = total_memory(device)
    if small < size < batch_size and config.train.keep_graphs != 0:
        more = max(0, peak - small_peak) * (batch_size - size) // (size - small)
        peak = max(peak, min(peak + more, parse_memory(config.train.memory, total)))
    return StepCost(rows=size, seconds_per_row=float(np.median(times)), peak_bytes=peak, total_bytes=total)
