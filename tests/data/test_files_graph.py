import numpy as np
import pytest
import scipy.sparse

from effjax.data.files import read_data
from effjax.data.graph_tables import graph_from_files
from effjax.data.graphs import graph_data
from effjax.tasks.graph import node_data

# A path of four nodes, both directions, with weights; node 3 is of unknown class.
EDGES = np.array([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
WEIGHTS = np.array([5.0, 5.0, 1.0, 1.0, 2.0, 2.0])
Y = np.array([0, 1, 1, -1])
X = np.arange(8.0).reshape(4, 2)
MASKS = {
    "train_mask": np.array([True, False, False, False]),
    "val_mask": np.array([False, True, False, False]),
    "test_mask": np.array([False, False, True, False]),
}


def dense():
    matrix = np.zeros((4, 4))
    matrix[EDGES[0], EDGES[1]] = WEIGHTS
    return matrix


def csr(prefix, matrix, dot="_"):
    return {f"{prefix}{dot}{part}": getattr(matrix, part) for part in ("data", "indices", "indptr", "shape")}


def save(path, **arrays):
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def features_of(graph):
    if graph.features is None or isinstance(graph.features, np.ndarray):
        return graph.features
    f = graph.features
    return scipy.sparse.csr_matrix((f.values, f.columns, f.indptr), f.shape).toarray()


BENCH = csr("adj", scipy.sparse.csr_matrix(dense())) | csr("attr", scipy.sparse.csr_matrix(X))
LAYOUTS = {
    "own": {
        "edge_index": EDGES,
        "edge_weight": WEIGHTS,
        "y": Y,
        "x": X,
        "train_idx": [0],
        "val_idx": [1],
        "test_idx": [2],
    },
    "pyg": {"edge_index": EDGES, "edge_attr": WEIGHTS[:, None], "y": Y[:, None], "x": X, **MASKS},
    "benchmark": {**BENCH, "labels": Y, "node_names": np.array(list("abcd")), **MASKS},
    "benchmark with dots": {
        **csr("adj_matrix", scipy.sparse.csr_matrix(dense()), "."),
        "attr_matrix": X,
        "labels": Y,
        **MASKS,
    },
    "planetoid-like": {"adj": dense(), "features": X, "labels": Y, "idx_train": [0], "idx_val": [1], "idx_test": [2]},
    "heterophilous": {
        "edges": EDGES.T,
        "edge_weights": WEIGHTS,
        "node_labels": Y,
        "node_features": X,
        **{f"{name}s": mask[None] for name, mask in MASKS.items()},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    graph = graph_from_files(save(tmp_path / "g.npz", **LAYOUTS[layout]))
    found = np.zeros((4, 4))
    found[graph.senders, graph.receivers] = graph.weights
    np.testing.assert_array_equal(found, dense())
    assert graph.labels.tolist() == [0, 1, 1, -1]
    assert (graph.train.tolist(), graph.val.tolist(), graph.test.tolist()) == ([0], [1], [2])
    np.testing.assert_array_equal(features_of(graph), X)
    assert graph.facts.rows == {"nodes": 4, "edges": 6}
    assert graph.facts.classes == {"0": (1,), "1": (2,)}
    assert graph.facts.split == "The split is the files' own: 1 train, 1 val, 1 test nodes."
    assert "The class of 1 nodes is unknown." in graph.facts.notes
    assert "Edge weights from 1 to 5." in graph.facts.notes
    assert ("Not read: 'node_names'." in graph.facts.notes) == (layout == "benchmark")
    assert graph.source.startswith(f"{tmp_path / 'g.npz'} (nodes 4, edges 6, 2 classes): Rows: 4 nodes, 6 edges. ")
    assert graph.source.endswith(f" SHA-256 {graph.facts.fingerprint[:12]}.")


def test_weights_enter_the_adjacency(tmp_path):
    task = node_data(str(save(tmp_path / "g.npz", **LAYOUTS["pyg"])))
    matrix = dense() + np.eye(4)
    degree = matrix.sum(1)
    np.testing.assert_allclose(task.adjacency.todense(), matrix / np.sqrt(np.outer(degree, degree)), rtol=1e-6)


def test_matrices_that_scipy_saves(tmp_path):
    scipy.sparse.save_npz(tmp_path / "adj.npz", scipy.sparse.csr_matrix(dense()))
    scipy.sparse.save_npz(tmp_path / "coo.npz", scipy.sparse.coo_matrix(dense()))
    scipy.sparse.save_npz(tmp_path / "x.npz", scipy.sparse.csr_matrix(X))
    np.save(tmp_path / "y.npy", Y)
    np.save(tmp_path / "x.npy", X)
    save(tmp_path / "rest.npz", labels=Y, **MASKS)
    for matrix in ("adj.npz", "coo.npz"):
        for features in ("x.npz", "x.npy"):
            graph = graph_from_files(tmp_path / matrix, labels=tmp_path / "y.npy", features=tmp_path / features)
            assert graph.labels.tolist() == Y.tolist()
            np.testing.assert_array_equal(features_of(graph), X)
            assert graph.weights.tolist() == WEIGHTS[[1, 0, 3, 2, 5, 4]].tolist()  # ordered by receiver
    assert graph_from_files(tmp_path / "adj.npz", labels=tmp_path / "rest.npz").test.tolist() == [2]
    with pytest.raises(ValueError, match=r"labels are missing. Give them in a second file: labels=FILE"):
        graph_from_files(tmp_path / "adj.npz")
    with pytest.raises(ValueError, match=r"labels=.*x\.npz' holds a matrix"):
        graph_from_files(tmp_path / "adj.npz", labels=tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError, match=r"labels=.*nothing.npy' is not a file or folder"):
        graph_from_files(tmp_path / "adj.npz", labels=tmp_path / "nothing.npy")
    np.save(tmp_path / "few.npy", Y[:2])
    with pytest.raises(ValueError, match="2 labels for the 4 nodes of the adjacency matrix"):
        graph_from_files(tmp_path / "adj.npz", labels=tmp_path / "few.npy")


def test_a_matrix_of_ones_has_no_weights(tmp_path):
    arrays = csr("adj", scipy.sparse.csr_matrix((dense() > 0).astype(np.float32)))
    graph = graph_from_files(save(tmp_path / "g.npz", **arrays, labels=Y, class_names=np.array(["theory", "practice"])))
    assert graph.weights is None
    assert graph.facts.classes == {"theory": (1,), "practice": (2,)}


def test_one_direction(tmp_path):
    path = save(tmp_path / "g.npz", edge_index=EDGES[:, ::2], edge_weight=WEIGHTS[::2], y=Y)
    graph = graph_from_files(path)
    assert "3 of 3 edges have no reverse and are taken in one direction only." in graph.facts.notes
    both = graph_from_files(path, undirected=True)
    found = np.zeros((4, 4))
    found[both.senders, both.receivers] = both.weights
    np.testing.assert_array_equal(found, dense())
    assert both.facts.fingerprint != graph.facts.fingerprint


def test_several_splits(tmp_path):
    masks = {name: np.stack([mask, np.roll(mask, 1)]) for name, mask in MASKS.items()}
    masks["test_mask"][1] = [True, False, False, False]
    for arrays in (masks, {name: mask.T for name, mask in masks.items()}):
        path = save(tmp_path / "g.npz", edge_index=EDGES, y=Y, **arrays)
        with pytest.raises(
            ValueError, match=r"'train_mask' holds 2 splits; which_split=None. Choose one: which_split=0"
        ):
            graph_from_files(path)
        graph = graph_from_files(path, which_split=1)
        assert (graph.train.tolist(), graph.val.tolist(), graph.test.tolist()) == ([1], [2], [0])
    with pytest.raises(ValueError, match=r"which_split=0: .* holds one split at most"):
        graph_from_files(save(tmp_path / "g.npz", **LAYOUTS["pyg"]), which_split=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edge_time": np.ones(6)}, r"does not know the arrays \['edge_time'\].*leave_out=\['edge_time'\]"),
        ({"edge_attr": np.ones((6, 3))}, r"weights 'edge_weight' have shape \[6, 3\]; .*leave_out=\['edge_attr'\]"),
        ({"edge_attr": np.ones(6), "edge_weight": np.ones(6)}, r"\['edge_weight', 'edge_attr'\] mean the same"),
        ({"edge_weight": np.ones(5)}, "one 'edge_weight' per edge"),
        ({"edge_weight": -WEIGHTS}, "edge weights from -5 to -1; they must be above 0"),
        ({"edge_weight": WEIGHTS * np.nan}, "no NaN or infinity in 'edge_weight'"),
        ({"edge_index": np.array([[0, 4], [1, 0]])}, "node numbers below N=4 in 'edge_index'"),
        ({"edge_index": np.array([[0, -1], [1, 0]])}, "node numbers below N=4 in 'edge_index'"),
        (
            {"edge_index": EDGES[:, [0, 0]], "edge_weight": [1.0, 2.0]},
            "the edge 0 to 1 stands more than once, with unlike",
        ),
        ({"edge_index": EDGES[:, [0, 0]], "edge_weight": [2.0, 2.0]}, "stands more than once. Sum its weights first"),
        (
            {"edge_index": np.array([[0, 1], [0, 2]]), "edge_weight": [2.0, 1.0]},
            "the edge of node 0 to itself weighs 2",
        ),
        ({"y": np.eye(4)}, "One-hot labels become numbers by y.argmax"),
        ({"y": Y + 2.0**40}, "integer classes 'y'"),
        ({"y": Y.astype(np.int64) + 2**40}, r"classes 'y' run from .* within int32"),
        ({"y": Y - 1}, "classes 'y' run from -2 to 0"),
        ({"y": np.zeros(4, int)}, "every node of known class is of one class"),
        ({"y": None}, "labels are missing"),
        ({"edge_index": None}, "edges are missing"),
        ({"x": np.array([None] * 4)}, "array 'x': .*Pickled objects are never loaded"),
        ({"train_mask": np.ones(3, bool)}, r"'train_mask' is bool\[3\]; expected booleans \[N\] with N=4"),
        ({"train_mask": np.array([0, 1, 2, 3])}, "Node numbers are called 'train_idx'"),
        (
            {"train_mask": MASKS["val_mask"], "test_mask": MASKS["val_mask"]},
            "node 1 stands in 'train_idx' and 'test_idx'",
        ),
        ({"train_mask": np.array([False] * 3 + [True])}, "'train_idx' holds nodes without a class, such as 3"),
        ({"train_mask": MASKS["train_mask"], "train_idx": [0]}, "has 'train_mask' and 'train_idx'"),
        ({"train_idx": [[0, 1]]}, r"'train_idx' has shape \[1, 2\]; expected one axis"),
        ({"adj": dense()}, r"\['adj', 'edge_index'\] all hold edges"),
        ({"x_indptr": np.arange(5), "x_indices": np.arange(4) + 0.5, "x_shape": [4, 9]}, "integers 'x_indices'"),
    ],
)
def test_refused_archives(tmp_path, change, message):
    path = save(tmp_path / "g.npz", **({"edge_index": EDGES, "y": Y} | change))
    with pytest.raises(ValueError, match=message):
        graph_from_files(path)


def test_arrays_left_out(tmp_path):
    path = save(tmp_path / "g.npz", edge_index=EDGES, y=Y, edge_time=np.ones(6), names=np.array([None, 1]))
    graph = graph_from_files(path, leave_out=["edge_time", "names"])
    assert "Not read: 'edge_time', 'names'." in graph.facts.notes
    with pytest.raises(ValueError, match=r"leave_out=\['nothing'\]: .* has no such arrays"):
        graph_from_files(path, leave_out=["edge_time", "names", "nothing"])


def test_graph_data_reads_the_same_layouts(tmp_path):
    path = save(tmp_path / "g.npz", **LAYOUTS["benchmark"])
    assert graph_data(str(path)).test.tolist() == [2]
    with pytest.raises(ValueError, match="does not know the arrays"):
        graph_data(str(save(tmp_path / "g.npz", edge_index=EDGES, y=Y, other=Y)))


PEOPLE = "id,age,income,label,part\nann,31,1.5,x,train\nbob,25,2,y,test\neve,40,3,,\nkim,20,4,x,val\n"
FRIENDS = "source,target,weight\nann,bob,2\nbob,eve,1\nkim,kim,1\n"


def tables(folder, edges=FRIENDS, nodes=PEOPLE):
    (folder / "friends.csv").write_text(edges)
    (folder / "people.csv").write_text(nodes)
    return folder / "friends.csv", folder / "people.csv"


def test_an_edge_list(tmp_path):
    edges, nodes = tables(tmp_path)
    graph = read_data("graph", edges, nodes=nodes, node_split="part", undirected=True)
    assert graph.senders.tolist() == [1, 0, 2, 1]
    assert graph.receivers.tolist() == [0, 1, 1, 2]
    assert graph.weights.tolist() == [2, 2, 1, 1]
    assert graph.labels.tolist() == [0, 1, -1, 0]
    assert (graph.train.tolist(), graph.val.tolist(), graph.test.tolist()) == ([0], [3], [1])
    np.testing.assert_array_equal(graph.features, [[31, 1.5], [25, 2], [40, 3], [20, 4]])
    assert graph.facts.classes == {"x": (2,), "y": (1,)}
    assert "1 edges from a node to itself were dropped." in graph.facts.notes
    chosen = graph_from_files(edges, nodes=nodes, values="age", leave_out="weight")
    assert chosen.features.shape == (4, 1)
    assert chosen.weights is None
    assert chosen.train is None


def test_an_edge_list_of_numbers(tmp_path):
    edges, nodes = tables(tmp_path, "src\tdst\n10\t30\n30\t20\n", "node,label\n10,1\n20,-1\n30,5\n")
    graph = graph_from_files(edges, nodes=nodes)
    assert (graph.senders.tolist(), graph.receivers.tolist()) == ([2, 0], [1, 2])
    assert graph.labels.tolist() == [0, -1, 1]
    assert graph.features is None
    assert list(graph.facts.classes) == ["1", "5"]


@pytest.mark.parametrize(
    ("edges", "nodes", "message"),
    [
        (
            FRIENDS + "ann,zoe,1\n",
            PEOPLE,
            r"'target' of .*: 1 row \(3; .*the first is 'zoe'. Remove these edges, or add",
        ),
        (FRIENDS, PEOPLE.replace("kim", "ann"), "id='id' of .*: rows 0 and 3 are both 'ann'"),
        (FRIENDS, PEOPLE.replace("31", "old"), "column 'age' .*the first holds 'old'. It was read as a feature"),
        (FRIENDS, PEOPLE.replace("31", ""), "column 'age' .*without a value"),
        (FRIENDS, PEOPLE.replace("train", "dev"), r"holds \['dev'\]; expected 'train', 'val', 'test', or nothing"),
        (FRIENDS, PEOPLE.replace("3,,", "3,,train"), r"1 row \(2; .* in a split, but without a class"),
        (FRIENDS, PEOPLE.replace(",y,", ",x,"), "every row is of class 'x'"),
        (FRIENDS.replace(",2", ",-2"), PEOPLE, "weights must be above 0"),
        (FRIENDS.replace("weight", "since"), PEOPLE, r"the columns \['since'\] of the edges .*leave_out=\['since'\]"),
        ("1,2\n2,3\n", PEOPLE, "holds numbers, not names. Add a header"),
        ("a,b\nann,bob\n", PEOPLE, r"which column is the source\? Name it: source=COLUMN"),
    ],
)
def test_refused_edge_lists(tmp_path, edges, nodes, message):
    edges, nodes = tables(tmp_path, edges, nodes)
    with pytest.raises(ValueError, match=message):
        graph_from_files(edges, nodes=nodes, node_split="part")


def test_refused_keywords(tmp_path):
    edges, nodes = tables(tmp_path)
    with pytest.raises(ValueError, match=r"an edge list has no classes. Give the table of nodes: nodes=FILE"):
        graph_from_files(edges)
    with pytest.raises(ValueError, match=r"labels=.* is for \.npz files"):
        graph_from_files(edges, nodes=nodes, labels=nodes)
    with pytest.raises(ValueError, match=r"nodes=.* is for edge lists"):
        graph_from_files(save(tmp_path / "g.npz", edge_index=EDGES, y=Y), nodes=nodes)
    with pytest.raises(ValueError, match=r"leave_out=\['nothing'\]: neither .* nor .* has such columns"):
        graph_from_files(edges, nodes=nodes, leave_out="nothing")
    (tmp_path / "ind.cora.graph").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pickled files .* are never loaded"):
        graph_from_files(tmp_path / "ind.cora.graph")
    with pytest.raises(ValueError, match=r"split=0\.2 does not apply to data of modality 'graph'"):
        read_data("graph", edges, split=0.2)


@pytest.mark.parametrize(
    ("part", "place", "value"), [("indices", 0, 10**6), ("indices", 1, -7), ("indptr", 1, 10**6), ("indptr", 2, -3)]
)
@pytest.mark.parametrize("kind", [scipy.sparse.csr_matrix, scipy.sparse.csc_matrix])
def test_a_matrix_of_scipy_that_points_outside_itself(tmp_path, kind, part, place, value):
    """SciPy converts it without a look, and ends the process."""
    scipy.sparse.save_npz(tmp_path / "a.npz", kind(dense()))
    with np.load(tmp_path / "a.npz") as archive:
        arrays = dict(archive)
    arrays[part][place] = value
    np.savez(tmp_path / "a.npz", **arrays)
    np.save(tmp_path / "y.npy", Y)
    with pytest.raises(ValueError, match=r"a\.npz: not a matrix as scipy"):
        graph_from_files(tmp_path / "a.npz", labels=tmp_path / "y.npy")


def test_weights_that_do_not_fit_name_the_file(tmp_path):
    loops = np.concatenate([EDGES, [[0], [0]]], 1)
    path = save(tmp_path / "a.npz", edge_index=loops, y=np.array([0, 1, 1, 0]), edge_weight=[*WEIGHTS, 2.0])
    with pytest.raises(ValueError, match=r"a\.npz: edge weights: the edge of node 0 to itself weighs 2"):
        graph_from_files(path)
