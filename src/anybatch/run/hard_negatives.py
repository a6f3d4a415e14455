"""The plan's hard negatives (B3++) as columns of the pairs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from anybatch.data.inputs import pick
from anybatch.data.pairs import PairData
from anybatch.plans.plan import BatchPlan

LOOKED_AT = 1000  # rows looked at for one that can stand in for a missing hard negative


def with_mined_negatives(pairs: PairData, plan: BatchPlan) -> PairData:
    """The pairs with the plan's hard negatives as further negative columns; the pairs themselves if it has none. Where
    a window had too few, the positives of the next rows of the same data set stand in, all different: ordinary
    candidates. Where there are none, the row has fewer negatives.
    """
    if plan.negatives is None or plan.negatives.shape[1] == 0:
        return pairs
    rows = plan.negatives.astype(np.int64)  # (n, h), -1 where one is missing
    lacking = np.any(rows < 0, axis=1)
    suspected: dict[int, set[int]] = {}  # of rows that lack a negative, the texts that may be right answers
    if plan.suspects is not None:
        for row, suspect in plan.suspects[lacking[plan.suspects[:, 0]]].tolist():
            suspected.setdefault(row, set()).add(int(pairs.positive_id[suspect]))
    task = np.zeros(len(rows), np.int64) if plan.task is None else plan.task
    members = [np.flatnonzero(task == number) for number in range(int(task.max(initial=0)) + 1)]
    for row in np.flatnonzero(lacking).tolist():
        missing = np.flatnonzero(rows[row] < 0)
        stand_ins = _stand_ins(pairs, row, rows[row], members[task[row]], suspected.get(row, set()))[: len(missing)]
        rows[row, missing[: len(stand_ins)]] = stand_ins
    mined = [pick(pairs.positives, column) for column in rows.T]
    return replace(pairs, negatives=(*pairs.negatives, *mined))


def _stand_ins(pairs: PairData, row: int, negatives: np.ndarray, members: np.ndarray, suspected: set[int]) -> list[int]:
    """The next rows of the data set (`members`) whose texts are no suspects, and no text of `row` or of each other."""
    taken = {int(pairs.positive_id[row]), *pairs.positive_id[negatives[negatives >= 0]].tolist(), *suspected}
    stand_ins: list[int] = []
    first = int(np.searchsorted(members, row))
    for step in range(1, min(len(members), LOOKED_AT)):
        candidate = int(members[(first + step) % len(members)])
        text = int(pairs.positive_id[candidate])
        if text in taken or pairs.anchor_id[candidate] == pairs.anchor_id[row]:
            continue
        taken.add(text)
        stand_ins.append(candidate)
        if len(stand_ins) == len(negatives):
            break
    return stand_ins
