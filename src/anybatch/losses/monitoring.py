"""How far a memory is from the truth, and what the loss is worth over all data: figures for logs, from embeddings of a probe set.

The value that a loss with memory returns follows the batch and the memory; what is to be minimised is the objective over the data set. These are
its figures, measured on some probe rows against all targets, or a sample of them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError
from anybatch.losses.base import ContrastiveLoss
from anybatch.losses.exact_rows import Embeddings, exact_rows, make_table, temperatures_of
from anybatch.losses.warm_start import running_denominator_of


def memory_figures(
    loss: ContrastiveLoss,
    anchors: Embeddings,
    positives: Embeddings,
    *,
    index: Tensor | np.ndarray,
    probe: np.ndarray | int | None = None,
    anchor_id: np.ndarray | Tensor | None = None,
    positive_id: np.ndarray | Tensor | None = None,
    direction: int = 0,
    tile_bytes: int | None = None,
) -> dict[str, float]:
    """The memory of some rows beside the truth.

    With nu_i = log u_i the exact log-mean over the given targets, m_i the memory's, p_i the exact softmax over the negatives:

        memory_visited        share of the probe rows that have a state
        memory_log_rmse       root mean square of m_i - nu_i over those
        memory_log_bias       mean of m_i - nu_i: the part of it that is only a factor on the learning rate
        memory_log_rmse_floor root mean square of the standard error of nu_i, where the N rows are a sample of the memory's; 0 for all of them
        objective_true        mean_i tau_i log(eps + u_i), as the papers write it
        objective_memory      mean_i tau_i log(eps + exp(m_i)): what the loss believes of it
        surrogate             mean_i sum_j w_ij (s_ij - s_ip(i)) with w_ij from the memory: its gradient is the one followed, its value is not the objective
        effective_negatives   mean_i exp(entropy of p_i)
        temperature           mean_i tau_i

    Args:
        loss: A loss with a running denominator.
        anchors, positives: (N, D) embeddings of N rows by the model as it is now: all rows of the data set, or a sample.
        index: (N,) int64 which row of the data set each is.
        probe: Which of the N rows to probe: positions, or a number of the first ones; None for all. The others only serve as targets.
        anchor_id, positive_id: (N,) int; equal for equal content.
        direction: Which state; 1 scores positives against anchors.
        tile_bytes: Memory for scores; None for 8 MiB on a CPU (what its caches like), 256 MiB elsewhere.

    Returns:
        Plain floats. Figures of the memory are left out while no probe row was visited.

    Raises:
        AnybatchError: A loss without memory, shapes that do not fit.

    Cost: one product of probe x N x D, a read of the probe's states. Under ranks give the same arguments on every rank.
    """
    memory = running_denominator_of(loss)
    device, num_rows = memory.log_mean.device, memory.num_rows or 0
    table = make_table(
        anchors,
        positives,
        anchor_id=anchor_id,
        positive_id=positive_id,
        normalize=loss.normalize,
        device=device,
    )
    rows = torch.as_tensor(index).to(device, torch.int64)
    if rows.shape != (len(anchors),):
        raise AnybatchError(f"index has shape {tuple(rows.shape)}; expected ({len(anchors)},), one a given row.")
    chosen = (
        np.arange(len(anchors))[: probe if isinstance(probe, int) else None]
        if not isinstance(probe, np.ndarray)
        else probe
    )
    numbers = rows[torch.as_tensor(chosen, device=device)]
    tau = temperatures_of(loss, table, chosen, numbers, direction=direction)
    side = table if direction == 0 else table.reversed()
    exact = exact_rows(side, chosen, temperature=tau, tile_bytes=tile_bytes)
    tau = tau.double().expand(len(numbers))
    log_eps = torch.tensor(math.log(memory.eps) if memory.eps > 0 else -math.inf, dtype=torch.float64, device=device)
    truth = exact.log_mean
    said = memory.read("log_mean", numbers, direction=direction).double()
    usable, visited = truth.isfinite(), ~said.isnan()
    figures = {
        "memory_visited": visited.double().mean().item(),
        "objective_true": _mean((tau * torch.logaddexp(truth, log_eps))[usable]),
        "effective_negatives": _mean(exact.entropy.exp()[usable]),
        "temperature": _mean(tau),
    }
    both = usable & visited
    if bool(both.any()):
        error = (said - truth)[both]
        standard_error = exact.standard_error(num_rows - 1)[both]
        floor = standard_error.square().mean().sqrt().item() if len(anchors) < num_rows else 0.0
        believed = torch.logaddexp(said, log_eps)[both]
        total = (truth[both] - believed).exp()  # sum_j w_ij
        figures |= {
            "memory_log_rmse": error.square().mean().sqrt().item(),
            "memory_log_bias": error.mean().item(),
            "memory_log_rmse_floor": floor,
            "objective_memory": _mean(tau[both] * believed),
            "surrogate": _mean(tau[both] * total * exact.mean_logit[both]),
        }
    return figures


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else 0.0
