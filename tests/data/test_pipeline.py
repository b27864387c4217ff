import gc
import json
import subprocess
import sys
import threading
import time
import traceback
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data.pipeline import Batches, ResumableIterator, batches, prefetch_to_device, put_batch


def rows(n: int) -> dict[str, np.ndarray]:
    return {"x": np.arange(n, dtype=np.int32), "y": np.arange(n, dtype=np.float32)[:, None] * 2}


def noisy(batch, index, rng):
    return {
        **batch,
        "x": batch["x"] * 1000 + rng.integers(0, 1000, len(batch["x"])),
        "i": np.full(len(batch["x"]), index),
    }


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "effjax-prefetch"]


# Order


def test_an_epoch_is_a_permutation_and_epochs_differ():
    data = list(Batches(rows(12), 4, seed=3, epochs=2))
    order = np.concatenate([batch["x"] for batch in data])
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))
    assert list(order[:12]) != list(order[12:])
    assert all(np.array_equal(batch["y"][:, 0], batch["x"] * 2) for batch in data)


def test_the_seed_fixes_the_order():
    first = [batch["x"].tolist() for batch in Batches(rows(20), 5, seed=0, epochs=1)]
    assert first == [batch["x"].tolist() for batch in Batches(rows(20), 5, seed=0, epochs=1)]
    assert first != [batch["x"].tolist() for batch in Batches(rows(20), 5, seed=1, epochs=1)]


def test_the_remainder():
    dropped = Batches(rows(10), 4, seed=0, epochs=2)
    kept = Batches(rows(10), 4, seed=0, epochs=2, drop_remainder=False)
    assert len(dropped) == 4
    assert [len(batch["x"]) for batch in kept] == [4, 4, 2, 4, 4, 2]
    whole = list(Batches(rows(10), 4, seed=0, epochs=1, shuffle=False, drop_remainder=False))
    assert np.concatenate([batch["x"] for batch in whole]).tolist() == list(range(10))


def test_random_access_is_the_iterator():
    data = Batches(rows(10), 3, seed=1, epochs=4, transform=noisy)
    visited = list(data)
    assert len(visited) == len(data) == 12
    for index in (11, 0, 5):
        assert same(data[index], visited[index])
        assert (data[index]["i"] == index).all()
    with pytest.raises(IndexError, match=r"index=12 is outside \[0, 11\]"):
        data[12]


def test_the_generator_depends_on_seed_and_index_alone():
    drawn = lambda seed: [
        b["x"] % 1000 for b in Batches(rows(6), 3, seed=seed, epochs=2, shuffle=False, transform=noisy)
    ]
    assert np.array_equal(drawn(0), drawn(0))
    assert not np.array_equal(drawn(0), drawn(1))
    assert not np.array_equal(drawn(0)[0], drawn(0)[1])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(4, 40),
    parts=st.sampled_from([1, 2, 3, 4]),
    per_part=st.integers(1, 3),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
    transform=st.sampled_from([None, noisy]),
)
def test_processes_share_each_global_batch(n, parts, per_part, seed, shuffle, transform):
    size = parts * per_part
    if size > n:
        return
    options = {"seed": seed, "epochs": 2, "shuffle": shuffle, "transform": transform}
    whole = list(Batches(rows(n), size, **options, process_index=0, process_count=1))
    shares = [list(Batches(rows(n), size, **options, process_index=p, process_count=parts)) for p in range(parts)]
    for batch, *pieces in zip(whole, *shares, strict=True):
        assert same(batch, {key: np.concatenate([piece[key] for piece in pieces]) for key in batch})
        assert {len(piece["x"]) for piece in pieces} == {per_part}


# State


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 30),
    size=st.integers(1, 8),
    consumed=st.integers(0, 30),
    shuffle=st.booleans(),
    drop=st.booleans(),
    epochs=st.sampled_from([None, 3]),
)
def test_a_new_iterator_continues_where_the_killed_one_was(n, size, consumed, shuffle, drop, epochs):
    if size > n:
        return
    make = lambda: Batches(rows(n), size, seed=2, epochs=epochs, shuffle=shuffle, drop_remainder=drop, transform=noisy)
    killed = make()
    for _ in range(consumed):
        next(killed, None)
    state = json.loads(json.dumps(killed.get_state()))
    resumed = make()
    resumed.set_state(state)
    for _ in range(7):
        ours, theirs = next(killed, None), next(resumed, None)
        assert (ours is None) == (theirs is None)
        assert ours is None or same(ours, theirs)


def test_another_number_of_processes_continues_a_state():
    killed = Batches(rows(16), 8, seed=0, process_index=1, process_count=2)
    next(killed)
    shares = [Batches(rows(16), 8, seed=0, process_index=p, process_count=4) for p in range(4)]
    for share in shares:
        share.set_state(killed.get_state())
    union = np.concatenate([next(share)["x"] for share in shares])
    assert np.array_equal(union, Batches(rows(16), 8, seed=0)[1]["x"])


def test_the_state_of_other_data_is_refused_with_the_difference():
    state = Batches(rows(16), 8, seed=0).get_state()
    with pytest.raises(ValueError, match="rows is 16 in the state and 12 here; seed is 0 in the state and 1 here"):
        Batches(rows(12), 8, seed=1).set_state(state)
    with pytest.raises(ValueError, match="is not a state of Batches"):
        Batches(rows(12), 8, seed=1).set_state({"next_index": 3})
    with pytest.raises(ValueError, match=r"state\['next'\]=9"):
        Batches(rows(16), 8, seed=0, epochs=1).set_state({**state, "next": 9})


# Bad input


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "has no columns"),
        ({"x": np.zeros((0, 3))}, "hold no rows"),
        ({"x": np.zeros(3), "y": np.zeros(4)}, r"differ in length: \{'x': 3, 'y': 4\}"),
        (
            {"x": np.array([[0.0], [np.nan], [np.inf]])},
            r"arrays\['x'\] has NaN or infinity in 2 of 3 rows, the first at 1",
        ),
        ({"x": ["a", "b"]}, "is list; expected a NumPy array of numbers"),
        ({"x": np.array(["a", "b"])}, "Tokenise texts"),
        ({"x": np.array(3.0)}, "one row per example"),
    ],
)
def test_arrays_are_checked(arrays, message):
    with pytest.raises(ValueError, match=message):
        Batches(arrays, 1, seed=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 11}, ValueError, r"batch_size=11 is larger than the data \(10 rows\)"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"batch_size": 2.0}, TypeError, "batch_size=2.0 must be an integer"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"epochs": 0}, ValueError, "epochs=0 .*None repeats"),
        ({"batch_size": 5, "process_index": 0, "process_count": 2}, ValueError, "batch of 5 rows .*process_count=2"),
        (
            {"batch_size": 4, "drop_remainder": False, "process_index": 0, "process_count": 4},
            ValueError,
            "batch of 2 rows .*process_count=4.*drop_remainder=True",
        ),
        ({"process_index": 2, "process_count": 2}, ValueError, "process_index=2"),
        ({"process_index": 1}, ValueError, "go together"),
        ({"prefetch": -1}, ValueError, "prefetch=-1"),
    ],
)
def test_settings_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        batches(rows(10), **{"batch_size": 2, "seed": 0, **options})


def test_a_transform_that_changes_the_rows_cannot_be_shared():
    halve = lambda batch, index, rng: {key: column[::2] for key, column in batch.items()}
    with pytest.raises(ValueError, match="transform returned 2 rows of 'x' for a global batch of 4"):
        next(Batches(rows(8), 4, seed=0, transform=halve, process_index=0, process_count=2))


# Other sources


def test_a_hugging_face_dataset_gives_the_same_batches():
    import datasets

    arrays = {"x": np.arange(10), "y": np.arange(20.0, dtype=np.float32).reshape(10, 2)}
    table = datasets.Dataset.from_dict({"x": arrays["x"], "y": arrays["y"].tolist()})
    ours, theirs = Batches(arrays, 4, seed=0), Batches(table, 4, seed=0)
    for _ in range(5):
        assert same(next(ours), next(theirs))


def test_grain_examples_give_the_same_batches():
    import grain

    examples = grain.MapDataset.range(10).map(lambda i: {"x": np.int32(i)})
    ours, theirs = Batches({"x": np.arange(10, dtype=np.int32)}, 4, seed=0), Batches(examples, 4, seed=0)
    for _ in range(5):
        assert same(next(ours), next(theirs))


def test_lazy_sources_are_checked_when_read():
    examples = [{"x": 1.0}, {"x": float("nan")}]
    with pytest.raises(ValueError, match="NaN or infinity"):
        next(Batches(examples, 2, seed=0))


def test_batches_are_a_grain_source():
    import grain

    ours = Batches(rows(20), 4, seed=5)
    piped = iter(grain.MapDataset.source(ours).map(lambda batch: batch).to_iter_dataset())
    visited = [next(piped) for _ in range(12)]
    for index, batch in enumerate(visited):
        assert same(batch, ours[index])
    state = piped.get_state()
    after = next(piped)
    piped.set_state(state)
    assert same(next(piped), after)


def test_a_grain_pipeline_is_read_ahead_and_resumed():
    """The loop takes grain's own iterators: their state is JSON-able, and reading ahead does not move it."""
    import grain

    pipeline = grain.MapDataset.range(40).shuffle(seed=1).map(lambda i: {"x": np.int32(i)}).repeat().batch(4)
    plain = iter(pipeline.to_iter_dataset())
    assert isinstance(plain, ResumableIterator)
    expected = [next(plain)["x"].tolist() for _ in range(6)]
    with prefetch_to_device(iter(pipeline.to_iter_dataset())) as ahead:
        assert [next(ahead)["x"].tolist() for _ in range(3)] == expected[:3]
        state = json.loads(json.dumps(ahead.get_state()))
    fresh = iter(pipeline.to_iter_dataset())
    fresh.set_state(state)
    assert [next(fresh)["x"].tolist() for _ in range(3)] == expected[3:]
    for data in (plain, fresh):
        data.close()


# Prefetching


def test_prefetching_changes_nothing_but_the_place():
    plain = list(Batches(rows(12), 4, seed=0, epochs=3, transform=noisy))
    with batches(rows(12), 4, seed=0, epochs=3, transform=noisy, prefetch=2) as ahead:
        fetched = list(ahead)
        assert list(ahead) == []
    assert all(isinstance(batch["x"], jax.Array) for batch in fetched)
    assert all(same(a, b) for a, b in zip(plain, fetched, strict=True))
    assert prefetch_threads() == []


@settings(max_examples=20, deadline=None)
@given(consumed=st.integers(0, 9), size=st.integers(1, 4))
def test_the_state_counts_what_was_handed_out(consumed, size):
    make = lambda: Batches(rows(12), 4, seed=0, epochs=3)
    with prefetch_to_device(make(), size=size) as ahead:
        for _ in range(consumed):
            next(ahead)
        state = json.loads(json.dumps(ahead.get_state()))
        assert state["next"] == consumed
        tail = [batch["x"].tolist() for batch in ahead]
        ahead.set_state(state)
        assert [batch["x"].tolist() for batch in ahead] == tail
    resumed = make()
    resumed.set_state(state)
    assert [batch["x"].tolist() for batch in resumed] == tail


def test_an_error_in_the_thread_keeps_its_traceback_and_the_state():
    def fails(batch, index, rng):
        if index == 2:
            raise ZeroDivisionError("in the transform")
        return batch

    with prefetch_to_device(Batches(rows(12), 4, seed=0, transform=fails)) as ahead:
        next(ahead)
        next(ahead)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="in the transform") as caught:
                next(ahead)
        assert "fails" in "".join(traceback.format_tb(caught.value.__traceback__))
        assert ahead.get_state()["next"] == 2


def test_a_dropped_or_closed_iterator_leaves_no_thread():
    ahead = prefetch_to_device(Batches(rows(12), 4, seed=0))
    next(ahead)
    assert len(prefetch_threads()) == 1
    del ahead
    gc.collect()
    assert prefetch_threads() == []
    ahead = prefetch_to_device(Batches(rows(12), 4, seed=0))
    next(ahead)
    ahead.close()
    ahead.close()
    assert prefetch_threads() == []
    with pytest.raises(ValueError, match="closed"):
        next(ahead)


def test_no_more_is_read_ahead_than_asked():
    seen = []

    def counts(batch, index, rng):
        seen.append(index)
        return batch

    with prefetch_to_device(Batches(rows(40), 4, seed=0, transform=counts), size=3) as ahead:
        for _ in range(4):
            next(ahead)
        time.sleep(0.1)  # what the thread may read, it has read by now
        assert seen == list(range(4 + 3))


PLACES = """
import jax, numpy as np
from effjax.data.pipeline import Batches, batches, prefetch_to_device
jax.config.update("jax_num_cpu_devices", 2)
data = {"x": np.arange(8, dtype=np.int32)}
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
with prefetch_to_device(Batches(data, 4, seed=0, shuffle=False), sharding=sharding) as ahead:
    print([shard.data.tolist() for shard in next(ahead)["x"].addressable_shards])
with jax.default_device(jax.devices()[1]):
    ahead = batches(data, 4, seed=0, prefetch=2)
    print([device.id for device in next(ahead)["x"].devices()])
"""


def test_batches_go_where_asked_and_an_open_thread_does_not_hold_the_program():
    done = subprocess.run([sys.executable, "-c", PLACES], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["[[0, 1], [2, 3]]", "[1]"]
    assert done.stderr == ""


def test_a_batch_is_the_callers_own():
    for shuffle in (True, False):
        data = rows(8)
        batch = next(Batches(data, 4, seed=0, shuffle=shuffle))
        batch["x"][:] = -1
        assert data["x"].tolist() == list(range(8))


class Held(NamedTuple):
    """Of a sharding, the slices of the leading axis that this process's devices hold."""

    slices: tuple[slice, ...]

    def addressable_devices_indices_map(self, shape):
        return {device: (rows, *[slice(None)] * (len(shape) - 1)) for device, rows in enumerate(self.slices)}


def test_a_process_puts_no_rows_that_its_devices_do_not_hold(monkeypatch):
    """Four processes of 2 of 8 rows: each its own quarter, or halves and all of them, which it has not read."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda sharding, part: part)
    batch = {"x": np.zeros((2, 3)), "y": np.zeros(2)}
    for own in (Held((slice(2, 4),)), Held((slice(2, 3), slice(3, 4), slice(3, 4)))):
        assert put_batch(batch, sharding=own) == batch
    for shared, rows in (Held((slice(0, 4),) * 2), 4), (Held((slice(None),)), 8):
        with pytest.raises(ValueError, match=rf"reads 2 of a batch's 8 rows, but its devices hold {rows} of them"):
            put_batch(batch, sharding=shared)
