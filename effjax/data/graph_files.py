"""Graphs as ``.npz`` files, checked on reading."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from effjax.data.npz_files import read_arrays


def read_graph(path: Path) -> dict[str, np.ndarray]:
    """Read and check one graph; the arrays are those of the folder's README, ``y`` as int32.

    A user's own file may hold dense features ``x`` [N, F] in place of the CSR arrays.
    """
    graph = read_arrays(path)

    def check(holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"{path}: expected {expected}; it holds { {k: (v.dtype.name, v.shape) for k, v in graph.items()} }."
            )

    for key, array in graph.items():
        check(array.dtype.kind in "biuf", f"numbers in {key!r}")
        check(array.dtype.kind != "f" or bool(np.isfinite(array).all()), f"no NaN or infinity in {key!r}")
    check({"edge_index", "y"} <= graph.keys(), "arrays 'edge_index' [2, E] and 'y' [N]")
    check(graph["y"].ndim == 1 and graph["y"].dtype.kind in "iu" and len(graph["y"]) > 0, "integer classes 'y' [N]")
    nodes = len(graph["y"])
    check(graph["y"].min() >= 0, "classes 'y' >= 0")
    for key, array in graph.items():
        if key.startswith(("edge_index", "directed_edges")):
            check(array.ndim == 2 and array.shape[0] == 2, f"{key!r} of shape [2, E]")
        if key.startswith(("edge_index", "directed_edges")) or key.endswith("_idx"):
            check(array.dtype.kind in "iu" and _inside(array, nodes), f"node numbers below N={nodes} in {key!r}")
        if key.startswith("geom_"):
            check(array.dtype == np.uint8 and array.shape[1:] == (-(-nodes // 8),), f"bit-packed masks of N in {key!r}")
    if "x" in graph:
        check(graph["x"].ndim == 2 and len(graph["x"]) == nodes, "dense features 'x' of shape [N, F]")
    elif graph.keys() & {"x_indptr", "x_indices", "x_shape", "x_data"}:
        check({"x_indptr", "x_indices", "x_shape"} <= graph.keys(), "'x_indptr', 'x_indices' and 'x_shape' together")
        _check_rows(graph, nodes, check)
    return {**graph, "y": graph["y"].astype(np.int32)}


def _check_rows(graph: Mapping[str, np.ndarray], nodes: int, check: Callable[[bool, str], None]) -> None:
    starts, columns, shape = graph["x_indptr"], graph["x_indices"], graph["x_shape"].tolist()
    check(len(shape) == 2 and shape[0] == nodes, "'x_shape' = [N, F]")
    check(
        len(starts) == nodes + 1
        and starts[0] == 0
        and starts[-1] == len(columns)
        and bool((np.diff(starts) >= 0).all()),
        "'x_indptr' of N + 1 ascending row starts",
    )
    check(_inside(columns, shape[1]), f"'x_indices' below F={shape[1]}")
    check("x_data" not in graph or graph["x_data"].shape == columns.shape, "'x_data' as long as 'x_indices'")


def _inside(numbers: np.ndarray, bound: int) -> bool:
    return not numbers.size or bool(numbers.min() >= 0 and numbers.max() < bound)
