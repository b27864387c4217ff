"""Graphs as ``.npz`` files in the layouts people have, checked on reading.

The layout of this library: ``edge_index`` [2, E] and ``y`` [N], features ``x`` [N, F] or in compressed rows
``x_indptr``, ``x_indices``, (``x_data``), ``x_shape``, and optionally ``edge_weight`` [E], ``train_idx``, ``val_idx``,
``test_idx`` and ``unlabelled_idx``. Other layouts are brought into it:

- PyTorch Geometric's: ``train_mask`` and so on, bool [N]; ``edge_attr`` [E] or [E, 1];
- the GNN benchmark's: ``adj_data``, ``adj_indices``, ``adj_indptr``, ``adj_shape``, the same of ``attr``, ``labels``;
- SciPy's ``save_npz``, with the labels in a second file;
- Planetoid-like ones: ``features``, ``labels``, a dense ``adj``, ``idx_train``; ``node_features``, ``node_labels``,
  ``edges`` [E, 2], ``train_masks`` [splits, N].
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np

from effjax.core.files import first_line
from effjax.data.npz_files import READ_ERRORS, read_array, read_arrays

Arrays = dict[str, np.ndarray]
_ALIASES = {
    "y": ("labels", "label", "node_labels"),
    "x": ("features", "feats", "feat", "node_features", "attr", "attr_matrix"),
    "edge_weight": ("edge_weights", "weights", "edge_attr"),
    "adj": ("adjacency", "adj_matrix"),
    "train_idx": ("idx_train",),
    "val_idx": ("idx_val", "valid_idx", "idx_valid"),
    "test_idx": ("idx_test",),
    "train_mask": ("train_masks",),
    "val_mask": ("valid_mask", "val_masks"),
    "test_mask": ("test_masks",),
}
_SPLITS = ("train", "val", "test")
NAMES = ("node_names", "attr_names", "class_names")  # texts that describe
_KNOWN = re.compile(
    r"y|x|x_(data|indices|indptr|shape)|edge_weight|edge_index(_.+)?|directed_edges.*|geom_.+|target"
    r"|(rand_)?(train|val|test)_idx|(unlabelled|nettack_target)_idx|(train|val|test)_mask"
)
_MATRIX = {"format", "shape", "data"}
UNREAD = re.compile(r"geom_.+|directed_edges.*|target|nettack_target_idx")  # of this library's files, not a GraphData's
_LAYOUTS = (
    "Layouts that are read: edge_index [2, E], y [N], x [N, F], train_mask, edge_weight (PyTorch Geometric); "
    "adj_indices, adj_indptr, adj_shape with attr_* and labels (GNN benchmark); SciPy's save_npz with labels=FILE"
)


def read_graph(
    path: Path,
    *,
    labels: Path | None = None,
    features: Path | None = None,
    leave_out: Collection[str] = (),
    which_split: int | None = None,
) -> Arrays:
    """Read and check one graph; the arrays are those of the module's layout, ``y`` as int32, -1 where unknown.

    Args:
      path: an ``.npz`` file.
      labels: a second file, with the labels of a matrix saved by SciPy: ``.npy`` [N], or ``.npz`` with ``y`` and
        whatever else belongs to the graph.
      features: a file with the features: ``.npy`` [N, F], or ``.npz`` as SciPy saves a matrix.
      leave_out: names of arrays not to read.
      which_split: which of several stored splits to take, where masks have a second axis.
    """
    arrays = _raw(path, leave_out)
    for key, file in (("labels", labels), ("features", features)):
        if file is not None:
            arrays |= _second(path, key, file, arrays, leave_out)
    if lost := set(leave_out) - _held(path, labels, features):
        raise ValueError(f"leave_out={sorted(lost)}: {path} has no such arrays.")
    graph = _standard(path, arrays, which_split)
    return _checked(path, graph)


def _held(*paths: Path | None) -> set[str]:
    held = set()
    for path in paths:
        if path is not None and path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                held |= set(archive.files)
    return held


def _raw(path: Path, leave_out: Collection[str]) -> Arrays:
    arrays = read_arrays(path, leave_out)
    if arrays.keys() >= _MATRIX:
        return _coordinates("adj", _matrix(path))
    return arrays


def _matrix(path: Path):
    import scipy.sparse

    try:
        matrix = scipy.sparse.load_npz(path)
        # SciPy's conversions read and write at whatever place the indices say.
        if hasattr(matrix, "check_format"):
            matrix.check_format(full_check=True)
        return matrix.tocoo()
    except (*READ_ERRORS, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not a matrix as scipy.sparse.save_npz writes it ({first_line(error)}).") from error


def _coordinates(prefix: str, matrix) -> Arrays:
    rows = matrix.tocsr()  # sums entries that stand twice, as SciPy does everywhere
    rows.sum_duplicates()
    return {f"{prefix}_{name}": np.asarray(getattr(rows, name)) for name in ("data", "indices", "indptr", "shape")}


def _second(path: Path, key: str, file: Path, arrays: Arrays, leave_out: Collection[str]) -> Arrays:
    if file.suffix == ".npy":
        return {key: read_array(file)}
    if file.suffix != ".npz":
        raise ValueError(f"{key}={str(file)!r} must be an .npy or .npz file.")
    held = read_arrays(file, leave_out)
    if held.keys() >= _MATRIX:
        if key == "labels":
            raise ValueError(
                f"labels={str(file)!r} holds a matrix. Labels are an array [N]: numpy.save('labels.npy', y)."
            )
        return _coordinates("attr", _matrix(file))
    if twice := sorted(held.keys() & arrays.keys()):
        raise ValueError(f"{key}={str(file)!r}: {twice} stand in {path} too. Leave them out of one: leave_out={twice}.")
    return held


# Layouts


def _standard(path: Path, arrays: Arrays, which_split: int | None) -> Arrays:
    graph = {re.sub(r"^(adj|attr)_matrix\.", r"\1_", name): array for name, array in arrays.items()}
    for name, others in _ALIASES.items():
        found = [other for other in (name, *others) if other in graph]
        if len(found) > 1:
            raise ValueError(f"{path}: {found} mean the same. Leave all but one out: leave_out={found[1:]}.")
        if found:
            graph[name] = graph.pop(found[0])
    for name in NAMES:
        graph.pop(name, None)
    if single := [name for name, array in graph.items() if not array.ndim and not UNREAD.fullmatch(name)]:
        raise ValueError(f"{path}: {single} hold one value each, no arrays. Leave them out: leave_out={single}.")
    for part in ("data", "indices", "indptr", "shape"):
        if f"attr_{part}" in graph:
            graph[f"x_{part}"] = graph.pop(f"attr_{part}")
    graph = _edges_of_matrix(path, graph)
    if "edges" in graph:
        edges = graph.pop("edges")
        graph["edge_index"] = edges.T if edges.ndim == 2 and edges.shape[1] == 2 else edges
    if not {"edge_index", "y"} <= graph.keys():
        lacking = "labels" if "edge_index" in graph else "edges"
        way = " Give them in a second file: labels=FILE." if lacking == "labels" else ""
        raise ValueError(
            f"{path}: expected arrays 'edge_index' [2, E] and 'y' [N]; {lacking} are missing.{way} "
            f"{_LAYOUTS}; it holds {_said(arrays)}."
        )
    if unknown := [name for name in graph if not _KNOWN.fullmatch(name)]:
        raise ValueError(
            f"{path}: does not know the arrays {unknown}. {_LAYOUTS}. Leave out what need not be read: "
            f"leave_out={unknown}."
        )
    return _indices(path, _flattened(path, graph), which_split)


def _edges_of_matrix(path: Path, graph: Arrays) -> Arrays:
    """Row i, column j of an adjacency matrix is an edge from node i to node j."""
    kinds = [name for name in ("adj", "adj_indptr", "edge_index", "edges") if name in graph]
    if len(kinds) > 1:
        raise ValueError(f"{path}: {kinds} all hold edges. Leave all but one out: leave_out={kinds[1:]}.")
    if "adj" in graph:
        dense = graph.pop("adj")
        if dense.ndim != 2 or dense.shape[0] != dense.shape[1] or dense.dtype.kind not in "biuf":
            raise ValueError(f"{path}: 'adj' is {dense.dtype}{list(dense.shape)}; expected numbers [N, N].")
        senders, receivers = np.nonzero(dense)
        values, nodes = dense[senders, receivers], len(dense)
    elif parts := {name for name in graph if name.startswith("adj_")}:
        if not {"adj_indices", "adj_indptr", "adj_shape"} <= parts:
            raise ValueError(f"{path}: holds {sorted(parts)}; expected adj_indices, adj_indptr and adj_shape together.")
        receivers, starts, shape = (graph.pop(f"adj_{name}") for name in ("indices", "indptr", "shape"))
        values = graph.pop("adj_data", np.ones(len(receivers)))
        whole = all(part.ndim == 1 and part.dtype.kind in "iu" for part in (receivers, starts, shape))
        if not whole or shape.shape != (2,) or values.ndim != 1 or values.dtype.kind not in "biuf":
            kinds = {
                name: f"{part.dtype}{list(part.shape)}"
                for name, part in (("indices", receivers), ("indptr", starts), ("shape", shape), ("data", values))
            }
            raise ValueError(f"{path}: expected 'adj_*' of one axis, integers but for the data; it holds {kinds}.")
        nodes = int(shape[0])
        climbs = len(starts) == nodes + 1 and starts[0] == 0 and (np.diff(starts) >= 0).all()
        if len(set(shape.tolist())) > 1 or not climbs or starts[-1] != len(receivers) or len(values) != len(receivers):
            raise ValueError(f"{path}: 'adj_indptr', 'adj_indices', 'adj_data' and 'adj_shape' do not fit together.")
        senders = np.repeat(np.arange(nodes), np.diff(starts))
        senders, receivers, values = senders[values != 0], receivers[values != 0], values[values != 0]
    else:
        return graph
    if "y" in graph and len(graph["y"]) != nodes:
        raise ValueError(f"{path}: {len(graph['y'])} labels for the {nodes} nodes of the adjacency matrix.")
    if "edge_weight" in graph:
        raise ValueError(
            f"{path}: 'edge_weight' beside an adjacency matrix, whose values are the weights. Leave it out."
        )
    weighted = {} if (values == 1).all() else {"edge_weight": values}
    return {**graph, "edge_index": np.stack([senders, receivers]), **weighted}


def _flattened(path: Path, graph: Arrays) -> Arrays:
    """Labels and weights with a second axis of 1 as vectors; those with more are refused."""
    for name, what, way in (
        ("y", "classes", "One-hot labels become numbers by y.argmax(1); several labels per node are not read."),
        ("edge_weight", "weights", "Vectors per edge are not read: leave_out=['edge_attr'], or make them one weight."),
    ):
        if name in graph and graph[name].ndim > 1:
            if graph[name].shape[1:] != (1,):
                raise ValueError(
                    f"{path}: {what} {name!r} have shape {list(graph[name].shape)}; expected one axis. {way}"
                )
            graph[name] = graph[name][:, 0]
    return graph


def _indices(path: Path, graph: Arrays, which_split: int | None) -> Arrays:
    """Masks as node numbers."""
    nodes, several = len(graph["y"]), 0
    for split in _SPLITS:
        mask = graph.pop(f"{split}_mask", None)
        if mask is None:
            continue
        if f"{split}_idx" in graph:
            raise ValueError(
                f"{path}: has '{split}_mask' and '{split}_idx'. Leave one out: leave_out=['{split}_mask']."
            )
        if mask.ndim == 2 and mask.shape[0] == nodes:
            mask = mask.T
        if mask.ndim == 2 and mask.shape[1] == nodes:
            several = max(several, len(mask))
            if len(mask) > 1 and (which_split is None or not 0 <= which_split < len(mask)):
                raise ValueError(
                    f"{path}: '{split}_mask' holds {len(mask)} splits; which_split={which_split}. Choose one: "
                    f"which_split=0 to {len(mask) - 1}."
                )
            mask = mask[which_split if len(mask) > 1 else 0]
        if mask.shape != (nodes,) or mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
            raise ValueError(
                f"{path}: '{split}_mask' is {mask.dtype}{list(mask.shape)}; expected booleans [N] with N={nodes}. Node "
                f"numbers are called '{split}_idx'."
            )
        graph[f"{split}_idx"] = np.flatnonzero(mask)
    if which_split is not None and several < 2:
        raise ValueError(f"which_split={which_split}: {path} holds one split at most. Leave it out.")
    return graph


# Checks


def _checked(path: Path, graph: Arrays) -> Arrays:
    def check(holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{path}: expected {expected}; it holds {_said(graph)}.")

    for key, array in graph.items():
        check(array.dtype.kind in "biuf", f"numbers in {key!r}")
        check(array.dtype.kind != "f" or bool(np.isfinite(array).all()), f"no NaN or infinity in {key!r}")
    y = graph["y"]
    check(y.ndim == 1 and y.dtype.kind in "iu" and len(y) > 0, "integer classes 'y' [N], -1 where unknown")
    if y.min() < -1 or y.max() > np.iinfo(np.int32).max:
        raise ValueError(
            f"{path}: classes 'y' run from {y.min()} to {y.max()}; expected classes 'y' >= 0 within int32, and -1 (or "
            "a number in 'unlabelled_idx') for nodes whose class is unknown."
        )
    nodes = len(y)
    for key, array in graph.items():
        if key.startswith(("edge_index", "directed_edges")):
            check(array.ndim == 2 and array.shape[0] == 2, f"{key!r} of shape [2, E]")
        if key.startswith(("edge_index", "directed_edges")) or key.endswith("_idx"):
            check(array.dtype.kind in "iu", f"node numbers below N={nodes} in {key!r}")
            if not _inside(array, nodes):
                bad = array[(array < 0) | (array >= nodes)][0]
                raise ValueError(
                    f"{path}: expected node numbers below N={nodes} in {key!r}, as many as labels; it holds node "
                    f"{bad}. Remove such entries, or add the nodes."
                )
        if key.startswith("geom_"):
            check(array.dtype == np.uint8 and array.shape[1:] == (-(-nodes // 8),), f"bit-packed masks of N in {key!r}")
    if "edge_weight" in graph:
        weights = graph["edge_weight"]
        check(weights.shape == graph["edge_index"].shape[1:], "one 'edge_weight' per edge")
        if weights.size and weights.min() <= 0:
            raise ValueError(
                f"{path}: edge weights from {weights.min():g} to {weights.max():g}; they must be above 0, as degrees "
                "are sums of them. Drop edges of weight 0, or leave_out the weights."
            )
    if "x" in graph:
        check(graph["x"].ndim == 2 and len(graph["x"]) == nodes, "dense features 'x' of shape [N, F]")
        check(not graph.keys() & {"x_indptr", "x_indices"}, "features as 'x' or in compressed rows, not both")
    elif graph.keys() & {"x_indptr", "x_indices", "x_shape", "x_data"}:
        check({"x_indptr", "x_indices", "x_shape"} <= graph.keys(), "'x_indptr', 'x_indices' and 'x_shape' together")
        _check_rows(graph, nodes, check)
    _check_splits(path, graph)
    return {**graph, "y": y.astype(np.int32)}


def _check_splits(path: Path, graph: Arrays) -> None:
    splits = {f"{name}_idx": graph[f"{name}_idx"] for name in _SPLITS if f"{name}_idx" in graph}
    unknown = np.flatnonzero(graph["y"] < 0)
    unknown = np.union1d(unknown, graph.get("unlabelled_idx", unknown))
    seen: dict[int, str] = {}
    for name, numbers in splits.items():
        if numbers.ndim != 1:
            raise ValueError(f"{path}: {name!r} has shape {list(numbers.shape)}; expected one axis of node numbers.")
        for node in numbers.tolist():
            if node in seen:
                raise ValueError(
                    f"{path}: node {node} stands in {seen[node]!r} and {name!r}. Every node has one place."
                )
            seen[node] = name
        if (nameless := np.intersect1d(numbers, unknown)).size:
            raise ValueError(f"{path}: {name!r} holds nodes without a class, such as {nameless[0]}. Take them out.")


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
    check(columns.dtype.kind in "iu" and _inside(columns, shape[1]), f"integers 'x_indices' below F={shape[1]}")
    check("x_data" not in graph or graph["x_data"].shape == columns.shape, "'x_data' as long as 'x_indices'")


def _inside(numbers: np.ndarray, bound: int) -> bool:
    return not numbers.size or bool(numbers.min() >= 0 and numbers.max() < bound)


def _said(graph: Mapping[str, np.ndarray]) -> str:
    return str({key: (array.dtype.name, array.shape) for key, array in graph.items()})
