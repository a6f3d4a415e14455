"""Parts of a run that are no verb of their own."""

from __future__ import annotations

import numpy as np
import pytest

from anybatch.errors import AnybatchError
from anybatch.mining import MiningConfig, mine_plan
from anybatch.pipeline import read_embeddings

VECTORS = np.random.default_rng(0).normal(size=(24, 8))


@pytest.mark.parametrize("kind", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "longdouble"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_embeddings_of_any_float_and_byte_order(tmp_path, kind, order):
    values = np.asarray(VECTORS, dtype=kind, order=order)
    np.save(tmp_path / "e.npy", values)
    got = read_embeddings(str(tmp_path / "e.npy"), 24)
    assert got.dtype.isnative
    assert got.dtype.itemsize <= 8
    np.testing.assert_array_equal(got, values.astype(got.dtype))
    config = MiningConfig(cluster_size=4, skip=1, take=6, batch_size=8)
    plan = mine_plan(got, got, config=config, anchor_id=np.arange(24), positive_id=np.arange(24)).plan
    plain = values.astype(np.float32)
    assert (
        plan.digest
        == mine_plan(plain, plain, config=config, anchor_id=np.arange(24), positive_id=np.arange(24)).plan.digest
    )


def _saved(array, **options):
    return lambda path: np.save(path, array, **options)


@pytest.mark.parametrize(
    ("save", "match"),
    [
        (_saved((VECTORS * 20).astype(np.int8)), "int8 array.*expected floats.*Quantised"),
        (_saved(np.packbits(VECTORS > 0, axis=1)), "uint8 array.*Quantised"),
        (_saved(VECTORS > 0), "bool array.*expected floats"),
        (_saved(VECTORS.astype(complex)), "complex128 array.*expected floats"),
        (_saved(VECTORS.astype(object), allow_pickle=True), "Cannot read the embeddings"),
        (
            _saved(VECTORS.astype("f4").view("V2")),
            r"expected floats of shape \(24, dimensions\)",
        ),  # as bfloat16 is saved
        (_saved(VECTORS[:-1]), r"shape \(23, 8\); expected floats of shape \(24, dimensions\)"),
        (_saved(VECTORS[:, 0]), r"shape \(24,\)"),
        (_saved(VECTORS[:, :, None]), r"shape \(24, 8, 1\)"),
        (
            lambda path: (
                path.with_suffix(".npz").rename(path) if np.savez(path.with_suffix(""), VECTORS) is None else None
            ),
            r"several arrays \(\.npz\)",
        ),
        (lambda path: path.write_bytes(b""), "Cannot read the embeddings"),
        (lambda path: path.write_text("no array"), "Cannot read the embeddings"),
        (lambda path: path.mkdir(), "Cannot read the embeddings"),
        (lambda path: None, "Cannot read the embeddings"),
    ],
)
def test_files_that_are_no_embeddings_of_the_data(tmp_path, save, match):
    path = tmp_path / "e.npy"
    save(path)
    with pytest.raises(AnybatchError, match=match):
        read_embeddings(str(path), 24)
