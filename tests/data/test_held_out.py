"""What is held out for evaluation: enough, from each data set, and no text of it on the other side."""

from __future__ import annotations

import numpy as np
import pytest

from anybatch.data.held_out import FEWEST, held_out_rows, split_pairs
from anybatch.data.images import ImageColumn
from anybatch.data.pairs import PairData, PairSet


def shared_texts(count: int, seed: int = 0) -> PairData:
    """Pairs of which many share an anchor or a positive with others, some the other way round."""
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 3 * count, (2, count))
    sides = ([f"text {n}" for n in side] for side in numbers)
    pairs = [pair if row % 9 else pair[::-1] for row, pair in enumerate(zip(*sides, strict=True))]
    alone = [(f"anchor {n}", f"positive {n}") for n in range(count)]
    both = [*pairs, *alone]
    order = random.permutation(len(both))
    return PairData(anchors=[both[n][0] for n in order], positives=[both[n][1] for n in order])


def texts_of(pairs: PairData) -> set[str]:
    return {str(text).strip() for text in (*pairs.anchors, *pairs.positives)}


@pytest.mark.parametrize("seed", range(3))
def test_no_text_on_both_sides(seed):
    pairs = shared_texts(1_500, seed)
    rows = held_out_rows(pairs, batch_size=64, seed=seed)
    assert 135 <= len(rows) <= 150
    assert (np.diff(rows) > 0).all()
    left, held_out = split_pairs(pairs, rows)
    assert len(left) + len(held_out) == 3_000
    assert not texts_of(left) & texts_of(held_out)
    assert len(set(held_out.anchors)) < len(held_out), "groups of several are held out as well"
    np.testing.assert_array_equal(rows, held_out_rows(pairs, batch_size=64, seed=seed))
    assert not np.array_equal(rows, held_out_rows(pairs, batch_size=64, seed=seed + 1))


@pytest.mark.parametrize(
    ("count", "batch_size", "expected"),
    [(240, 8, 0), (260, 8, FEWEST), (260, 210, FEWEST), (260, 211, 0), (4_000, 64, 200), (30_000, 64, 1_000)],
)
def test_how_many(count, batch_size, expected):
    pairs = PairData(anchors=[f"a {n}" for n in range(count)], positives=[f"p {n}" for n in range(count)])
    assert len(held_out_rows(pairs, batch_size, seed=0)) == expected


def test_none_where_all_pairs_hang_together():
    pairs = PairData(anchors=[f"a {n}" for n in range(400)], positives=[f"label {n % 4}" for n in range(400)])
    assert not len(held_out_rows(pairs, batch_size=8, seed=0))


def test_each_data_set_gives_its_part():
    """But one that would be left with less than a batch; what is held out carries the instructions of its set."""
    lengths = {"large": 2_000, "medium": 600, "small": 60}
    texts = [f"{name} {n}" for name, length in lengths.items() for n in range(length)]
    texts[2_000:2_100] = texts[:100]  # these hang together with the large set's
    pairs = PairData(
        anchors=texts,
        positives=[f"positive of {text}" for text in texts],
        negatives=([f"negative of {text}" for text in texts],),
        sets=tuple(PairSet(name=name, num_rows=n, anchor_prompt=f"{name}: ") for name, n in lengths.items()),
    )
    left, held_out = split_pairs(pairs, held_out_rows(pairs, batch_size=60, seed=3))
    assert [part.num_rows for part in left.sets] == [1_900, 570, 60]
    ends = np.cumsum([part.num_rows for part in left.sets])
    for part, names in zip(left.sets, np.split(np.array(left.anchors[:2_470]), ends[:1]), strict=False):
        assert sum(name.startswith(part.name) for name in names) >= len(names) - 100
    assert {str(anchor).split(":")[0] for anchor in held_out.anchors} == {"large", "medium"}
    assert held_out.negatives == ()
    assert left.negatives[0] == [f"negative of {text}" for text in left.anchors]
    assert not {str(anchor).split(": ")[1] for anchor in held_out.anchors} & set(left.anchors)


def test_images(tmp_path):
    """The same image in two rows stays on one side."""
    from PIL import Image

    names = [f"{n}.png" for n in range(300)]
    for n, name in enumerate(names):
        Image.new("RGB", (4, 4), (n // 2 % 256, n // 512, 7)).save(tmp_path / name)
    photos = ImageColumn.of_paths(names, tmp_path, "'photo' of pairs.csv")
    pairs = PairData(anchors=[f"caption {n}" for n in range(300)], positives=photos)
    rows = held_out_rows(pairs, batch_size=16, seed=0)
    assert len(rows) == FEWEST
    np.testing.assert_array_equal(rows[::2] + 1, rows[1::2])
    left, held_out = split_pairs(pairs, rows)
    assert isinstance(left.positives, ImageColumn)
    assert held_out.anchors == [f"caption {row}" for row in rows]
    assert {*left.positive_id.tolist()} == {*range(125)}
