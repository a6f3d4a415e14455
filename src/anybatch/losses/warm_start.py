"""Fill a loss's memory from embeddings before (or during) training, because a moving average over few epochs has nothing to average.

Cost: encoding the data once (not done here), then n x m x D multiply-adds a direction, m = n or the sample; `exact_rows` says what a tile costs. With
W ranks each takes its share of the rows. docs/memory.md has measured figures.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.files import SEAL, digest_of, read_sealed, tensors_metadata, write_sealed
from anybatch.losses.base import ContrastiveLoss, SoftmaxLoss
from anybatch.losses.denominators import RunningDenominator
from anybatch.losses.exact_rows import Embeddings, Table, exact_rows, make_table, temperatures_of

BLOCK_ROWS = 4096  # rows a rank answers between two gathers
SAVE_SECONDS, SAVE_RATIO = (
    30.0,
    20.0,
)  # between two records of progress; or longer, so that writing them takes a twentieth of the time
FILL_ROWS = 2**22
DIGEST_ROWS = 2**14  # rows digested at a time


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What a warm start did.

    Attributes:
        num_rows: Rows filled, a direction.
        num_columns: Targets that each was scored against.
        standard_error: Root mean square over rows of the standard error of the log-denominator, estimated from the sample itself; 0 when every target was
            counted. A lower bound where a few close targets carry the mean and are mostly not in the sample. Of this rank's rows in this call: NaN if
            a finished file was only read.
        seconds: Wall time of this call.
    """

    num_rows: int
    num_columns: int
    standard_error: float
    seconds: float


def warm_start(
    loss: ContrastiveLoss,
    anchors: Embeddings,
    positives: Embeddings,
    *,
    anchor_id: np.ndarray | Tensor | None = None,
    positive_id: np.ndarray | Tensor | None = None,
    sample: int | None = None,
    seed: int = 0,
    file: str | Path | None = None,
    tile_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> WarmStart:
    """Replace every state of the loss's memory by the log-mean over the data set, at the loss's temperature of this moment.

        memory_i <- log mean_{j allowed} exp((s_ij - s_ip(i)) / tau)

    with tau the row's own where the loss learns one a row, in each direction that the memory has (direction 1: positives against anchors). Explicit negatives are not counted: they are not a sample of the data set.

    Args:
        loss: A loss with a running denominator.
        anchors: (n, D) array, memory map or tensor in row order, from the model as it is now. float32, or float64 for checks.
        positives: (n, D), row i the positive of row i.
        anchor_id, positive_id: (n,) int; equal for equal content, which is never a negative. Without them only the row's own positive is left out.
        sample: Score against this many targets drawn at random, the same for all rows, instead of all n. The error of a row's
            log-mean is about sqrt((x2 - 1) / sample), x2 the mean square over the squared mean of exp(logit); the result states it.
        seed: Of the sample.
        file: Progress, and at the end the result, are kept here: an interrupted call goes on from it, a finished one is only read.
        tile_bytes: Memory for scores; None for 8 MiB on a CPU (what its caches like), 256 MiB elsewhere.
        progress: Called with (rows done, rows in all), all directions together.

    Returns:
        What was done.

    Raises:
        AnybatchError: A loss without memory, embeddings that do not fit it, a file of other embeddings, temperatures or settings, one that cannot be
            written; on every rank, whichever found it.

    Cost: see the module; 4 bytes a row and direction on each rank while it works. With `file`, rank 0 reads all embeddings once more for their
        digest, about 1 GB a second. Collectives: two agreements, and one gather of the block's values a block, with `file` also an
        agreement; every rank needs all embeddings.
    """
    began = time.perf_counter()
    with distributed.agreed():
        memory = running_denominator_of(loss)
        device = memory.log_mean.device
        table = make_table(
            anchors,
            positives,
            anchor_id=anchor_id,
            positive_id=positive_id,
            normalize=loss.normalize,
            device=device,
        )
        num_rows, num_directions = len(anchors), len(memory.log_mean)
        if num_rows != memory.num_rows:
            raise AnybatchError(f"Got embeddings of {num_rows} rows; the memory was made for {memory.num_rows}.")
        columns = _draw(num_rows, sample, seed)
        # Only rank 0 reads and writes the file.
        identity = _identity(loss, table, num_directions, sample, seed) if file and distributed.rank() == 0 else ""
    values, done = _open(file, identity, num_directions, num_rows, device)
    errors: list[Tensor] = []
    saved, writing = time.perf_counter(), 0.0
    if progress is not None and done:
        progress(done, values.numel())
    for direction, start, stop in _blocks(num_rows, num_directions, done):
        side = table if direction == 0 else table.reversed()
        sizes = distributed.shares(stop - start)
        first = start + sum(sizes[: distributed.rank()])
        rows = slice(first, first + sizes[distributed.rank()])
        numbers = torch.arange(rows.start, rows.stop, device=device)
        temperature = temperatures_of(loss, table, rows, numbers, direction=direction)
        figures = exact_rows(
            side, rows, temperature=temperature, columns=columns, moments=columns is not None, tile_bytes=tile_bytes
        )
        answer = figures.log_mean
        values[direction, start:stop] = distributed.gather_rows(answer.float(), sizes)
        if columns is not None:
            errors.append(figures.standard_error(num_rows - 1))
        done = direction * num_rows + stop
        if file is not None:
            with distributed.alone() as chosen:
                late = time.perf_counter() - saved > max(SAVE_SECONDS, SAVE_RATIO * writing)
                if chosen and (late or done == values.numel()):
                    before = time.perf_counter()
                    tensors = {"log_mean": values.cpu(), "done": torch.tensor(done)}
                    write_sealed(file, save(tensors, {"identity": identity, "digest": SEAL}))
                    saved, writing = time.perf_counter(), time.perf_counter() - before
        if progress is not None:
            progress(done, values.numel())
    for direction in range(num_directions):
        _fill(memory, values[direction], direction, anchors.shape[1])
    return WarmStart(
        num_rows=num_rows,
        num_columns=num_rows if columns is None else len(columns),
        standard_error=0.0 if columns is None else _root_mean_square(errors),
        seconds=time.perf_counter() - began,
    )


def _root_mean_square(errors: list[Tensor]) -> float:
    return float(torch.cat(errors).square().mean().sqrt()) if errors else float("nan")


def running_denominator_of(loss: nn.Module) -> RunningDenominator:
    """The running denominator of a loss, if it holds the log-mean over all negatives.

    Raises:
        AnybatchError: It has none, or one that means something else: chains (EMC2), margins (NUCLR), dropped negatives (GloFND).
    """
    running = loss.running if isinstance(loss, SoftmaxLoss) else None
    if not isinstance(running, RunningDenominator):
        raise AnybatchError(
            f"{type(loss).__name__} has no memory of plain denominators; this is for losses that have one, such as SogCLR."
        )
    return running


def _fill(memory: RunningDenominator, values: Tensor, direction: int, dimensions: int) -> None:
    for start in range(0, len(values), FILL_ROWS):
        part = values[start : start + FILL_ROWS]
        rows = torch.arange(start, start + len(part), device=values.device)
        memory.fill(rows, torch.where(part.isneginf(), torch.nan, part), direction=direction, dimensions=dimensions)


def _draw(num_rows: int, sample: int | None, seed: int) -> np.ndarray | None:
    if sample is None or sample >= num_rows:
        return None
    if sample < 2:
        raise AnybatchError(f"sample is {sample}; expected at least 2 targets, or None for all.")
    return np.sort(np.random.default_rng(seed).choice(num_rows, sample, replace=False))


def _blocks(num_rows: int, num_directions: int, done: int) -> list[tuple[int, int, int]]:
    """(direction, first row, row after the last) of what is left to do."""
    height = BLOCK_ROWS * distributed.world_size()
    begin, inside = divmod(done, num_rows)
    return [
        (direction, start, min(start + height, num_rows))
        for direction in range(begin, num_directions)
        for start in range(inside if direction == begin else 0, num_rows, height)
    ]


def _identity(loss: ContrastiveLoss, table: Table, num_directions: int, sample: int | None, seed: int) -> str:
    """What made a file: settings, ids and embeddings, all of them, since each is scored against many others anyway."""
    ids = [b"" if ids is None else ids.cpu().numpy().tobytes() for ids in (table.query_id, table.target_id)]
    settings = [
        list(table.queries.shape),
        num_directions,
        _temperature_of(loss),
        loss.normalize,
        sample,
        seed,
    ]
    blocks = itertools.chain(_bytes_of(table.queries), _bytes_of(table.targets))
    return json.dumps({"settings": settings, "digest": digest_of(itertools.chain(ids, blocks))})


def _temperature_of(loss: ContrastiveLoss) -> float | str:
    """The temperature; where single examples have their own, a digest of all that it follows from."""
    if not loss.temperatures.per_row:
        return loss.temperature
    state = sorted(loss.temperatures.state_dict().items())
    tensors = ((name.encode(), *_bytes_of(values.reshape(-1))) for name, values in state if isinstance(values, Tensor))
    return digest_of([json.dumps(loss.temperatures.limits).encode(), *itertools.chain.from_iterable(tensors)])


def _bytes_of(side: Embeddings) -> Iterator[bytes]:
    for start in range(0, len(side), DIGEST_ROWS):
        part = side[start : start + DIGEST_ROWS]
        if isinstance(part, Tensor):  # on any device, of any dtype: not all of them are NumPy's
            part = part.detach().cpu().contiguous().view(torch.uint8).numpy()
        yield np.ascontiguousarray(part).tobytes()


def _open(
    file: str | Path | None, identity: str, num_directions: int, num_rows: int, device: torch.device
) -> tuple[Tensor, int]:
    """The values so far, and how many they are; rank 0 reads, all get them, or all refuse."""
    values, done = torch.full((num_directions, num_rows), torch.nan, device=device), 0
    if file is None:
        return values, done
    with distributed.alone() as chosen:
        if chosen and Path(file).exists():
            values, done = _read(Path(file), identity)
            values = values.to(device)
    if distributed.is_active():
        done = int(distributed.sum_over_ranks(torch.tensor(done, device=device)))
        values = distributed.sum_over_ranks(values if distributed.rank() == 0 else torch.zeros_like(values))
    return values, done


def _read(file: Path, identity: str) -> tuple[Tensor, int]:
    content = read_sealed(file, "Delete it to start over.")
    if tensors_metadata(content).get("identity") != identity:
        raise AnybatchError(
            f"{file} holds a warm start of other embeddings, another temperature or other settings. Delete it, or choose another file."
        )
    tensors = load(content)
    return tensors["log_mean"], int(tensors["done"])
