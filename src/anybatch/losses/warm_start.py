"""The running denominators of a loss, and the exact ones: filled in before training, compared with them during it.

A moving average over few epochs has little to average, so `warm_start` computes every row's. `memory_figures` says how
far they are from the exact ones later on, and what the objective over the data set is, which no value of a batch says.

Cost: encoding the data once (not done here), then n x n x D multiply-adds a direction. With W ranks each takes
its share of the rows. docs/memory.md has measured figures.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.files import SEAL, digest_of, read_sealed, tensors_metadata, write_sealed
from anybatch.losses.base import ContrastiveLoss
from anybatch.losses.denominators import RunningDenominator
from anybatch.losses.exact_rows import Embeddings, Ids, Table, exact_rows_of, make_table

BLOCK_ROWS = 4096  # rows a rank answers between two gathers
SAVE_SECONDS, SAVE_RATIO = (
    30.0,
    20.0,
)  # between two records of progress: at least so long, and so many times their writing
FILL_ROWS = 2**22
DIGEST_ROWS = 2**14  # rows digested at a time


def running_denominator_of(loss: nn.Module) -> RunningDenominator:
    """The running denominator of a loss, if it holds the log-mean over all negatives.

    Raises:
        AnybatchError: It has none, or one that means something else: chains (EMC2), margins (NUCLR), dropped negatives
            (GloFND).
    """
    running = loss.running if isinstance(loss, ContrastiveLoss) else None
    if not isinstance(running, RunningDenominator):
        raise AnybatchError(
            f"{type(loss).__name__} has no memory of plain denominators; this is for losses that have one, such as "
            "SogCLR."
        )
    return running


def warm_start(
    loss: ContrastiveLoss,
    anchors: Embeddings,
    positives: Embeddings,
    *,
    anchor_id: Ids = None,
    positive_id: Ids = None,
    file: str | Path | None = None,
    tile_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Replace every running denominator of the loss by the log-mean over the data set, at the present temperature.

        log u_i <- log mean_{j allowed} exp(s_ij / tau_i)      a relative state: of exp((s_ij - s_ip(i)) / tau_i)

    in each direction that the loss has (1: positives against anchors). Explicit negatives are not counted: they are not
    a sample of the data set.

    Args:
        loss: A loss with a running denominator.
        anchors: (n, D) array, memory map or tensor in row order, from the model as it is now. float32, or float64 for
            checks.
        positives: (n, D), row i the positive of row i.
        anchor_id, positive_id: (n,) int; equal for equal content, which is never a negative. Without them only the
            row's own positive is left out.
        file: Progress, and at the end the result, are kept here: an interrupted call goes on from it, a finished one is
            only read.
        tile_bytes: Memory for scores; None for 8 MiB on a CPU (what its caches like), 256 MiB elsewhere.
        progress: Called with (rows done, rows in all), all directions together.

    Raises:
        AnybatchError: A loss without running denominators, embeddings that do not fit it, a file of other embeddings,
            temperatures or settings, one that cannot be written; on every rank, whichever found it.

    Cost: see the module; 4 bytes a row and direction on each rank while it works. With `file`, rank 0 reads all
    embeddings once more for their digest, about 1 GB a second. Collectives: two agreements, and one gather of the
    values a block, with `file` also an agreement; every rank needs all embeddings.

    Example:
        >>> import torch
        >>> from anybatch.losses import SogCLR
        >>> loss, embeddings = SogCLR(100), torch.randn(2, 100, 8)
        >>> warm_start(loss, *embeddings)
        >>> int(loss.denominator.visited.sum())
        100
    """
    # 1. What is to be filled, and from what; only rank 0 reads and writes the file.
    with distributed.agreed():
        running = running_denominator_of(loss)
        device, num_directions, num_rows = running.log_mean.device, len(running.log_mean), len(anchors)
        table = make_table(
            anchors, positives, anchor_id=anchor_id, positive_id=positive_id, normalize=loss.normalize, device=device
        )
        if num_rows != running.num_rows:
            raise AnybatchError(f"Got embeddings of {num_rows} rows; the memory was made for {running.num_rows}.")
        identity = _identity(loss, table, num_directions) if file and distributed.rank() == 0 else ""
    values, done = _open(file, identity, num_directions, num_rows, device)
    saved, writing = time.perf_counter(), 0.0
    if progress is not None and done:
        progress(done, values.numel())
    # 2. Blocks of rows, of which each rank answers its share.
    for direction, start, stop in _blocks(num_rows, num_directions, done):
        sizes = distributed.shares(stop - start)
        first = start + sum(sizes[: distributed.rank()])
        rows = slice(first, first + sizes[distributed.rank()])
        numbers = torch.arange(rows.start, rows.stop, device=device)
        figures, _ = exact_rows_of(
            loss, table, rows, numbers, direction=direction, moments=False, tile_bytes=tile_bytes
        )
        log_mean = figures.log_mean + figures.positive * running.absolute
        values[direction, start:stop] = distributed.gather_rows(log_mean.float(), sizes)
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
    # 3. All of them into the loss; a row without a negative is as if never visited.
    for direction, start in itertools.product(range(num_directions), range(0, num_rows, FILL_ROWS)):
        part = values[direction, start : start + FILL_ROWS]
        part = torch.where(part.isneginf(), torch.nan, part)
        numbers = torch.arange(start, start + len(part), device=device)
        running.fill(numbers, part, direction=direction, dimensions=anchors.shape[1])


def memory_figures(
    loss: ContrastiveLoss,
    anchors: Embeddings,
    positives: Embeddings,
    *,
    index: Tensor | np.ndarray,
    probe: np.ndarray | int | None = None,
    anchor_id: Ids = None,
    positive_id: Ids = None,
    direction: int = 0,
    tile_bytes: int | None = None,
) -> dict[str, float]:
    """The running denominators of some rows beside the exact ones.

    With nu_i = log u_i the exact log-mean over the given targets, m_i the running one, p_i the exact softmax over the
    negatives:

        memory_visited        share of the probe rows that have a state
        memory_log_rmse       root mean square of m_i - nu_i over those
        memory_log_bias       mean of m_i - nu_i: the part of it that is only a factor on the learning rate
        memory_log_rmse_floor root mean square of the standard error of nu_i, if the N rows are a sample; 0 for all
        objective_true        mean_i tau_i log(eps + u_i), as the papers write it
        objective_memory      mean_i tau_i log(eps + exp(m_i)): what the loss takes it for
        surrogate             mean_i sum_j w_ij (s_ij - s_ip(i)) with w_ij from m_i: its gradient is the one followed
        effective_negatives   mean_i exp(entropy of p_i)
        temperature           mean_i tau_i

    Args:
        loss: A loss with a running denominator.
        anchors, positives: (N, D) embeddings of N rows by the model as it is now: all rows of the data set, or a
            sample.
        index: (N,) int64 which row of the data set each is.
        probe: Which of the N rows to probe: positions, or a number of the first ones; None for all. The others only
            serve as targets.
        anchor_id, positive_id: (N,) int; equal for equal content.
        direction: Which state; 1 scores positives against anchors.
        tile_bytes: As in `warm_start`.

    Returns:
        Plain floats. Figures of the running denominators are left out while no probe row was visited.

    Raises:
        AnybatchError: A loss without running denominators, shapes that do not fit.

    Cost: one product of probe x N x D, a read of the probe's states. Under ranks give the same arguments on every rank.
    """
    running = running_denominator_of(loss)
    device, num_rows = running.log_mean.device, running.num_rows or 0
    table = make_table(
        anchors, positives, anchor_id=anchor_id, positive_id=positive_id, normalize=loss.normalize, device=device
    )
    rows = torch.as_tensor(index).to(device, torch.int64)
    if rows.shape != (len(anchors),):
        raise AnybatchError(f"index has shape {tuple(rows.shape)}; expected ({len(anchors)},), one a given row.")
    chosen = probe if isinstance(probe, np.ndarray) else np.arange(len(anchors))[:probe]
    numbers = rows[torch.as_tensor(chosen, device=device)]
    exact, tau = exact_rows_of(loss, table, chosen, numbers, direction=direction, tile_bytes=tile_bytes)
    tau, truth = tau.double().expand(len(numbers)), exact.log_mean
    log_eps = truth.new_tensor(running.log_eps)
    remembered = running.read("log_mean", numbers, direction=direction).double() - exact.positive * running.absolute
    usable, visited = truth.isfinite(), ~remembered.isnan()
    figures = {
        "memory_visited": _mean(visited.double()),
        "objective_true": _mean((tau * torch.logaddexp(truth, log_eps))[usable]),
        "effective_negatives": _mean(exact.entropy.exp()[usable]),
        "temperature": _mean(tau),
    }
    both = usable & visited
    if bool(both.any()):
        error = (remembered - truth)[both]
        standard_error = exact.standard_error(num_rows - 1)[both]
        estimate = torch.logaddexp(remembered, log_eps)[both]
        total = (truth[both] - estimate).exp()  # sum_j w_ij
        figures |= {
            "memory_log_rmse": _mean(error.square()) ** 0.5,
            "memory_log_bias": _mean(error),
            "memory_log_rmse_floor": _mean(standard_error.square()) ** 0.5 if len(anchors) < num_rows else 0.0,
            "objective_memory": _mean(tau[both] * estimate),
            "surrogate": _mean(tau[both] * total * exact.mean_logit[both]),
        }
    return figures


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else 0.0


def _blocks(num_rows: int, num_directions: int, done: int) -> list[tuple[int, int, int]]:
    """(direction, first row, row after the last) of what is left to do."""
    height = BLOCK_ROWS * distributed.world_size()
    begin, inside = divmod(done, num_rows)
    return [
        (direction, start, min(start + height, num_rows))
        for direction in range(begin, num_directions)
        for start in range(inside if direction == begin else 0, num_rows, height)
    ]


def _identity(loss: ContrastiveLoss, table: Table, num_directions: int) -> str:
    """What made a file: settings, temperatures, ids and all embeddings."""
    temperature: float | str = loss.temperature
    if loss.temperatures.per_row:  # a digest of all that they follow from
        state = sorted(loss.temperatures.state_dict().items())
        tensors = ((name.encode(), *_bytes_of(value.reshape(-1))) for name, value in state if isinstance(value, Tensor))
        limits = json.dumps(loss.temperatures.limits).encode()
        temperature = digest_of([limits, *itertools.chain.from_iterable(tensors)])
    ids = [b"" if ids is None else ids.cpu().numpy().tobytes() for ids in (table.query_id, table.target_id)]
    settings = [list(table.queries.shape), num_directions, temperature, loss.normalize]
    blocks = itertools.chain(_bytes_of(table.queries), _bytes_of(table.targets))
    return json.dumps({"settings": settings, "digest": digest_of(itertools.chain(ids, blocks))})


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
            content = read_sealed(Path(file), "Delete it to start over.")
            if tensors_metadata(content).get("identity") != identity:
                raise AnybatchError(
                    f"{file} holds a warm start of other embeddings, another temperature or other settings. "
                    "Delete it, or choose another file."
                )
            tensors = load(content)
            values, done = tensors["log_mean"].to(device), int(tensors["done"])
    if distributed.is_active():
        done = int(distributed.sum_over_ranks(torch.tensor(done, device=device)))
        values = distributed.sum_over_ranks(values if distributed.rank() == 0 else torch.zeros_like(values))
    return values, done
