"""The cached training step: any contrastive loss, any number of towers, a batch as large as its embeddings allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.caching.encoder import Encoder, modules_of, parameters_of
from anybatch.caching.memory import StepMemory
from anybatch.caching.recording import Auto, record_towers
from anybatch.caching.replay import Aside, replay, trained_parameters
from anybatch.caching.state import without_autocast
from anybatch.core.errors import AnybatchError


def cached_step(
    loss: Callable[..., Tensor],
    encoders: Encoder | Sequence[Encoder],
    inputs: Sequence[Any],
    *,
    mini_batch_size: int | Auto | None = 32,
    max_tokens: int | None = None,
    keep_graphs: int | float | Auto = 0,
    memory: str | int | StepMemory = "80%",
    sort_by_length: bool = True,
    loss_kwargs: Mapping[str, Any] | None = None,
    scale: float = 1.0,
    modules: Sequence[nn.Module] | None = None,
) -> Tensor:
    """One step's gradients of a contrastive loss over the whole batch, in the memory of one mini-batch.

        anchors = encode_0(inputs[0]);  candidates = cat([encode_k(inputs[k]) for k >= 1])
        (scale * loss(anchors, candidates, **loss_kwargs)).backward()

    is what it computes exactly, up to rounding: `.grad` of the encoders and of the loss's own parameters receives the
    same sum, once. With dropout, the masks are those of the mini-batches, drawn once and replayed.

    Args:
        loss: `loss(anchors (B, D), candidates (M, D), **loss_kwargs) -> scalar`; of anybatch.losses or any callable.
        encoders: One callable for all towers (shared weights), or one for each. Each takes a mini-batch of its tower
            and returns `(b, D)`.
        inputs: One batch for each tower: anchors, positives, then explicit negatives (see `RowSlicer` for their form).
        mini_batch_size: The most rows in a forward pass; None if `max_tokens` limits it; "auto" finds the padded tokens
            that `memory` has room for.
        max_tokens: The most padded tokens in a forward pass.
        keep_graphs: How many mini-batches of each tower keep their graph instead of running twice: an int counts them,
            a float is a fraction (1.0: plain training), "auto" keeps what `memory` has room for.
        memory: For "auto": the most memory in use on the device, "8GiB" or "80%". A `StepMemory` given to every step
            probes once and remembers what did not fit.
        sort_by_length: Group rows of like length; the embeddings keep the order of the batch.
        loss_kwargs: Passed to the loss, for instance `{"index": rows}`.
        scale: Multiplies the loss before the backward pass (a gradient scaler, 1 / accumulation steps).
        modules: The modules that the encoders run, where they cannot be found by looking (see `modules_of`).

    Returns:
        The loss, a scalar without graph, not multiplied by `scale`.

    Raises:
        AnybatchError: Towers and encoders differ in number, BatchNorm in training mode, a tower that the loss ignores.

    Cost: with f the fraction of kept graphs, 4 - f units where a plain step takes 3 (forward 1, backward 2), less what
        sorting by length saves. Memory: embeddings of the batch, one mini-batch's graph and the kept ones.
        Collectives: those of the loss, and one gradient reduction for each DistributedDataParallel encoder.

    Reference: arXiv 2101.06983 (GradCache), section 3.2; keeping graphs and sorting are additions.
    """
    # 1. Record: every mini-batch of every tower through its encoder, most without a graph.
    recordings = record_towers(
        paired_encoders(encoders, inputs),
        inputs,
        mini_batch_size=mini_batch_size,
        max_tokens=max_tokens,
        keep_graphs=keep_graphs,
        memory=memory,
        sort_by_length=sort_by_length,
        modules=modules,
    )
    leaves = [recording.embeddings for recording in recordings]
    # 2. Loss: on all embeddings at once; its backward pass ends in them. What it gives to parameters waits.
    aside = Aside(dict.fromkeys([*trained_parameters(recordings), *parameters_of(modules_of(loss))]))
    try:
        value = _loss_of(leaves, loss, loss_kwargs or {}, scale)
    finally:
        beside = aside.put_back()
    # 3. Replay: every mini-batch again, with a graph; the gradients of its embeddings go into the encoder.
    replay(recordings, [[leaf.grad] for leaf in leaves], beside=beside)
    return value


def paired_encoders(encoders: Encoder | Sequence[Encoder], inputs: Sequence[Any]) -> list[Encoder]:
    """One encoder for each tower: the only one given for all, or as many as there are towers; else an AnybatchError."""
    shared = callable(encoders) and not isinstance(encoders, nn.ModuleList)
    towers: list[Encoder] = [encoders] * len(inputs) if shared else [*encoders]  # type: ignore[misc, list-item]
    if len(towers) != len(inputs) or not towers:
        raise AnybatchError(
            f"{len(towers)} encoders for {len(inputs)} towers; give one input batch for each tower, and one encoder "
            "for all or one for each."
        )
    return towers


def _loss_of(
    leaves: Sequence[Tensor], loss: Callable[..., Tensor], loss_kwargs: Mapping[str, Any], scale: float
) -> Tensor:
    """The loss of recorded embeddings, outside autocast, back-propagated to them and to the loss's own parameters."""
    # One tower only: the loss takes the embeddings alone.
    candidates = [torch.cat(list(leaves[1:]))] if len(leaves) > 2 else list(leaves[1:])
    with without_autocast():  # the leaves are float32 or better, and so is all that the loss does with them
        value = loss(leaves[0], *candidates, **loss_kwargs)
        if not isinstance(value, Tensor) or value.ndim != 0:
            given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise AnybatchError(f"The loss returned {given}; a scalar tensor is expected. Reduce it (mean) inside.")
        if not value.requires_grad:
            raise AnybatchError(
                "The loss needs no gradient: every encoder is frozen (or gradients are off) and the loss has no "
                "parameter to train. Unfreeze something, or call the loss on the embeddings."
            )
        (value * scale).backward()
    unused = [str(tower) for tower, leaf in enumerate(leaves) if leaf.requires_grad and leaf.grad is None]
    if unused:
        raise AnybatchError(
            f"The loss did not use tower(s) {', '.join(unused)} (0 is the anchors): their embeddings received no "
            "gradient, though encoding them costs time. Remove these inputs, or use a loss that reads them."
        )
    return value.detach()
