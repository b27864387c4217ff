from pathlib import Path

import numpy as np
import pytest

from effjax.data.graphs import CsrFeatures, graph_data

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"


def test_cora():
    cora = graph_data("cora")
    assert (cora.name, cora.nodes, cora.classes) == ("cora", 2708, 7)
    assert isinstance(cora.features, CsrFeatures)
    assert cora.features.shape == (2708, 1433)
    assert len(cora.train) == 140
    assert not cora.attacks
    pairs = set(zip(cora.senders.tolist(), cora.receivers.tolist(), strict=True))
    assert len(pairs) == len(cora.senders)
    assert all((j, i) in pairs for i, j in pairs)


def test_nodes_without_a_class_have_no_label():
    citeseer = graph_data("citeseer")
    assert (citeseer.labels == -1).sum() == 15
    assert citeseer.classes == 6
    assert not np.intersect1d(np.flatnonzero(citeseer.labels < 0), np.concatenate([citeseer.train, citeseer.test])).size


def save(path, **changes):
    arrays = {"edge_index": np.array([[0, 1, 1, 1], [1, 0, 1, 0]]), "y": np.array([0, 1, 1]), "x": np.eye(3)}
    np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
    return str(path)


def test_a_file_of_ones_own(tmp_path):
    mine = graph_data(save(tmp_path / "mine.npz", train_idx=np.array([2])))
    assert (mine.name, mine.nodes, mine.classes) == ("mine", 3, 2)
    np.testing.assert_array_equal(mine.senders, [1, 0])  # the self-loop and the repeated edge are gone
    np.testing.assert_array_equal(mine.receivers, [0, 1])
    np.testing.assert_array_equal(mine.train, [2])
    assert mine.features.dtype == np.float32


def test_pubmed_loads_from_a_users_own_folder(tmp_path):
    (tmp_path / "graphs").mkdir()
    save(tmp_path / "graphs/pubmed.npz")
    assert graph_data("pubmed", root=tmp_path).nodes == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edge_index": np.array([[0, 3], [1, 0]])}, "node numbers below N=3 in 'edge_index'"),
        ({"x": np.full((3, 2), np.nan)}, "no NaN or infinity in 'x'"),
        ({"x": np.ones((2, 2))}, "dense features 'x'"),
        ({"y": np.array([0, -2, 0])}, "classes 'y' >= 0 within int32, and -1 .or a number in 'unlabelled_idx'"),
        ({"y": np.array([0, 2**31, 0])}, "run from 0 to 2147483648"),
        ({"y": None}, "'edge_index' .* and 'y'"),
        ({"y": np.array([None, 1, 2])}, "Pickled objects are never loaded"),
    ],
)
def test_bad_files(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        graph_data(save(tmp_path / "bad.npz", **change))


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match="is a set of images, not a graph"):
        graph_data("digits")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        graph_data(str(tmp_path / "none.npz"))
    with pytest.raises(ValueError, match="Did you mean"):
        graph_data("coar")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
def test_attacked_graphs_and_random_splits():
    attacked = graph_data("cora_attacked", root=SHARED)
    assert "meta_0.15" in attacked.attacks
    assert len(attacked.attacks["meta_0.15"][0]) > len(attacked.senders)
    photo = graph_data("amazon_photo", root=SHARED)
    assert photo.random_train.shape == (10, 160)
    assert graph_data("pubmed", root=SHARED).features is None
