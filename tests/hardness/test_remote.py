"""A remote expert that is late, fails or answers nonsense, and rows queued for it: nothing is lost, order is kept."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.hardness.query_queue import QueryQueue
from effjax.hardness.remote import RemoteEvents, RemoteExpert, dispatch_remote

X = np.arange(6, dtype=np.float32)[:, None]
BASE = -np.ones((6, 1), np.float32)
ASKS = np.array([True, False, True, True, False, True])


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def ten(x):
    return 10 * x


def raises(x):
    raise ConnectionError("no route to host")


def refuses(x):
    raise SystemExit(1)


@pytest.fixture
def hanging():
    """A callable that answers when it is told to."""
    free = threading.Event()

    def call(x):
        free.wait(20)
        return ten(x)

    call.free = free
    yield call
    free.set()


def test_answers_stand_in_their_rows():
    found = dispatch_remote(RemoteExpert(ten, timeout_s=20), X, BASE, ASKS)
    np.testing.assert_array_equal(found.outputs, np.where(ASKS[:, None], 10 * X, BASE))
    np.testing.assert_array_equal(found.served, ASKS)
    assert not found.failed.any()


@pytest.mark.parametrize(
    ("call", "event", "error"),
    [
        (raises, "raised", "no route to host"),
        (refuses, "raised", "1"),
        (lambda x: x[:2], "misshapen", r"float32\[2, 1\], not float32\[4, 1\]"),
        (lambda x: {"logits": x}, "misshapen", "logits"),
        (lambda x: x.astype(int), "misshapen", "int64"),
        (lambda x: "overloaded", "misshapen", "<U10"),
    ],
)
def test_a_call_that_fails_is_answered_by_the_base_and_counted(call, event, error, caplog):
    expert = RemoteExpert(call, timeout_s=20)
    for _ in range(2):
        found = dispatch_remote(expert, X, BASE, ASKS)
        np.testing.assert_array_equal(found.outputs, BASE)
        np.testing.assert_array_equal(found.failed, ASKS)
        assert not found.served.any()
    assert expert.events == RemoteEvents(calls=2, rows_failed=8)._replace(**{event: 2})
    with pytest.raises(AssertionError, match=error):
        raise AssertionError(str(expert.last_error))
    assert len(caplog.records) == 1  # the first failure is told, the others are counted


def test_single_rows_that_are_nan_are_the_bases():
    expert = RemoteExpert(lambda x: np.where(x == 3, np.nan, 10 * x), timeout_s=20)
    found = dispatch_remote(expert, X, BASE, ASKS)
    assert found.outputs.ravel().tolist() == [0, -1, 20, -1, -1, 50]
    assert np.flatnonzero(found.failed).tolist() == [3]
    assert expert.events == RemoteEvents(calls=1, answered=1, rows_failed=1)


def test_a_late_answer_is_dropped_and_open_calls_are_limited(hanging):
    expert = RemoteExpert(hanging, timeout_s=0.05, most_open=2)
    for _ in range(4):
        found = dispatch_remote(expert, X, BASE, ASKS)
        np.testing.assert_array_equal(found.outputs, BASE)
    assert expert.events == RemoteEvents(calls=4, late=2, refused=2, rows_failed=16)
    hanging.free.set()
    # Its threads are free again, and what they brought is nobody's answer.
    expert.timeout_s = 20
    for _ in range(100):
        found = dispatch_remote(expert, X + 1, BASE, ASKS)
        if found.served.any():
            break
        threading.Event().wait(0.02)
    np.testing.assert_array_equal(found.outputs[ASKS], 10 * (X + 1)[ASKS])
    assert found.served.tolist() == ASKS.tolist()


def test_calls_are_padded_to_buckets_with_real_rows_and_none_is_made_for_nobody():
    sizes = []
    expert = RemoteExpert(lambda x: (sizes.append(x.ravel().tolist()), ten(x))[1], timeout_s=20)
    for asks in (ASKS, ~ASKS, ASKS & False):
        found = dispatch_remote(expert, X, BASE, asks, buckets=(3,))
        np.testing.assert_array_equal(found.served, asks)
    assert sizes == [[0, 2, 3, 5], [1, 4, 1]]  # more than the top bucket go as they are
    assert expert.events.calls == 2


def test_a_compiled_expert_and_trees():
    kernel = jnp.full((1, 1), 3.0)
    expert = RemoteExpert(jax.jit(lambda batch: {"y": batch["x"] @ kernel}), timeout_s=60)
    found = dispatch_remote(expert, {"x": X}, {"y": jnp.asarray(BASE)}, jnp.asarray(ASKS), buckets=(8,))
    np.testing.assert_array_equal(found.outputs["y"], np.where(ASKS[:, None], 3 * X, BASE))


def test_bfloat16_and_float64_answers_are_rounded_to_the_bases_dtype():
    base = jnp.asarray(BASE, jnp.bfloat16)
    for answer in (np.float64, jnp.bfloat16):
        expert = RemoteExpert(lambda x, answer=answer: np.asarray(10 * x, answer), timeout_s=20)
        found = dispatch_remote(expert, X, base, ASKS)
        assert found.outputs.dtype == jnp.bfloat16
        assert found.served.sum() == 4


@pytest.mark.parametrize("rows", [0, 1])
def test_batch_of_one_and_empty_batch(rows):
    expert = RemoteExpert(ten, timeout_s=20)
    found = dispatch_remote(expert, X[:rows], BASE[:rows], ASKS[:rows])
    assert found.outputs.shape == (rows, 1)
    line = QueryQueue(expert, sizes=(4,), deadline_s=1.0)
    line.submit(X[:rows], BASE[:rows], ASKS[:rows])
    (done,) = line.flush()
    np.testing.assert_array_equal(done.found.outputs, found.outputs)


def collected(line, count):
    """Batches until there are so many: answers come from another thread."""
    found = []
    for _ in range(500):
        found += line.collect()
        if len(found) >= count:
            return found
        threading.Event().wait(0.01)
    raise AssertionError(f"{len(found)} of {count} batches came back")


def test_rows_of_several_batches_share_a_call():
    seen = []
    expert = RemoteExpert(lambda x: (seen.append(x.ravel().tolist()), ten(x))[1], timeout_s=20, clock=Clock())
    line = QueryQueue(expert, sizes=(4,), deadline_s=60)
    for shift in range(4):
        assert line.submit(X + shift, BASE, np.arange(6) == shift) == shift
    found = collected(line, 4)
    assert seen == [[0, 2, 4, 6]]
    assert [done.ticket for done in found] == [0, 1, 2, 3]
    for shift, done in enumerate(found):
        asks = np.arange(6) == shift
        np.testing.assert_array_equal(done.found.outputs, np.where(asks[:, None], 10 * (X + shift), BASE))
        np.testing.assert_array_equal(done.found.served, asks)


def test_batches_come_back_in_order_and_wait_for_those_before_them():
    clock = Clock()
    line = QueryQueue(RemoteExpert(ten, timeout_s=20, clock=clock), sizes=(2, 8), deadline_s=1.0)
    line.submit(X, BASE, ASKS)
    line.submit(X, BASE, ASKS & False)  # nobody asks, but its turn is the second
    assert line.collect() == []
    assert line.waiting == 4
    clock.now = 0.99
    assert line.collect() == []
    assert line.waiting == 4
    clock.now = 1.0
    found = collected(line, 2)
    assert [done.ticket for done in found] == [0, 1]
    assert [done.seconds for done in found] == [1.0, 1.0]
    assert line.collect() == line.flush() == []


@pytest.mark.parametrize("call", [raises, lambda x: x[:1], lambda x: np.full_like(x, np.nan)])
def test_a_queue_loses_nothing_whatever_the_expert_does(call):
    expert = RemoteExpert(call, timeout_s=20)
    line = QueryQueue(expert, sizes=(3,), deadline_s=60)
    for shift in range(5):
        line.submit(X + shift, BASE + shift, ASKS)
    found = line.flush()
    assert [done.ticket for done in found] == list(range(5))
    for shift, done in enumerate(found):
        np.testing.assert_array_equal(done.found.outputs, BASE + shift)
        np.testing.assert_array_equal(done.found.failed, ASKS)
    assert expert.events.rows_failed == 20
    assert line.waiting == 0


def test_late_calls_of_a_queue_end_at_the_timeout(hanging):
    clock = Clock()
    line = QueryQueue(RemoteExpert(hanging, timeout_s=5.0, clock=clock), sizes=(4,), deadline_s=60)
    line.submit(X, BASE, ASKS)
    clock.now = 4.9
    assert line.collect() == []
    clock.now = 5.0
    (done,) = line.collect()
    np.testing.assert_array_equal(done.found.outputs, BASE)
    np.testing.assert_array_equal(done.found.failed, ASKS)


def test_a_thousand_random_batches_are_each_answered_once_and_in_order():
    rng = np.random.default_rng(0)
    flaky = lambda x: ten(x) if x[0, 0] % 3 else raises(x)
    expert = RemoteExpert(flaky, timeout_s=20, most_open=10_000)
    line = QueryQueue(expert, sizes=(4, 16), deadline_s=60)
    found, given = [], []
    for _ in range(1000):
        rows = int(rng.integers(0, 5))
        x = rng.integers(0, 100, (rows, 1)).astype(np.float32)
        asks = rng.random(rows) < 0.4
        line.submit(x, -x, asks)
        given.append((x, asks))
        found += line.collect()
    found += line.flush()
    assert [done.ticket for done in found] == list(range(1000))
    for done, (x, asks) in zip(found, given, strict=True):
        served, failed = done.found.served, done.found.failed
        np.testing.assert_array_equal(served | failed, asks)
        np.testing.assert_array_equal(done.found.outputs, np.where(served[:, None], 10 * x, -x))
    events = expert.events
    assert events.answered + events.raised == events.calls
    assert events.raised > 0
    assert events.rows_failed == sum(int(done.found.failed.sum()) for done in found)


BAD = [
    (lambda: RemoteExpert(ten, timeout_s=0.0), ValueError, "timeout_s=0.0"),
    (lambda: RemoteExpert(ten, timeout_s=1.0, most_open=0), ValueError, "most_open=0"),
    (lambda: RemoteExpert(None, timeout_s=1.0), TypeError, "call=None must be a function"),
    (lambda: QueryQueue(ten, sizes=(2,), deadline_s=1.0), TypeError, "must be a RemoteExpert"),
    (lambda: queue(sizes=()), ValueError, r"sizes=\(\)"),
    (lambda: queue(deadline_s=-1.0), ValueError, "deadline_s=-1.0"),
    (lambda: queue().submit(X, BASE, ASKS[:, None]), ValueError, r"request is bool\[6, 1\]"),
    (lambda: queue().submit(X[:2], BASE, ASKS), ValueError, r"inputs has shape \(2, 1\), but request has 6 rows"),
    (lambda: dispatch_remote(RemoteExpert(ten, timeout_s=1.0), X, BASE, ASKS * 1.0), ValueError, "request is float"),
]


def queue(**options):
    return QueryQueue(RemoteExpert(ten, timeout_s=1.0), **{"sizes": (8,), "deadline_s": 60.0} | options)


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_rows_of_other_shapes_do_not_share_a_call():
    line = queue()
    line.submit(X, BASE, ASKS)
    with pytest.raises(ValueError, match="Flush first, or pad them alike"):
        line.submit(np.ones((2, 3), np.float32), BASE[:2], ASKS[:2])
    assert [done.ticket for done in line.flush()] == [0]
