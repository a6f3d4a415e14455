"""Every term against a loop over pairs: in tiles of ragged sizes, in the other direction, over ranks, beside a
memory.
"""

from __future__ import annotations

import math

import pytest
import torch

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.losses import Examples, InfoNCE, LogWeights, removed
from anybatch.losses.log_weights import (
    Inclusion,
    ListedPairs,
    Values,
    as_log_weights,
    plus,
    remembered_of_other_tasks,
    same_content,
    same_row,
)
from anybatch.losses.rows import RowTable

ROWS, COLUMNS, REMEMBERED = 7, 12, 4  # five explicit negatives behind the positives
MINUS = -math.inf


def assert_is(log_weight, value, rows=ROWS, columns=COLUMNS):
    """`value(i, j)` for every pair, whole and tile by tile."""
    wanted = torch.tensor([[value(i, j) for j in range(columns)] for i in range(rows)], dtype=torch.float64)
    for height, width in ((rows, columns), (3, 5)):
        for start in range(0, rows, height):
            for first in range(0, columns, width):
                part = slice(start, min(rows, start + height)), slice(first, min(columns, first + width))
                tile = log_weight.tile(*part).double()
                torch.testing.assert_close(tile.expand_as(wanted[part]), wanted[part], rtol=1e-12, atol=1e-12)


def integers(high, *shape, seed):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def draw(seed):
    """Records of candidates and of what is remembered, with everything that any term asks for."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for number in (COLUMNS, REMEMBERED):
        explicit = torch.arange(number) >= (ROWS if number == COLUMNS else number)
        cluster = integers(4, number, seed=seed + number)
        cluster = torch.where(cluster == 3, -2 - torch.arange(number) - 100 * (number == REMEMBERED), cluster)
        records.append(
            Examples(
                anchor_id=integers(5, number, seed=seed + 1).masked_fill(explicit, -1),
                text_id=integers(9, number, seed=seed + 2),
                row=integers(6, number, seed=seed + 3).masked_fill(explicit, -1),
                cluster=cluster,
                task=integers(2, number, seed=seed + 4),
                log_ways=torch.rand(number, generator=generator, dtype=torch.float64),
                author=integers(3, number, seed=seed + 5).masked_fill(explicit, -1),
            )
        )
    return records


KEYS = torch.unique(torch.randint(6 * 9, (20,), generator=torch.Generator().manual_seed(3)))
TABLE = -torch.rand(2, 2, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64) - 0.5


def inclusion(with_task):
    """The loop over one pair: query i, candidate j, as plain numbers."""

    def value(i, j, back, memory):
        task = i["task"] if with_task else 0
        if with_task and task != j["task"]:
            return MINUS
        same, other, loose, exact_other, exact_loose, log_spread = TABLE[task, int(i["cluster"] < 0)].tolist()
        ways = 0.0 if back else j["log_ways"]
        if i["cluster"] == j["cluster"] and not j.get("remembered"):
            return same - ways
        if memory is None:
            return (loose if j["cluster"] < 0 else other) - ways
        among = sum(not with_task or m["task"] == task for m in memory)
        chance = math.exp(-((exact_loose if j["cluster"] < 0 else exact_other) - ways))
        return -max(0.0, math.log(chance + among * math.exp(log_spread)))

    return value


def mask(condition):
    return lambda i, j, back, memory: MINUS if condition(i, j, back) else 0.0


def same_author(queries, candidates, *, back):
    """A user's own mask: one function, and a column of the record."""
    return removed(queries["author"][:, None] == candidates["author"])


TERMS = {
    "same content": (
        same_content,
        mask(lambda i, j, back: i["text_id"] == j["text_id"] or i["anchor_id"] == j["anchor_id"]),
    ),
    "same row": (same_row, mask(lambda i, j, back: i["row"] == j["row"])),
    "same author": (same_author, mask(lambda i, j, back: i["author"] == j["author"])),
    "tasks": (
        remembered_of_other_tasks,
        mask(lambda i, j, back: bool(j.get("remembered")) and i["task"] != j["task"]),
    ),
    "listed pairs": (
        ListedPairs(KEYS, 9),
        mask(lambda i, j, back: (j["row"] * 9 + i["text_id"] if back else i["row"] * 9 + j["text_id"]) in KEYS),
    ),
    "no listed pair": (ListedPairs(KEYS[:0], 9), mask(lambda i, j, back: False)),
    "listed by anchor": (
        ListedPairs(KEYS, 9, key="anchor_id"),
        mask(lambda i, j, b: (j["anchor_id"] * 9 + i["text_id"] if b else i["anchor_id"] * 9 + j["text_id"]) in KEYS),
    ),
    "by text": (Values("log_ways", of="text"), lambda i, j, back, memory: (i if back else j)["log_ways"]),
    "by anchor": (Values("log_ways", of="anchor"), lambda i, j, back, memory: (j if back else i)["log_ways"]),
    "inclusion": (Inclusion(TABLE), inclusion(True)),
    "inclusion, one set": (Inclusion(TABLE), inclusion(False)),
}


def plain(examples):
    return [{name: column[place].item() for name, column in examples.columns.items()} for place in range(len(examples))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TERMS)
def test_terms(name, seed):
    term, value = TERMS[name]
    examples, memory = draw(10 * seed)
    if name == "inclusion, one set":
        examples, memory = (
            Examples(**{key: column for key, column in part.columns.items() if key != "task"})
            for part in (examples, memory)
        )
    numbers, remembered = plain(examples), [{**one, "remembered": 1} for one in plain(memory)]
    forward = LogWeights.of(examples, ROWS, term)
    assert forward.normalised == name.startswith("inclusion")
    for weights, columns, back in ((forward, numbers, False), (forward.reversed(ROWS), numbers[:ROWS], True)):
        alone = lambda i, j, back=back, columns=columns: value(numbers[i], columns[j], back, None)  # noqa: E731
        assert_is(weights, alone, columns=len(columns))
        assert_is(weights.gathered([ROWS], [len(columns)]), alone, columns=len(columns))
        for share in (slice(0, REMEMBERED), slice(1, 3)):
            beside = weights.beside(memory, share)
            everyone = [*columns, *remembered[share]]
            assert_is(
                beside,
                lambda i, j, back=back, all_=everyone: value(numbers[i], all_[j], back, remembered),
                columns=len(everyone),
            )


def test_what_an_anchor_and_a_text_are_called_are_two_spaces():
    apart = Examples(anchor_id=torch.tensor([1, 0]), text_id=torch.tensor([0, 1]))
    weights = LogWeights.of(apart, 2, same_content).reversed(2)
    assert weights.tile(slice(0, 2), slice(0, 2)).tolist() == [[MINUS, 0.0], [0.0, MINUS]]


def test_sums_and_columns_given_later():
    examples, _ = draw(5)
    one = LogWeights.of(examples, ROWS, ListedPairs(KEYS, 9))
    both = plus(one, ROWS, Values("extra", of="text", normalised=True), extra=torch.arange(12.0))
    assert both.normalised, "masks only remove pairs"
    assert not plus(one, ROWS, same_row).normalised
    mine = one.tile(slice(0, ROWS), slice(0, COLUMNS))
    assert_is(both, lambda i, j: mine[i, j].item() + j)
    assert LogWeights(queries=examples, candidates=examples).tile(slice(0, 2), slice(0, 2)).item() == 0
    with pytest.raises(AnybatchError, match="a column 'row' with other values"):
        plus(one, ROWS, row=examples["row"] + 1)


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (1, COLUMNS), (ROWS, 1), (1, 1)])
def test_tensors(shape):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = as_log_weights(values, ROWS, COLUMNS)
    assert weight.normalised
    spread = values.expand(ROWS, COLUMNS)
    assert_is(weight, lambda i, j: float(spread[i, j]))
    assert_is(weight.reversed(ROWS), lambda j, i: float(spread[i, j]), columns=ROWS)
    if shape == (ROWS, COLUMNS):
        for elsewhere, call in (
            ("the other ranks", lambda: weight.gathered([ROWS], [COLUMNS])),
            ("earlier batches", lambda: weight.beside(Examples(row=torch.arange(3)), slice(0, 3))),
        ):
            with pytest.raises(AnybatchError, match=rf"\(7, 12\), which does not cover the candidates of {elsewhere}"):
                call()
    else:
        assert_is(weight.gathered([ROWS], [COLUMNS]), lambda i, j: float(spread[i, j]))


def test_a_tensor_of_zeros_and_minus_infinity_is_a_mask():
    values = torch.zeros(ROWS, COLUMNS)
    values[2, 5] = MINUS
    assert not as_log_weights(values, ROWS, COLUMNS).normalised
    for bad in (math.nan, math.inf):
        values[0, 1] = bad
        with pytest.raises(AnybatchError, match="NaN or"):
            as_log_weights(values, ROWS, COLUMNS)


@pytest.mark.parametrize("direction", ["one_way", "both"])
def test_a_mask_of_your_own(direction):
    """One function and one column: through a loss, alone and from a table of rows."""
    generator = torch.Generator().manual_seed(1)
    anchors, candidates = (torch.randn(rows, 4, generator=generator).double() for rows in (6, 8))
    author, index = torch.tensor([0, 1, 0, 2, 1, 3, 0]), torch.tensor([4, 2, 0, 1, 6, 5])
    columns = torch.cat([author[index], torch.tensor([-1, -1])])
    allowed = torch.where(columns[:6, None] == columns, MINUS, 0.0).double()
    loss = InfoNCE(temperature=0.3, direction=direction)
    expected = loss(anchors, candidates, log_weight=allowed)
    weights = LogWeights.of(Examples(author=columns), 6, same_author)
    torch.testing.assert_close(loss(anchors, candidates, log_weight=weights), expected, rtol=1e-12, atol=0)
    ids = torch.arange(7).numpy()
    table = RowTable(
        ids, ids, negative_id=ids[:, None] + [7, 14], columns={"author": author.numpy()}, terms=[same_author]
    )
    whole = torch.cat([candidates, torch.randn(10, 4, generator=generator).double()])
    arguments = table.arguments(index, num_negatives=2)
    wide = torch.cat([allowed[:, :6], allowed.new_zeros(6, 12)], dim=1)
    expected = loss(anchors, whole, log_weight=wide)
    torch.testing.assert_close(loss(anchors, whole, **arguments), expected, rtol=1e-12, atol=0)
    with pytest.raises(AnybatchError, match=r"columns\['author'\] has shape \(6,\); expected one a row, \(7,\)"):
        RowTable(ids, ids, columns={"author": author[:6].numpy()})


def test_two_gathers_a_direction_whatever_the_terms(monkeypatch):
    calls = []
    gather = distributed.gather_rows
    monkeypatch.setattr(distributed, "gather_rows", lambda rows, sizes: calls.append(1) or gather(rows, sizes))
    weights = LogWeights.of(draw(0)[0], ROWS, *(term for term, _ in TERMS.values()))
    for part, columns in ((weights, COLUMNS), (weights.reversed(ROWS), ROWS)):
        calls.clear()
        part.gathered([ROWS], [columns])
        assert len(calls) == 2


@pytest.mark.parametrize(
    ("term", "given"),
    [
        (lambda q, c, *, back: q["row"][:, None] == c["row"], r"torch.bool \(3, 3\)"),
        (lambda q, c, *, back: None, "NoneType"),
        (lambda q, c, *, back: torch.zeros(2, 3), r"torch.float32 \(2, 3\)"),
    ],
)
def test_a_term_that_gives_no_log_weights_is_refused(term, given):
    """A bool would be added as a weight of 1, and the pair kept."""
    rows = Examples(row=torch.arange(3))
    with pytest.raises(AnybatchError, match=f"The term <lambda> gave {given}"):
        InfoNCE()(torch.eye(3), torch.eye(3), log_weight=LogWeights(queries=rows, candidates=rows, terms=(term,)))
