"""KaMinPar as a second partitioner. Its package reads graphs from files, so the graph goes through one: binary, and removed at once.

Cost: 8 bytes an edge and side on disk for the moment of reading, 16 in KaMinPar's own memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from anybatch.core.errors import AnybatchError
from anybatch.mining.partition import whole_weights

HEADER = 3  # numbers of 8 bytes: version, nodes, edges
# Bits of the version say what is missing or short: 1 no edge weights, 2 no node weights, 4, 8, 16, 32 for 32-bit edge numbers,
# node numbers, node weights, edge weights.
VERSION = 2 + 8 + 16 + 32
IMBALANCE = 0.03


def kaminpar_clusters(
    weight: sparse.csr_matrix, num_clusters: int, *, seed: int = 0, folder: Path | None = None
) -> np.ndarray:
    """KaMinPar on a graph with positive weights, on one thread, which makes it the same for the same seed.

    Args:
        weight: (n, n) symmetric CSR, weights >= 0.
        num_clusters: C.
        seed: KaMinPar's.
        folder: Where the graph's file lies for a moment; None for the system's.

    Returns:
        (n,) int32; sizes are roughly, not exactly, equal.

    Raises:
        AnybatchError: KaMinPar is not installed.

    Reference: "Deep Multilevel Graph Partitioning", Gottesbüren et al., ESA 2021.
    """
    kaminpar = import_kaminpar()
    num_rows = len(weight.indptr) - 1
    if num_clusters == 1:
        return np.zeros(num_rows, np.int32)
    if weight.nnz == 0:
        return (np.arange(num_rows) % num_clusters).astype(np.int32)
    graph = load_graph(weight, folder)
    kaminpar.reseed(seed)
    solver = kaminpar.KaMinPar(num_threads=1, ctx=kaminpar.default_context())
    return np.asarray(solver.compute_partition(graph, num_clusters, IMBALANCE), dtype=np.int32)


def import_kaminpar() -> Any:
    """The package.

    Raises:
        AnybatchError: It is not installed.
    """
    try:
        import kaminpar
    except ImportError as error:
        raise AnybatchError(
            "mining.partitioner 'kaminpar' needs the package kaminpar, which is not installed. Install anybatch[kaminpar], or set "
            "mining.partitioner to 'metis'."
        ) from error
    return kaminpar


def load_graph(weight: sparse.csr_matrix, folder: Path | None = None) -> Any:
    """The graph as KaMinPar holds it, through a file in ParHIP's binary format. Arguments as in `kaminpar_clusters`."""
    kaminpar = import_kaminpar()
    num_rows = len(weight.indptr) - 1
    # Where a node's neighbours begin is counted in bytes of the file, from its beginning.
    begin = 8 * (HEADER + num_rows + 1)
    offsets = begin + 4 * weight.indptr.astype(np.int64)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "graph.parhip"
        try:
            with path.open("wb") as file:
                np.array([VERSION, num_rows, weight.nnz], np.uint64).tofile(file)
                offsets.tofile(file)
                weight.indices.astype(np.int32, copy=False).tofile(file)
                whole_weights(weight).tofile(file)
        except OSError as error:
            raise AnybatchError(
                f"Cannot write the graph for KaMinPar to {path}: {error.strerror or error}. It takes {(begin + 8 * weight.nnz) / 2**30:.1f} GiB for "
                "a moment: free some space, or set mining.partitioner to 'metis'."
            ) from error
        return kaminpar.load_graph(str(path), kaminpar.GraphFileFormat.PARHIP)
