"""Checkpoints: atomic, exact, and readable refusals."""

import gc
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import Command

from effjax.train.checkpoint import CheckpointError, Checkpoints, describe_difference


def state(value=1.0):
    return {
        "w": jnp.full((300,), value),
        "n": jnp.int32(3),
        "h": jnp.ones((2,), jnp.bfloat16),
        "key": jax.random.key(7),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def saved(folder, identity=None, steps=(1, 2)):
    checkpoints = Checkpoints(folder, identity or {"run": "a"})
    for step in steps:
        checkpoints.save(step, state(float(step)), {"iterator": {"at": step}})
    checkpoints.wait()
    return checkpoints


def test_round_trip_is_exact(tmp_path):
    step, restored, extra = saved(tmp_path).restore(abstract(state()))
    assert (step, extra) == (2, {"iterator": {"at": 2}})
    np.testing.assert_array_equal(restored["w"], state(2.0)["w"])
    assert restored["h"].dtype == jnp.bfloat16
    assert jnp.array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(state()["key"]))


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, steps=range(1, 7)).close()
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [5, 6]


def test_another_run_is_refused_with_the_difference(tmp_path):
    saved(tmp_path, {"config": {"rate": 0.1, "seeds": [0, 1]}}).close()
    with pytest.raises(CheckpointError, match=r"config\.rate: 0\.1 there, 0\.3 here"):
        Checkpoints(tmp_path, {"config": {"rate": 0.3, "seeds": [0, 1]}}).restore(abstract(state()))


def test_another_state_is_refused_with_the_difference(tmp_path):
    checkpoints = saved(tmp_path)
    other = state() | {"w": jnp.zeros((5,)), "new": jnp.zeros(())}
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(abstract(other))
    assert "w: 'float32[300]' there, 'float32[5]' here" in str(error.value)
    assert "new: absent there" in str(error.value)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Checkpoints(tmp_path, {}).restore(abstract(state()))


# Orbax abandons its other reads when one fails; their coroutines then complain on collection.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_every_damaged_file_of_the_state_is_noticed(tmp_path, damage):
    """No file can be changed without either a refusal or the very same state."""
    saved(tmp_path, steps=(2,)).close()
    files = [p for p in (tmp_path / "2").rglob("*") if p.is_file() and p.stat().st_size > 0]
    refused = 0
    for path in files:
        good = path.read_bytes()
        middle = len(good) // 2
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(
                good[:middle] + bytes([good[middle] ^ 0xFF]) + good[middle + 1 :] if damage == "flip" else good[:middle]
            )
        checkpoints = Checkpoints(tmp_path, {"run": "a"})
        try:
            _, restored, _ = checkpoints.restore(abstract(state()), 2)
            np.testing.assert_array_equal(restored["w"], state(2.0)["w"])
        except CheckpointError as error:
            refused += "damaged" in str(error) or "there" in str(error)
        finally:
            checkpoints.close()
            path.write_bytes(good)
    gc.collect()
    assert refused >= 3


def test_an_interrupted_save_leaves_the_one_before(tmp_path):
    saved(tmp_path, steps=(1,)).close()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir()
    assert Checkpoints(tmp_path, {"run": "a"}).restore(abstract(state()))[0] == 1


def test_difference_is_readable_and_bounded():
    assert describe_difference({"a": [1, 2]}, {"a": (1, 2)}) == ""
    text = describe_difference({str(i): i for i in range(30)}, {})
    assert text.count("\n") == 12
    assert "18 more" in text


def test_no_bit_of_its_own_json_can_change_unnoticed(tmp_path):
    """Of the meta data: the data's place, the sums of the books, the identity and the checksums themselves."""
    saved(tmp_path, steps=(2,)).close()
    [path] = [p for p in (tmp_path / "2" / "meta").rglob("*") if p.is_file() and b"iterator" in p.read_bytes()]
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    checkpoints = Checkpoints(tmp_path, {"run": "a"})
    for place in rng.choice(len(good), size=min(60, len(good)), replace=False):
        flipped = bytes([good[place] ^ 1 << int(rng.integers(8))])
        path.write_bytes(good[:place] + flipped + good[place + 1 :])
        try:
            found = checkpoints.restore(abstract(state()), 2)
        except CheckpointError:
            refused += 1
        else:
            assert found[2] == {"iterator": {"at": 2}}
    assert refused > 20


def test_a_renamed_step_is_refused(tmp_path):
    saved(tmp_path).close()
    (tmp_path / "2").rename(tmp_path / "3000")
    with pytest.raises(CheckpointError, match=r"3000 holds step 2: the folder was renamed\. Give it its name back"):
        Checkpoints(tmp_path, {"run": "a"}).restore(abstract(state()))


def test_a_clock_that_jumps_disturbs_no_save(tmp_path, monkeypatch):
    days = itertools.count()
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 3600.0 * next(days))
    checkpoints = saved(tmp_path)
    assert checkpoints.restore(abstract(state()))[0] == 2
    checkpoints.close()


FAILING = """
import jax, resource, signal, sys
from pathlib import Path
from effjax.train.checkpoint import CheckpointError, Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), {})
checkpoints.save(1, {"w": jax.numpy.zeros(3)}, {})
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    checkpoints.save(2, {"w": jax.random.normal(jax.random.key(0), (20000,))}, {})
    checkpoints.wait()
except CheckpointError as error:
    print(error, flush=True)
try:
    checkpoints.close()
except CheckpointError:
    pass
"""


def test_a_save_that_fails_is_one_line_and_the_process_ends_at_once(tmp_path):
    begun = time.monotonic()
    command = Command(tmp_path, target=FAILING)
    out, err = command.communicate(timeout=100)
    assert command.returncode == 0, err
    assert time.monotonic() - begun < 60
    assert f"{tmp_path}: a checkpoint could not be written (File too large). It needs about 80000 bytes" in out
    assert "The checkpoint of step 1 is kept" in out
    assert len(out.splitlines()) == 1
    assert "Traceback" not in err
    assert Checkpoints(tmp_path, {}).latest() == 1
