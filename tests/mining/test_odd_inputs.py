"""Odd inputs of the public functions of mining end in a result or in one message, never in another error and never in a
crash.

The compiled loops check no index. All cases of a function run in one process of their own, which says what became of
each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from anybatch.core.errors import AnybatchError
from anybatch.mining import (
    MiningConfig,
    MiningSet,
    Window,
    build_graph,
    equal_clusters,
    exact_neighbors,
    ivf_neighbors,
    metis_clusters,
    mine_plan,
    random_plan,
    sample_negatives,
)
from anybatch.plans.plan import BatchPlan

ROWS = 60
rng = np.random.default_rng(0)
X = rng.normal(size=(ROWS, 8)).astype(np.float32)
IDS = np.arange(ROWS)
CONFIG = MiningConfig(batch_size=8, cluster_size=4, window=(2, 6))
NEIGHBORS = exact_neighbors(X, X, 8, anchor_id=IDS, positive_id=IDS)
GRAPH = build_graph(NEIGHBORS, Window(2, 6))


def changed(array: np.ndarray, value: Any, dtype: Any = None) -> np.ndarray:
    """A copy with one number changed."""
    copy = array.astype(dtype or array.dtype)
    copy.reshape(-1)[7] = value
    return copy


def sparse_with(value: float) -> sparse.csr_matrix:
    """The graph's signed weights with one of them changed."""
    signed = GRAPH.signed(3.0)
    signed.data[7] = value
    return signed


ODD_IDS = {
    "ids of 10^15": IDS + 10**15,
    "negative ids": IDS - 30,
    "ids as texts": IDS.astype(str),
    "all ids equal": np.zeros(ROWS, np.int64),
    "too few ids": IDS[:-1],
    "too many ids": np.arange(ROWS + 1),
    "ids as floats": IDS.astype(float),
    "ids as bool": IDS > 5,
    "ids in two columns": np.stack([IDS, IDS], 1),
    "ids as a list": IDS.tolist(),
    "ids as uint8": IDS.astype(np.uint8),
}
ODD_EMBEDDINGS = {
    "nan": changed(X, np.nan),
    "infinite": changed(X, np.inf),
    "all zero": np.zeros_like(X),
    "all equal": np.ones_like(X),
    "infinite in float32": changed(X, 1e300, np.float64),
    "large": X * np.float32(1e30),
    "small": X * np.float32(1e-30),
    "big-endian": X.astype(">f4"),
    "float16": X.astype(np.float16),
    "float64": X.astype(np.float64),
    "longdouble": X.astype(np.longdouble),
    "int8": (X * 20).astype(np.int8),
    "bool": X > 0,
    "complex": X.astype(complex),
    "objects": X.astype(object),
    "texts": X.astype(str),
    "a list": X.tolist(),
    "none": None,
    "no rows": X[:0],
    "one row": X[:1],
    "fewer rows": X[:-1],
    "no columns": X[:, :0],
    "one column": X[:, :1],
    "flat": X.reshape(-1),
    "three axes": X.reshape(ROWS, 4, 2),
    "transposed": np.asfortranarray(X),
    "every second": np.repeat(X, 2, axis=0)[::2],
    "read-only": np.broadcast_to(X[:1], X.shape),
}
ODD_NUMBERS = {"zero": 0, "negative": -1, "huge": 2**40, "more than rows": ROWS + 1}


def mined(**settings: Any) -> Callable[[], object]:
    """Mining with other settings than usual."""
    return lambda: mine_plan(X, X[::-1], config=replace(CONFIG, **settings))


def cases() -> dict[str, dict[str, Callable[[], object]]]:
    """For each function its odd calls."""
    ids: dict[str, Any] = {"anchor_id": IDS, "positive_id": IDS}
    start = np.arange(ROWS) // 4
    signed = GRAPH.signed(3.0)
    return {
        "mine_plan, embeddings": {
            f"{name} {method}": lambda value=value, method=method: mine_plan(
                value, value, config=replace(CONFIG, method=method)
            )
            for name, value in ODD_EMBEDDINGS.items()
            for method in ("anybatch", "published", "saha", "kmeans", "bandwidth", "loss_ordered", "random")
        },
        "mine_plan, one side": {
            name: lambda value=value: mine_plan(X, value, config=CONFIG) for name, value in ODD_EMBEDDINGS.items()
        },
        "mine_plan, ids": {
            f"{name} {side}": lambda value=value, side=side: mine_plan(
                X, X, config=replace(CONFIG, num_negatives=2), **{side: value}
            )
            for name, value in ODD_IDS.items()
            for side in ("anchor_id", "positive_id")
        },
        "mine_plan, settings": {
            **{
                f"{field} {value}": mined(**{field: value})
                for field, values in {
                    "window": ((0, 1), (59, 59), (2**40, 2**40), (2, 0)),
                    "cluster_size": (2, 8, 59, 60, 61, 2**40),
                    "batch_size": (1, 4, 60, 64, 2**40),
                    "margin": (0.0, 3e38),
                    "conflict_weight": (0.0, 1e6, 1e-30),
                    "num_negatives": (1, 7, 59, 100),
                    "seed": (2**31, 2**32 - 1),
                    "neighbors": ("ivf",),
                }.items()
                for value in values
            },
            "sets that do not add up": lambda: mine_plan(X, X, config=CONFIG, sets=[MiningSet(name="a", num_rows=5)]),
            "a set of no rows": lambda: mine_plan(
                X, X, config=CONFIG, sets=[MiningSet(name="a", num_rows=0), MiningSet(name="b", num_rows=ROWS)]
            ),
            "a set of one row": lambda: mine_plan(
                X, X, config=CONFIG, sets=[MiningSet(name="a", num_rows=1), MiningSet(name="b", num_rows=ROWS - 1)]
            ),
        },
        "random plans": {
            **{
                f"BatchPlan rows {name}": lambda value=value: BatchPlan.random(value, 8)
                for name, value in ODD_NUMBERS.items()
                if value < 2**40
            },
            **{
                f"BatchPlan batch {name}": lambda value=value: BatchPlan.random(ROWS, value)
                for name, value in ODD_NUMBERS.items()
            },
            **{
                f"BatchPlan seed {name}": lambda value=value: BatchPlan.random(ROWS, 8, seed=value).epoch_batches(0)
                for name, value in ODD_NUMBERS.items()
            },
            **{
                f"random_plan rows {value}": lambda value=value: random_plan(value, config=CONFIG)
                for value in (-1, 0, 1, 7, 8)
            },
        },
        "equal_clusters": {
            **{
                f"start {name}": lambda value=value: equal_clusters(value, signed, 4, **ids)
                for name, value in {
                    "negative": start - 1,
                    "large": start + 1,
                    "floats": start.astype(float),
                    "uint8": start.astype(np.uint8),
                    "alike": start * 0,
                    "short": start[1:],
                    "none": start[:0],
                }.items()
            },
            **{
                f"cluster_size {value}": lambda value=value: equal_clusters(start * 0, signed, value, **ids)
                for value in (-1, 0, 1, 7, 60, 61)
            },
            **{
                f"weight {value}": lambda value=value: equal_clusters(start, sparse_with(value), 4, **ids)
                for value in (np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0)
            },
            **{
                f"sweeps {value}": lambda value=value: equal_clusters(start, signed, 4, sweeps=value, **ids)
                for value in (-1, 0, 1)
            },
            **{
                name: lambda value=value: equal_clusters(start, signed, 4, **{**ids, "positive_id": value})
                for name, value in ODD_IDS.items()
            },
            "another graph": lambda: equal_clusters(start, signed[:10, :10], 4, **ids),
        },
        "metis_clusters": {
            **{
                f"clusters {value}": lambda value=value: metis_clusters(GRAPH.weight, value, recursive=True)
                for value in (-1, 0, 1, 7, 60, 61, 1000)
            },
            **{
                f"weight {value}": lambda value=value: metis_clusters(abs(sparse_with(value)), 5, recursive=False)
                for value in (np.nan, np.inf, 3e38, 0.0)
            },
            **{
                f"seed {value}": lambda value=value: metis_clusters(GRAPH.weight, 5, recursive=True, seed=value)
                for value in (-1, 2**32, 2**40)
            },
            "all weights zero": lambda: metis_clusters(GRAPH.weight * 0, 5, recursive=True),
            "negative weights": lambda: metis_clusters(-GRAPH.weight, 5, recursive=True),
        },
        "neighbours": {
            **{
                f"{search.__name__} {name}": lambda value=value, search=search: search(
                    value, value, 5, anchor_id=IDS[: len(value)], positive_id=IDS[: len(value)]
                )
                for name, value in ODD_EMBEDDINGS.items()
                if isinstance(value, np.ndarray) and value.ndim == 2
                for search in (exact_neighbors, ivf_neighbors)
            },
            **{
                f"{search.__name__} neighbours {value}": lambda value=value, search=search: search(X, X, value, **ids)
                for value in (-1, 0, 1, ROWS, 1000)
                for search in (exact_neighbors, ivf_neighbors)
            },
            **{
                f"{search.__name__} {name}": lambda value=value, search=search: search(
                    X, X, 5, anchor_id=value, positive_id=IDS
                )
                for name, value in ODD_IDS.items()
                for search in (exact_neighbors, ivf_neighbors)
            },
            **{
                f"rows {value}": lambda value=value: exact_neighbors(X, X, 5, rows=np.array(value), **ids)
                for value in ([-1], [ROWS], [0, 0], [0.5])
            },
            "fewer documents": lambda: exact_neighbors(X, X[1:], 5, **ids),
            "narrower documents": lambda: exact_neighbors(X, X[:, 1:], 5, **ids),
        },
        "graph and negatives": {
            **{
                f"skip {skip} take {take}": lambda skip=skip, take=take: build_graph(NEIGHBORS, Window(skip, take))
                for skip, take in ((-1, 5), (0, 0), (0, -3), (100, 100))
            },
            **{
                f"margin {value}": lambda value=value: build_graph(NEIGHBORS, Window(2, 6, value))
                for value in (np.nan, -1.0, np.inf)
            },
            **{
                f"neighbour {value}": lambda value=value: build_graph(
                    replace(NEIGHBORS, ids=changed(NEIGHBORS.ids, value)), Window(2, 6)
                )
                for value in (-5, ROWS, 2**31 - 1)
            },
            **{
                f"num_negatives {value}": lambda value=value: sample_negatives(GRAPH, start, value, **ids)
                for value in (-1, 0, 7, 100)
            },
            **{
                f"seed {value}": lambda value=value: sample_negatives(GRAPH, start, 2, seed=value, **ids)
                for value in (-1, 2**40)
            },
            **{
                f"clusters {name}": lambda value=value: sample_negatives(GRAPH, value, 2, **ids)
                for name, value in (("short", start[1:]), ("negative", start - 9), ("large", start + 10**9))
            },
            **{
                name: lambda value=value: sample_negatives(GRAPH, start, 2, anchor_id=value, positive_id=IDS)
                for name, value in ODD_IDS.items()
            },
        },
    }


def results(calls: dict[str, Callable[[], object]]) -> dict[str, str]:
    """What becomes of each call: "" or the error, the message of a refusal among them."""
    said = {}
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                call()
            said[name] = ""
        except AnybatchError as error:
            said[name] = f"refused: {error}"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


@pytest.fixture(scope="module")
def outcomes():
    """One process a function, so that a crash is one failed test."""

    def run(name: str) -> dict[str, str]:
        program = f"import json; from {__name__} import cases, results; print(json.dumps(results(cases()[{name!r}])))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize("function", list(cases()))
def test_a_result_or_a_message(function, outcomes):
    said = outcomes(function)
    assert {name: words for name, words in said.items() if words and not words.startswith("refused: ")} == {}
    assert "" in said.values(), "some of these calls are right, and must not be refused"
    assert any(words.startswith("refused: ") for words in said.values())


def test_the_settings_of_the_segfault_are_refused_by_name():
    with pytest.raises(AnybatchError, match=r"mining\.conflict_weight is nan; expected auto, or a finite number"):
        replace(CONFIG, conflict_weight=float("nan"))


def test_right_calls_of_unusual_kinds_give_the_usual_plan():
    """Ids stand for equality alone, embeddings for their values: other types for the same change nothing."""
    ids = np.arange(ROWS) // 2
    usual = mine_plan(X, X, config=CONFIG, anchor_id=ids).plan.digest
    for other in (ids + 10**15, ids * 10**17, ids[::-1].copy(), ids.astype(np.uint8), ids.tolist()):
        assert mine_plan(X, X, config=CONFIG, anchor_id=other).plan.digest == usual
    for other in (X.astype(">f4"), X.astype(np.float64), X.astype(np.longdouble), np.asfortranarray(X)):
        assert mine_plan(other, other, config=CONFIG, anchor_id=ids).plan.digest == usual
