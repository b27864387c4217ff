import json
import re

import numpy as np
import pytest

import effjax
from effjax.core.cursor import Cursor
from effjax.data.pipeline import Batches

IDS = {"input_ids": [[5, 6], [7], [8, 9, 4], [3], [2, 2, 2, 2]]}
GRAPHS = [
    effjax.graph.get_fully_connected_graph(n, 1, node_features=np.ones((n, 2), np.float32)) for n in (2, 3, 4, 2, 3)
]
RING, SEEDS = effjax.graph.adjacency(np.arange(6), (np.arange(6) + 1) % 6, 6), [0, 2, 4]
FEW = {"boundaries": (2, 4), "multiple": 1, "cap": 2}
MAKERS = {
    "Batches": lambda epochs: Batches({"x": np.arange(10)}, 4, seed=3, epochs=epochs),
    "BucketSampler": lambda epochs: effjax.BucketSampler(
        IDS, seed=3, epochs=epochs, boundaries=(2, 4), multiple=1, cap=2
    ),
    "PaddedBatches": lambda epochs: effjax.data.PaddedBatches(IDS, seed=3, epochs=epochs, batch_size=2),
    "PackedBatches": lambda epochs: effjax.data.PackedBatches(IDS, seed=3, epochs=epochs, batch_size=1, length=4),
    "GraphBatches": lambda epochs: effjax.graph.GraphBatches(GRAPHS, [(8, 32, 4)], seed=3, epochs=epochs),
    "NeighbourSampler": lambda epochs: effjax.graph.NeighbourSampler(
        RING, [0, 2, 4], (2,), batch_size=2, seed=3, epochs=epochs
    ),
}
# As version 0.1.0 saved them, before there was one cursor.
SAVED = """
{"next": 1, "rows": 10, "batch_size": 4, "seed": 3, "shuffle": true, "drop_remainder": true}
{"next": 1, "rows": 5, "seed": 3, "epochs": 2, "pad_id": 0, "boundaries": [2, 4], "batch_sizes": [4096, 2048], \
"caps": [2, 2], "plan": "ca7a02c5"}
{"next": 1, "rows": 5, "seed": 3, "epochs": 2, "pad_id": 0, "batch_size": 2, "length": null, "length_multiple": 8, \
"group_by_length": false, "plan": "d3a3afb0"}
{"next": 1, "rows": 5, "seed": 3, "epochs": 2, "pad_id": 0, "length": 4, "batch_size": 1, "max_segments": null, \
"plan": "cb2f2bc5"}
{"next": 1, "graphs": 5, "seed": 3, "epochs": 2, "shuffle": true, "rungs": [[8, 32, 4]], "plan": "2f615244"}
{"next": 1, "rows": 3, "batch_size": 2, "seed": 3, "shuffle": true, "drop_remainder": false, "fanouts": [2], \
"graph": "984548bd"}
"""


def text(item):
    return json.dumps(item, default=lambda array: np.asarray(array).tolist())


STATES = dict(zip(MAKERS, map(json.loads, SAVED.strip().splitlines()), strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_states_of_existing_checkpoints_are_read_and_written(name):
    data = MAKERS[name](2)
    next(data)
    assert json.loads(json.dumps(data.get_state())) == STATES[name]
    second = text(next(data))
    resumed = MAKERS[name](2)
    resumed.set_state(STATES[name])
    assert text(next(resumed)) == second


@pytest.mark.parametrize("name", MAKERS)
def test_foreign_states_and_indices_are_refused(name):
    data = MAKERS[name](2)
    saved = STATES[name]
    with pytest.raises(ValueError, match="other data or settings: seed is 4 in the state and 3 here"):
        data.set_state({**saved, "seed": 4})
    with pytest.raises(ValueError, match=f"is not a state of {name}, which holds"):
        data.set_state({key: value for key, value in saved.items() if key != "seed"})
    with pytest.raises(ValueError, match=re.escape(f"state['next']={len(data) + 1} must be an integer in [0, ")):
        data.set_state({**saved, "next": len(data) + 1})
    assert data.get_state()["next"] == 0
    for index in (-1, len(data)):
        with pytest.raises(IndexError, match=re.escape(f"index={index} is outside [0, {len(data) - 1}]")):
            data[index]


@pytest.mark.parametrize("name", MAKERS)
def test_epochs_are_a_number_of_passes_and_none_is_for_ever(name):
    """Three epochs begin with the batches of two; None goes on, or is refused where all epochs are planned."""
    held = [text(item) for item in MAKERS[name](2)]
    longer = [text(item) for item in MAKERS[name](3)]
    if name != "PackedBatches":  # its rows are as wide as the fullest of the run
        assert longer[: len(held)] == held
    assert len(longer) > len(held)
    if name in ("Batches", "NeighbourSampler"):
        endless = MAKERS[name](None)
        assert [text(next(endless)) for _ in longer] == longer
    else:
        with pytest.raises(TypeError, match=r"epochs=None must be an integer.* planned"):
            MAKERS[name](None)


def test_an_iterator_ends_and_can_be_set_back():
    class Squares(Cursor[int]):
        _settings = {"power": 2}  # noqa: RUF012

        def __len__(self):
            return 3

        def _item(self, index):
            return index**2

    squares = Squares()
    assert [*squares] == [0, 1, 4]
    with pytest.raises(StopIteration):
        next(squares)
    assert squares.get_state() == {"next": 3, "power": 2}
    squares.set_state({"next": 1, "power": 2})
    assert squares[0] == 0  # reading by index does not move it
    assert [*squares] == [1, 4]
