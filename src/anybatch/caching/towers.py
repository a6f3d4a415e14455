"""Record all towers of a step: their micro-batches planned, their graphs kept out of one budget."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from anybatch.caching.forward import Encoder
from anybatch.caching.modules import modules_of
from anybatch.caching.recording import Recording
from anybatch.caching.replay import record
from anybatch.caching.row_check import settle_trimming
from anybatch.caching.rows import RowSlicer
from anybatch.caching.schedule import check_limits, plan_micro_batches
from anybatch.caching.step_memory import StepMemory
from anybatch.core.errors import AnybatchError

Auto = Literal["auto"]


def record_towers(
    encoders: Sequence[Encoder],
    inputs: Sequence[Any],
    *,
    micro_batch: int | Auto | None = 32,
    max_tokens: int | None = None,
    keep_graphs: int | float | Auto = 0,
    memory: str | int | StepMemory = "80%",
    sort_by_length: bool = True,
    pad_to_multiple: int | None = None,
    modules: Sequence[nn.Module] | None = None,
) -> list[Recording]:
    """One recording a tower, of one step.

    Args:
        encoders: One for each tower.
        inputs: One batch a tower.
        micro_batch, max_tokens, keep_graphs, memory, sort_by_length, pad_to_multiple, modules: See `cached_step`.

    Raises:
        AnybatchError: What `check_limits`, `plan_micro_batches` and `record` refuse.
    """
    check_limits(
        micro_batch=micro_batch, max_tokens=max_tokens, keep_graphs=keep_graphs, pad_to_multiple=pad_to_multiple
    )
    step_memory = memory if isinstance(memory, StepMemory) else StepMemory(memory)
    held = list(modules) if modules is not None else list(dict.fromkeys(m for e in encoders for m in modules_of(e)))
    slicers = [RowSlicer(batch, pad_to_multiple=pad_to_multiple) for batch in inputs]
    num_rows = sum(slicer.num_rows for slicer in slicers)
    keep = step_memory.next_step(held, inputs, num_rows=num_rows) if keep_graphs == "auto" else keep_graphs
    recordings: list[Recording] = []
    for encode, slicer in zip(encoders, slicers, strict=True):
        settle_trimming(encode, slicer, held)
        rows, tokens = micro_batch, max_tokens
        if micro_batch == "auto":
            rows, tokens = _found(step_memory.max_tokens(encode, slicer, held, num_rows=num_rows), max_tokens, slicer)
        elif slicer.lengths is None:
            rows = _least(rows, step_memory.learned_samples)
        else:
            tokens = _least(tokens, step_memory.learned)
        plan = plan_micro_batches(slicer, micro_batch=rows, max_tokens=tokens, sort_by_length=sort_by_length)  # type: ignore[arg-type]
        recordings.append(
            record(
                encode,
                slicer,
                micro_batches=plan,
                keep_graphs=keep,  # type: ignore[arg-type]
                modules=modules,
                on_split=partial(step_memory.note_split, samples=slicer.lengths is None),
            )
        )
    return recordings


def paired_encoders(encoders: Encoder | Sequence[Encoder], inputs: Sequence[Any]) -> list[Encoder]:
    """One encoder for each tower: the only one given for all, or as many as there are towers.

    Raises:
        AnybatchError: Neither.
    """
    if callable(encoders) and not isinstance(encoders, nn.ModuleList):
        towers: list[Encoder] = [encoders] * len(inputs)
    else:
        towers = [*encoders]
    if len(towers) != len(inputs) or not towers:
        raise AnybatchError(
            f"{len(towers)} encoders for {len(inputs)} towers; give one input batch a tower, and one encoder for all "
            "or one for each."
        )
    return towers


def _found(tokens: int, most: int | None, slicer: RowSlicer) -> tuple[int | None, int | None]:
    """`micro_batch` and `max_tokens` from the probe's tokens and the caller's own limit."""
    if slicer.lengths is None:
        return tokens, None
    return None, _least(tokens, most)


def _least(*limits: Any) -> int | None:
    """The smallest of the limits that are set."""
    return min((limit for limit in limits if limit is not None), default=None)
