"""Graphs of the user's own: ``.npz`` files in the usual layouts, and edge lists with a table of nodes."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effjax.data.facts import Facts, fingerprint, spread
from effjax.data.graph_files import NAMES, UNREAD, read_graph
from effjax.data.graphs import GraphData, build_graph
from effjax.data.labels import read_labels
from effjax.data.splits import own_name
from effjax.data.tables import Column, Table, existing, missing, numbers, pick, read_table, rows_text

_SOURCES = ("source", "src", "sender", "from", "u", "node1")
_TARGETS = ("target", "dst", "receiver", "to", "v", "node2")
_WEIGHTS = ("weight", "edge_weight")
_IDS = ("id", "node", "node_id", "name")
_LABELS = ("label", "class", "y")
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_UNKNOWN = ("", "-1", "none", "nan", "null", "unknown")


def graph_from_files(
    path: str | os.PathLike,
    *,
    labels: str | os.PathLike | None = None,
    features: str | os.PathLike | None = None,
    nodes: str | os.PathLike | None = None,
    source: str | None = None,
    target: str | None = None,
    weight: str | None = None,
    id: str | None = None,
    label: str | None = None,
    values: str | Sequence[str] | None = None,
    node_split: str | None = None,
    which_split: int | None = None,
    undirected: bool = False,
    leave_out: str | Sequence[str] = (),
) -> GraphData:
    r"""A graph with a class per node.

    The path is an ``.npz`` file in one of the layouts of ``effjax.data.graph_files``, or an edge list: a table as
    ``read_table`` takes it with two columns of node names, to which belongs a table ``nodes`` with one row per node.
    Masks and edge weights are read. What is not known is refused; ``leave_out`` names what need not be read.

    Args:
      path: the ``.npz`` file or the edge list.
      labels: for an ``.npz`` file that holds a matrix only: an ``.npy`` or ``.npz`` file with the labels.
      features: the same for the features.
      nodes: the table of nodes that belongs to an edge list.
      source: the column of the nodes that edges leave; ``source`` and the like when None.
      target: the column of the nodes that edges enter.
      weight: the column of edge weights, above 0; ``weight`` when None, where there is one.
      id: the column of the nodes' names in ``nodes``.
      label: the column of their classes; empty or -1 where unknown.
      values: the columns of the features; all others when None.
      node_split: the column that says ``train``, ``val`` or ``test``; empty for none of them.
      which_split: which split to take from an ``.npz`` file that holds several.
      undirected: add the reverse of every edge. As stored when False.
      leave_out: arrays or columns not to read.

    Returns:
      A ``GraphData``; self-loops and repeated edges are dropped. ``facts`` describes it.

    Raises:
      ValueError: an edge names a node that is not there, a column or array is missing or unknown, values are not
        finite, or there is one class only.
      FileNotFoundError: nothing is there.

    Example:
      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (folder / "edges.csv").write_text("source,target\nann,bob\nbob,eve\n")
      >>> _ = (folder / "people.csv").write_text("id,age,label\nann,31,x\nbob,25,y\neve,40,\n")
      >>> graph = graph_from_files(folder / "edges.csv", nodes=folder / "people.csv", undirected=True)
      >>> graph.senders.tolist(), graph.receivers.tolist(), graph.labels.tolist(), graph.features.tolist()
      ([1, 0, 2, 1], [0, 1, 1, 2], [0, 1, -1], [[31.0], [25.0], [40.0]])
    """
    file = existing(path)
    leave_out = [leave_out] if isinstance(leave_out, str) else list(leave_out)
    of_table = {"nodes": nodes, "source": source, "target": target, "weight": weight, "id": id, "label": label}
    of_table |= {"values": values, "node_split": node_split}
    of_archive = {"labels": labels, "features": features, "which_split": which_split}
    archive = file.suffix.lower() == ".npz"
    for name, value in (of_table if archive else of_archive).items():
        if value is not None:
            raise ValueError(f"{name}={value!r} is for {'edge lists' if archive else '.npz files'}, not for {file}.")
    if archive:
        arrays = read_graph(
            file,
            labels=None if labels is None else existing(labels, "labels"),
            features=None if features is None else existing(features, "features"),
            leave_out=leave_out,
            which_split=which_split,
        )
        names, left = _names(file, int(arrays["y"].max()) + 1, leave_out)
        left += [name for name in arrays if UNREAD.fullmatch(name)]
    else:
        if file.name.startswith("ind.") or file.suffix in (".pkl", ".pickle", ".pt"):
            raise ValueError(
                f"{file}: pickled files (Planetoid's ind.*, .pkl, .pt) are never loaded. Load it yourself, and "
                "save numpy.savez(FILE, edge_index=..., x=..., y=..., train_mask=...)."
            )
        arrays, names = _edge_list(read_table(file), of_table, leave_out)
        left = []
    graph = build_graph(own_name(path), "", arrays, undirected=undirected, where=str(file))
    known = graph.labels[graph.labels >= 0]
    if len(np.unique(known)) < 2:
        raise ValueError(f"{file}: every node of known class is of one class. There is nothing to tell apart.")
    facts = _facts(graph, arrays, names, [*leave_out, *left], undirected)
    return graph._replace(source=facts.source(os.fspath(path)), facts=facts)


def _names(file: Path, classes: int, leave_out: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """Class names of an archive, and its arrays of other names, which describe and are not read."""
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
        held = [name for name in NAMES if name in archive.files and name not in leave_out]
        found = archive["class_names"] if "class_names" in held else np.zeros(0)
    if found.shape == (classes,) and len(set(found.tolist())) == classes:
        return tuple(map(str, found.tolist())), [name for name in held if name != "class_names"]
    return tuple(map(str, range(classes))), held


def _edge_list(
    edges: Table, given: Mapping[str, Any], leave_out: list[str]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    if given["nodes"] is None:
        raise ValueError(f"{edges.where}: an edge list has no classes. Give the table of nodes: nodes=FILE.")
    table = read_table(given["nodes"])
    if lost := [name for name in leave_out if name not in edges.columns and name not in table.columns]:
        raise ValueError(f"leave_out={lost}: neither {edges.where} nor {table.where} has such columns.")
    id = pick(table, "id", given["id"], _IDS)
    number = _numbered(table, id)
    source, target = pick(edges, "source", given["source"], _SOURCES), pick(edges, "target", given["target"], _TARGETS)
    weight = given["weight"]
    if weight is not None or any(name in edges.columns and name not in leave_out for name in _WEIGHTS):
        weight = pick(edges, "weight", weight, _WEIGHTS)
    if unknown := [name for name in edges.columns if name not in (source, target, weight, *leave_out)]:
        raise ValueError(
            f"{edges.where}: does not know what the columns {unknown} of the edges are. Name a weight by "
            f"weight=COLUMN, or leave them out: leave_out={unknown}."
        )
    arrays = {"edge_index": np.stack([_ends(edges, name, number, table, id) for name in (source, target)])}
    if weight is not None:
        arrays["edge_weight"] = numbers(f"weight={weight!r} of {edges.where}", edges.columns[weight])
        if arrays["edge_weight"].min() <= 0:
            raise ValueError(f"weight={weight!r} of {edges.where}: weights must be above 0. Drop edges of weight 0.")
    label = pick(table, "label", given["label"], _LABELS)
    arrays["y"], names = _classes(table, label)
    used = [id, label]
    if given["node_split"] is not None:
        used.append(pick(table, "node_split", given["node_split"]))
        arrays |= _parts(table, used[-1], arrays["y"])
    values = given["values"]
    values = [values] if isinstance(values, str) else values
    chosen = values or [name for name in table.columns if name not in (*used, *leave_out)]
    if chosen:
        arrays["x"] = np.stack([_feature(table, pick(table, "values", name)) for name in chosen], 1)
    return arrays, names


def _key(value: Any) -> str:
    return str(value.item() if isinstance(value, np.generic) else value).strip()


def _numbered(table: Table, id: str) -> dict[str, int]:
    column = table.columns[id]
    if rows := missing(column):
        raise ValueError(f"id={id!r} of {table.where}: {rows_text(rows)} without a name. Fill or remove them.")
    number: dict[str, int] = {}
    for row, value in enumerate(column):
        if (first := number.setdefault(_key(value), row)) != row:
            raise ValueError(f"id={id!r} of {table.where}: rows {first} and {row} are both {_key(value)!r}.")
    return number


def _ends(edges: Table, name: str, number: Mapping[str, int], table: Table, id: str) -> np.ndarray:
    column = edges.columns[name]
    if strange := [row for row, value in enumerate(column) if _key(value) not in number]:
        raise ValueError(
            f"{name!r} of {edges.where}: {rows_text(strange)} with a node that is not in column {id!r} of "
            f"{table.where}; the first is {_key(column[strange[0]])!r}. Remove these edges, or add the nodes."
        )
    return np.asarray([number[_key(value)] for value in column], np.int64)


def _classes(table: Table, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels with -1 where the class is unknown."""
    column: Column = table.columns[name]
    if isinstance(column, np.ndarray) and column.ndim == 1:
        known = ~np.isnan(column) & (column != -1) if column.dtype.kind == "f" else column != -1
    else:
        known = np.asarray([value is not None and str(value).strip().lower() not in _UNKNOWN for value in column])
    rows = np.flatnonzero(known)
    if not len(rows):
        raise ValueError(f"label={name!r} of {table.where}: no node has a class.")
    held = column[rows] if isinstance(column, np.ndarray) else [column[row] for row in rows]
    found, names = read_labels(table._replace(columns={name: held}), name)
    labels = np.full(len(known), -1, np.int32)
    labels[rows] = found
    return labels, names


def _parts(table: Table, name: str, labels: np.ndarray) -> dict[str, np.ndarray]:
    where = f"node_split={name!r} of {table.where}"
    said = ["" if value is None else _key(value).lower() for value in table.columns[name]]
    if wrong := sorted({value for value in said if value and value not in _SPLITS}):
        raise ValueError(f"{where}: holds {wrong[:5]}; expected 'train', 'val', 'test', or nothing.")
    chosen = np.asarray([_SPLITS.get(value, "") for value in said])
    if (nameless := np.flatnonzero((chosen != "") & (labels < 0))).size:
        raise ValueError(f"{where}: {rows_text(nameless)} in a split, but without a class. Leave their split empty.")
    return {
        f"{split}_idx": np.flatnonzero(chosen == split) for split in ("train", "val", "test") if (chosen == split).any()
    }


def _feature(table: Table, name: str) -> np.ndarray:
    try:
        return numbers(f"column {name!r} of {table.where}", table.columns[name]).astype(np.float32)
    except ValueError as error:
        raise ValueError(
            f"{error} It was read as a feature; values= chooses features, leave_out= drops columns."
        ) from error


def _facts(
    graph: GraphData, arrays: Mapping[str, np.ndarray], names: tuple[str, ...], left: list[str], undirected: bool
) -> Facts:
    counts = np.bincount(graph.labels[graph.labels >= 0], minlength=len(names))
    stored = {name: getattr(graph, name) for name in ("train", "val", "test") if getattr(graph, name) is not None}
    split = ", ".join(f"{len(held)} {name}" for name, held in stored.items())
    degrees = np.bincount(graph.receivers, minlength=graph.nodes)
    forward = set(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))
    single = sum((receiver, sender) not in forward for sender, receiver in forward)
    senders, receivers = arrays["edge_index"]
    notes = [f"Not read: {', '.join(map(repr, left))}."] if left else []
    if undirected:
        notes.append("The reverse of every edge was added.")
    elif single:
        notes.append(f"{single} of {len(forward)} edges have no reverse and are taken in one direction only.")
    if loops := int((senders == receivers).sum()):
        notes.append(f"{loops} edges from a node to itself were dropped.")
    if (
        repeated := len(senders)
        - loops
        - len(np.unique(np.stack([senders, receivers])[:, senders != receivers], axis=1).T)
    ):
        notes.append(f"{repeated} repeated edges were dropped.")
    if unknown := int((graph.labels < 0).sum()):
        notes.append(f"The class of {unknown} nodes is unknown.")
    if graph.weights is not None:
        notes.append(f"Edge weights from {graph.weights.min():g} to {graph.weights.max():g}.")
    features = "no features" if graph.features is None else f"{graph.features.shape[1]} features per node"
    return Facts(
        rows={"nodes": graph.nodes, "edges": len(graph.senders)},
        classes={name: (int(count),) for name, count in zip(names, counts, strict=True)},
        sizes=f"{features.capitalize()}; {spread(degrees, 'edges')} into a node.",
        split=f"The split is the files' own: {split} nodes."
        if stored
        else "No split is stored; studies draw their own.",
        notes=tuple(notes),
        fingerprint=fingerprint(dict(arrays), names, undirected),
    )
