"""W ranks search, embed and mine as one process does; a search killed on all goes on with another number."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anybatch.core import distributed
from anybatch.core.blocks import BlockArrays, release_pages
from anybatch.core.errors import AnybatchError
from anybatch.mining import MiningConfig, MiningSet, exact_neighbors, ivf_neighbors, mine_shared
from anybatch.plans.plan import BatchPlan
from tests.ranks import on_ranks

from .test_mining import embeddings

KNOWN = {"anchor_id": np.arange(211), "positive_id": np.arange(211)}


# The ranks that only search import nothing of the pipeline: a process pays seconds for it.


UNIT_ROWS = {"exact": 2, "ivf": 3}  # queries searched together: small, so that there are blocks for all ranks


def small_shards():
    from anybatch.integrations.sentence_transformers import embed as embed_module

    embed_module.SHARD = 10


def run_config(folder, model, pairs, *, precision="float32"):
    from anybatch.integrations.sentence_transformers import ModelConfig
    from anybatch.run.config import DataConfig, RunConfig, TeacherConfig

    return RunConfig(
        output=str(folder),
        data=DataConfig(path=str(pairs)),
        model=ModelConfig(name=str(model), device="cpu"),
        teacher=TeacherConfig(name=str(model), precision=precision),  # pyright: ignore[reportArgumentType]
        mining=MiningConfig(method="anybatch", cluster_size=4, window=(2, 6)),
        batch_size=8,
    )


def mine(folder, model, pairs, **options):
    from anybatch.run.folder import open_run
    from anybatch.run.make_plan import make_plan
    from anybatch.run.read_data import read_training_pairs

    small_shards()
    config = run_config(folder, model, pairs, **options)
    with open_run(config):
        return make_plan(config, read_training_pairs(config))


def search(name, folder, progress=None):
    find = {"exact": exact_neighbors, "ivf": ivf_neighbors}[name]
    anchors, positives = embeddings(211, topics=20)
    folder = folder and Path(folder) / name
    return find(anchors, positives, 12, folder=folder, progress=progress, unit_rows=UNIT_ROWS[name], **KNOWN)


def worker(rank, world_size, folder, model, pairs, kill):
    done = []

    def progress(fraction):
        done.append(fraction)
        if kill and fraction > 0.5:
            os._exit(0)  # without a word, as the operating system would

    for name in ("exact", "ivf"):
        found = search(name, folder, progress)
        np.savez(f"{folder}/{name}-{rank}.npz", ids=found.ids, scores=found.scores, own=found.own_score)
    np.save(f"{folder}/blocks-{rank}.npy", len(done))
    (Path(folder) / f"digest-{rank}").write_text(mine(Path(folder) / "run", model, pairs).digest)


def keep_sizes(monkeypatch):
    from anybatch.integrations.sentence_transformers import embed as embed_module

    monkeypatch.setattr(embed_module, "SHARD", embed_module.SHARD)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_mine_as_one_process_does(world_size, tiny_model_folder, pairs_file, tmp_path, monkeypatch):
    keep_sizes(monkeypatch)
    alone = mine(tmp_path / "alone", tiny_model_folder, pairs_file)
    with tempfile.TemporaryDirectory() as folder:
        given = (folder, tiny_model_folder, pairs_file)
        if world_size == 3:  # two ranks were killed at half of the exact search
            on_ranks(worker, 2, *given, True)
            finished = np.load(Path(folder) / "exact" / "finished.npy")
            assert 0.4 < finished.any(axis=1).mean() < 0.8
        on_ranks(worker, world_size, *given, False)
        for name in ("exact", "ivf"):
            expected = search(name, None)
            for rank in range(world_size):
                found = np.load(f"{folder}/{name}-{rank}.npz")
                np.testing.assert_array_equal(found["ids"], expected.ids)
                np.testing.assert_array_equal(found["scores"], expected.scores)
                np.testing.assert_array_equal(found["own"], expected.own_score)
        shares = [int(np.load(f"{folder}/blocks-{rank}.npy")) for rank in range(world_size)]
        assert max(shares) - min(shares) <= 2, "every rank searched its share"
        assert min(shares) > 0
        digests = {(Path(folder) / f"digest-{rank}").read_text() for rank in range(world_size)}
        assert digests == {alone.digest}
        run = Path(folder) / "run"
        np.testing.assert_allclose(
            np.load(run / "teacher_anchor.npy"), np.load(tmp_path / "alone" / "teacher_anchor.npy"), atol=1e-6
        )
        assert BatchPlan.load(run / "plan.safetensors").digest == alone.digest
        assert not (run / "neighbors").exists()


def test_half_precision_teacher_files(tiny_model_folder, pairs_file, tmp_path, monkeypatch):
    keep_sizes(monkeypatch)
    plan = mine(tmp_path / "half", tiny_model_folder, pairs_file, precision="float16")
    assert np.load(tmp_path / "half" / "teacher_positive.npy", mmap_mode="r").dtype == np.float16
    assert plan.num_rows == 97


def test_block_arrays_refuse_what_would_lose_work(tmp_path, monkeypatch):
    shapes = {"x": ((10, 2), np.float32)}
    rows = {"rows": lambda block: slice(3 * block, 3 * block + 3)}
    kept = BlockArrays(shapes, 4, folder=tmp_path / "a", identity="one", **rows)
    kept.arrays["x"][:5] = 1
    kept.finish(1)
    again = BlockArrays(shapes, 4, folder=tmp_path / "a", identity="one", **rows)
    assert again.mine() == [0, 2, 3]
    assert again.arrays["x"].sum() == 10
    with pytest.raises(AnybatchError, match="3 of 4 blocks"):
        again.wait()
    with pytest.warns(UserWarning, match="starts again"):
        assert BlockArrays(shapes, 4, folder=tmp_path / "a", identity="two").mine() == [0, 1, 2, 3]
    (tmp_path / "file").write_text("")
    with pytest.raises(AnybatchError, match="Cannot write"):
        BlockArrays(shapes, 4, folder=tmp_path / "file" / "a")
    monkeypatch.setattr(distributed, "is_active", lambda: True)
    with pytest.raises(AnybatchError, match="give a folder"):
        BlockArrays(shapes, 4)


@pytest.mark.parametrize("place", ["numbers", "header", "record", "label", "cut", "empty", "gone", "of another search"])
def test_what_is_damaged_in_a_folder_of_blocks_is_done_again(place, tmp_path):
    shapes = {"x": ((12, 2), np.float32), "y": ((12,), np.int32)}

    def open_blocks(name="a"):
        settings = {"identity": name, "rows": lambda block: slice(3 * block, 3 * block + 3)}
        return BlockArrays(shapes, 4, folder=tmp_path / name, **settings)

    def work(blocks, base=0.0):
        done = blocks.mine()
        for block in done:
            blocks.arrays["x"][3 * block : 3 * block + 3] = base + block + 1
            blocks.arrays["y"][3 * block : 3 * block + 3] = block
            blocks.finish(block)
        blocks.wait()
        return done

    assert work(open_blocks()) == [0, 1, 2, 3]
    assert work(open_blocks()) == []
    work(open_blocks("b"), base=7.0)
    x, record, label = (tmp_path / "a" / name for name in ("x.npy", "finished.npy", "identity.json"))
    start = len(x.read_bytes()) - 12 * 2 * 4
    file, byte, anew = {
        "numbers": (x, start + 30, [1]),
        "header": (x, 20, [0, 1, 2, 3]),
        "record": (record, len(record.read_bytes()) - 40, [1]),
        "label": (label, 30, [0, 1, 2, 3]),
        "cut": (x, None, [0, 1, 2, 3]),
        "empty": (record, None, [0, 1, 2, 3]),
        "gone": (x, None, [0, 1, 2, 3]),
        "of another search": (x, None, [0, 1, 2, 3]),
    }[place]
    content = bytearray(file.read_bytes())
    if byte is not None:
        content[byte] ^= 16
        file.write_bytes(content)
    elif place == "of another search":
        for name in ("x.npy", "y.npy", "finished.npy"):
            (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    elif place == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: 0 if place == "empty" else -4])
    with pytest.warns(UserWarning, match="done again|starts again"):
        again = open_blocks()
    assert work(again) == anew
    assert again.arrays["x"][:, 0].tolist() == [1.0] * 3 + [2.0] * 3 + [3.0] * 3 + [4.0] * 3


def test_a_full_disk_is_found_before_the_search(tmp_path):
    """Mapped files of a full disk would end the process without a word; here files may not grow past 4 kB."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(AnybatchError, match=r"Cannot write .* GiB to .*: File too large\. Free some space"):
            BlockArrays({"x": ((1000, 2), np.float32)}, 4, folder=tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "a").exists()


def test_released_pages_leave_memory_and_come_back(tmp_path):
    from anybatch.core.resources import resident_bytes

    np.save(tmp_path / "x.npy", np.arange(8_000_000, dtype=np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r+")
    total = mapped.sum(dtype=np.float64)
    mapped[7] = 70.0
    before = resident_bytes()
    release_pages(mapped, np.arange(3))
    assert before - resident_bytes() > 20_000_000
    assert mapped.sum(dtype=np.float64) == total + 63


def refused_worker(rank, world_size, folder, model, pairs):
    """What `anybatch mine` refuses, each on both ranks; no search, and nobody waits for the other."""
    from typer.testing import CliRunner

    from anybatch.cli.app import app

    said = []
    pytest.MonkeyPatch().setattr("anybatch.mining.mine._rank", lambda *_, **__: said.append("searched"))
    anchors, positives = embeddings(211, topics=20)
    broken = anchors.copy()
    broken[100] = np.nan
    config = run_config(Path(folder) / "never", model, pairs).mining
    sets = tuple(MiningSet(name=str(row), num_rows=1) for row in range(211))
    for vectors, given in (
        (anchors, {"config": replace(config, batch_size=10)}),
        (anchors, {"config": replace(config, batch_size=300, cluster_size=4)}),
        (anchors, {"config": replace(config, batch_size=16), "sets": sets}),
        (broken, {"config": config}),
        (anchors[:, :-1], {"config": config}),
    ):
        try:
            mine_shared(vectors, positives, folder=Path(folder) / "never", **given, **KNOWN)
        except AnybatchError as error:
            said.append(str(error))
    given = ("--data", str(pairs), "--teacher", str(model), "--output", f"{folder}/never", "--batch-size", "10")
    result = CliRunner().invoke(app, ["mine", *given, "--set", "mining.cluster_size=4"])
    assert isinstance(result.exception, AnybatchError)
    said.append(str(result.exception))
    return said


@pytest.mark.distributed
def test_what_does_not_fit_is_refused_by_all_ranks_before_the_search(tiny_model_folder, pairs_file):
    with tempfile.TemporaryDirectory() as folder:
        said = on_ranks(refused_worker, 2, folder, tiny_model_folder, pairs_file)
        assert not (Path(folder) / "never").exists()
    assert said[0] == said[1]
    expected = (
        "batch_size 10 is not a multiple of mining.cluster_size 4",
        "The data has 211 rows, fewer than one batch of 300",
        "An epoch has 0 clusters of 4 rows, which do not fill one batch of 16",
        "1 of the anchor embeddings in rows 0 to 210",
        "Anchors have",
        "batch_size 10 is not a multiple",
    )
    assert len(said[0]) == len(expected)
    for words, part in zip(said[0], expected, strict=True):
        assert part in words
