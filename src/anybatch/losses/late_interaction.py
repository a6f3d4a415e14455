"""Late interaction (ColBERT): InfoNCE over MaxSim scores of tokens, in tiles, with the gradient in closed form.

Shapes: B anchors of Tq tokens, M candidates of Td tokens, D dimensions; `_all` marks the candidates of all ranks
together.
"""

from __future__ import annotations

from typing import ClassVar, Unpack, final

import torch
from torch import Tensor, nn

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.losses.base import ContrastiveLoss, Known, OneTemperature, check_embeddings, outside_the_graph
from anybatch.losses.engine import differentiable_once, with_gradients
from anybatch.losses.engine.candidates import Layout
from anybatch.losses.log_weights import LogWeights
from anybatch.losses.parts import GlobalTemperature


@final
class LateInteraction(ContrastiveLoss):
    """InfoNCE between texts that keep one embedding a token.

        s_ij = sum_t max_u q_it . d_ju        (t: the anchor's tokens, u: the candidate's)
        loss = mean_i ( logsumexp_j (s_ij / tau + b_ij) - s_ip / tau )

    Args:
        scoring: See `OneTemperature`, of tokens: each is normalised, and `tile_bytes` are those of their similarities.
            Scores grow with the number of an anchor's tokens, so the temperature is 1.

    The maximum's gradient goes to the token that reached it (the first of equals).

    Cost: three matrix products of (B Tq) x (M Td) x D; token similarities of a tile, and 2 or 4 bytes for each token of
    a tile's anchors and each candidate. Neither all similarities nor all scores are held at once. With W ranks: seven
    collectives in the forward pass (one as large as all candidates' gradients), none in the backward pass.

    Reference: Khattab and Zaharia 2020, "ColBERT", arXiv 2004.12832, equation 3.

    Example:
        >>> import torch
        >>> anchors, candidates = torch.randn(4, 3, 8, requires_grad=True), torch.randn(6, 5, 8)
        >>> LateInteraction()(anchors, candidates).backward()
        >>> anchors.grad.shape
        torch.Size([4, 3, 8])
    """

    temperatures: GlobalTemperature

    defaults: ClassVar[OneTemperature] = {"temperature": 1.0}
    lacks: ClassVar = {
        "direction": "scores anchors against candidates",
        "joint": "scores anchors against candidates",
        "positives_by": "has one positive an anchor",
        "hardness": "has one weight for all negatives",
        "ring": "gathers the candidates of all ranks",
    }

    def __init__(self, **scoring: Unpack[OneTemperature]) -> None:
        super().__init__(**scoring)
        self._last: tuple[Tensor, Tensor] | None = None

    @outside_the_graph
    def forward(
        self,
        anchors: Tensor,
        candidates: Tensor,
        *,
        anchor_mask: Tensor | None = None,
        candidate_mask: Tensor | None = None,
        **known: Unpack[Known],
    ) -> Tensor:
        """The mean over the batch of all ranks.

        Args:
            anchors: (B, Tq, D) float, padded.
            candidates: (M, Td, D) float, padded, M >= B: the positives in the anchors' order, then explicit negatives.
            anchor_mask: (B, Tq), true or nonzero for tokens that count; None for all.
            candidate_mask: (M, Td), likewise; every candidate needs one token that counts.
            known: As in `ContrastiveLoss`.

        Returns:
            Scalar, float32 (float64 for float64 embeddings), differentiable in the embeddings and the temperature.

        Raises:
            AnybatchError: Shapes that do not fit; a candidate without tokens.
        """
        dtype = check_embeddings(anchors, candidates)
        masks = _checked_masks(anchors, candidates, anchor_mask, candidate_mask)
        with torch.autocast(anchors.device.type, enabled=False):
            # Padding may hold anything, NaN included, and 0 * NaN is NaN.
            sides = [
                side.to(dtype).masked_fill(~mask[..., None], 0.0)
                for side, mask in zip((anchors, candidates), masks, strict=True)
            ]
            if self.normalize:
                sides = [nn.functional.normalize(side, dim=-1) for side in sides]
            _, weight = self._weight(anchors, candidates, **known)
            temperature = self.temperatures.like(sides[0], updating=self._updating)
            with torch.no_grad():
                loss, gradients = _solve(
                    sides[0], sides[1], temperature, masks, weight, self.tile_bytes, self.mask_margin
                )
        self._last = loss, temperature.detach()
        return differentiable_once(with_gradients(loss, (*sides, temperature), gradients))

    @property
    def last_stats(self) -> dict[str, float]:
        """Figures of the last call as plain floats: objective and temperature. Empty before it."""
        if self._last is None:
            return {}
        objective, temperature = (figure.item() for figure in self._last)
        return {"objective": objective, "temperature": round(temperature, 7)}


def _solve(
    anchors: Tensor,
    candidates: Tensor,
    temperature: Tensor,
    masks: tuple[Tensor, Tensor],
    weight: LogWeights | None,
    tile_bytes: int,
    mask_margin: float | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and its gradients by anchors, candidates and temperature."""
    # 1. The candidates of all ranks, padded to the longest, and the sizes of a tile: one row's best tokens against all
    # columns, and its similarities against a tile of columns, must fit.
    num_rows, width, dimensions = anchors.shape
    layout = Layout.of(num_rows, len(candidates), anchors.device)
    candidates_all, counts_all = _gathered(candidates, masks[1], layout.column_sizes)
    if weight is not None and distributed.is_active():
        weight = weight.gathered(layout.row_sizes, layout.column_sizes)
    num_columns, tokens = candidates_all.shape[:2]
    item = anchors.element_size()
    height = max(1, min(num_rows, tile_bytes // max(1, 2 * item * width * num_columns)))
    columns_at_once = max(1, tile_bytes // max(1, item * height * width * tokens))
    column_tiles = [slice(s, min(s + columns_at_once, num_columns)) for s in range(0, num_columns, columns_at_once)]
    d_anchors, d_candidates_all = torch.zeros_like(anchors), torch.zeros_like(candidates_all)
    loss, d_temperature = anchors.new_zeros(()), anchors.new_zeros(())
    for start in range(0, num_rows, height):
        rows = slice(start, min(start + height, num_rows))
        queries = anchors[rows].reshape(-1, dimensions)
        live = masks[0][rows].to(anchors.dtype)
        # 2. The scores of some rows against all columns, and for each of their tokens the best of each candidate.
        scores = anchors.new_empty(len(live), num_columns)
        best: list[Tensor] = []
        for columns in column_tiles:
            similarity = (queries @ candidates_all[columns].reshape(-1, dimensions).T).view(
                len(live), width, -1, tokens
            )
            similarity.masked_fill_(~counts_all[columns], -torch.inf)
            highest, where = similarity.max(dim=3)
            scores[:, columns] = torch.einsum("itj,it->ij", highest, live)
            best.append(where.to(torch.int32 if tokens > 2**15 else torch.int16))
        # 3. The softmax of each row, and from it the gradient weight of each score.
        logits = scores / temperature
        if weight is not None:
            logits += weight.tile(layout.shifted(rows), slice(0, num_columns)).to(logits.dtype)
        local = torch.arange(len(live), device=anchors.device)
        positive = layout.first_column + start + local
        if mask_margin is not None:
            logits.masked_fill_(scores > scores[local, positive][:, None] + mask_margin, -torch.inf)
        logits[local, positive] = scores[local, positive] / temperature  # a log-weight never touches the positive
        log_sum = logits.logsumexp(dim=1)
        loss = loss + (log_sum - logits[local, positive]).sum()
        gradient_weight = (logits - log_sum[:, None]).exp_()
        gradient_weight[local, positive] -= 1.0
        d_temperature = d_temperature - (gradient_weight * scores).sum() / temperature.square()
        # 4. The gradients of the tokens that were best.
        for columns, where in zip(column_tiles, best, strict=True):
            share = (gradient_weight[:, None, columns] * live[:, :, None])[..., None]
            spread = share.new_zeros(*share.shape[:3], tokens).scatter_(3, where.long()[..., None], share)
            spread = spread.view(len(queries), -1)
            d_anchors[rows] += (spread @ candidates_all[columns].reshape(-1, dimensions)).view(
                len(live), width, dimensions
            )
            d_candidates_all[columns] += (spread.T @ queries).view(-1, tokens, dimensions)
    d_candidates = distributed.sum_over_ranks(d_candidates_all)[layout.own_columns, : candidates.shape[1]]
    num_rows_all = sum(layout.row_sizes)
    scale = (
        distributed.world_size() / num_rows_all / temperature
    )  # W times: the averaging over ranks takes it away again
    loss, d_temperature = (distributed.sum_over_ranks(value) / num_rows_all for value in (loss, d_temperature))
    return loss, (d_anchors * scale, d_candidates * scale, d_temperature)


def _gathered(candidates: Tensor, mask: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """All ranks' candidates and masks, padded to the longest."""
    missing = max(distributed.gather_sizes(candidates.shape[1], candidates.device)) - candidates.shape[1]
    padded = nn.functional.pad(candidates, (0, 0, 0, missing))
    marks = nn.functional.pad(mask.to(torch.uint8), (0, missing))
    return distributed.gather_rows(padded, sizes), distributed.gather_rows(marks, sizes).bool()


def _checked_masks(
    anchors: Tensor, candidates: Tensor, anchor_mask: Tensor | None, candidate_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    shapes = tuple(anchors.shape), tuple(candidates.shape)
    if [len(shape) for shape in shapes] != [3, 3] or shapes[0][2] != shapes[1][2] or shapes[1][0] < shapes[0][0]:
        raise AnybatchError(
            f"anchors have shape {shapes[0]} and candidates {shapes[1]}; expected (B, Tq, D) and (M, Td, D) with "
            "M >= B: the positives in the anchors' order, then explicit negatives."
        )
    masks = []
    for name, side, mask in (("anchor_mask", anchors, anchor_mask), ("candidate_mask", candidates, candidate_mask)):
        if mask is None:
            mask = torch.ones(side.shape[:2], dtype=torch.bool, device=side.device)
        if mask.shape != side.shape[:2]:
            raise AnybatchError(
                f"{name} has shape {tuple(mask.shape)}; expected {tuple(side.shape[:2])}, one entry a token."
            )
        masks.append(mask.detach().bool())
    empty = (~masks[1].any(dim=1)).nonzero()[:, 0].tolist()
    if empty:
        raise AnybatchError(
            f"Candidate {empty[0]} has no token that counts, so it has no score. Remove the row, or mend its mask."
        )
    return masks[0], masks[1]
