"""Sequences of unequal length, and carries that go in and out, against ``nn.RNN`` and each sequence alone."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.models.linear_recurrence import LRU, LRUCell, LRUStack, MinGRU, MinGRUCell
from effjax.models.sequence import GRUCell, LSTMCell, Recurrent, RNNCell
from effjax.models.sequence_network import SequenceNetwork, step_network
from effjax.models.sequence_rivals import CoRNNCell, FastRNNCell
from effjax.recurrent.dual import DualODE
from effjax.recurrent.fixed_point import EquilibriumRNN
from effjax.recurrent.irnn import IncrementalRNN, IncrementalRNNCell
from effjax.recurrent.ltc_spiking import LTCSpikingCell
from effjax.recurrent.sequence_problem import SequenceProblem
from effjax.recurrent.tarnn import TARNN, TARNNCell
from effjax.recurrent.through_time import bptt_step, fptt_online, fptt_step, tbptt_step

KEY = jax.random.key(0, impl="rbg")
LENGTHS = np.array([6, 2, 4])
X = np.random.default_rng(0).normal(size=(3, 6, 3)).astype(np.float32)
REAL = np.arange(6) < LENGTHS[:, None]

CELLS = {
    "rnn": RNNCell(4),
    "lstm": LSTMCell(4),
    "gru": GRUCell(4),
    "fastrnn": FastRNNCell(4, length=6),
    "cornn": CoRNNCell(4),
    "lru": LRUCell(4),
    "min_gru": MinGRUCell(4),
    "irnn": IncrementalRNNCell(4, length=6, K=2),
    "irnn_shared": IncrementalRNNCell(4, eta_mode="shared"),
    "tarnn": TARNNCell(4, length=6),
    "tarnn_zero": TARNNCell(4, length=6, first_prev="zero", variant="euler"),
    "tarnn_input": TARNNCell(4, eta_mode="input"),
    "spiking": LTCSpikingCell(4, norm="layer"),
}
OWN = {
    "lru": LRU(4),
    "min_gru": MinGRU(4),
    "irnn": IncrementalRNN(4, length=6, K=2),
    "irnn_shared": IncrementalRNN(4, eta_mode="shared"),
    "tarnn": TARNN(4, length=6),
    "tarnn_zero": TARNN(4, length=6, first_prev="zero", variant="euler"),
    "tarnn_input": TARNN(4, eta_mode="input"),
}
ALONE = {
    "stack": LRUStack(4, layers=2, r_min=0.5, r_max=0.9, max_phase=3.0),
    "equilibrium": EquilibriumRNN(4, iterations=60),
    "dual": DualODE(4, length=6),
    "dual_shared": DualODE(4, eta_mode="shared", eta=0.3),
}
LAYERS = {
    **{f"recurrent_{name}": Recurrent(cell) for name, cell in CELLS.items() if name != "spiking"},  # starts at random
    **OWN,
    **ALONE,
}


def filled(module, x=X):
    """Variables drawn at random, every one off its start, so that none hides."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(module.init, KEY, x))
    draw = np.random.default_rng(1)
    # Factors, which are single numbers, about 1; all else about 0.
    drawn = [(leaf.ndim == 0) + 0.3 * draw.normal(size=leaf.shape) for leaf in leaves]
    return tree.unflatten([np.asarray(value, leaf.dtype) for value, leaf in zip(drawn, leaves, strict=True)])


def each_alone(apply, variables, x=X, **options):
    """What ``apply`` gives for each sequence by itself, without padding."""
    return [apply(variables, x[row : row + 1, :length], **options) for row, length in enumerate(LENGTHS)]


def same(left, right, atol=2e-6):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), left, right)


def daily(names, some):
    """Of these names some; all of them nightly."""
    return [pytest.param(name, marks=[pytest.mark.nightly] * (name not in some)) for name in names]


TURNED = {"reverse": True}, {"reverse": True, "keep_order": True}


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in CELLS), ("gru", TURNED[1]), ("lru", TURNED[0]), ("tarnn", TURNED[1])]
)
def test_a_layer_is_nn_rnn_of_its_cell(name, options):
    reference = nn.RNN(CELLS[name], return_carry=True)
    layers = {"cell": Recurrent(CELLS[name])} | ({"own": OWN[name]} if name in OWN else {})

    @jax.jit
    def run(variables, x, lengths):
        inner = {"cell": variables, "own": {"params": variables["params"]["cell"]}}
        call = {"seq_lengths": lengths, **options}
        turned = call | {"return_carry": True, "time_major": True}
        found = {key: layer.apply(inner[key], x.swapaxes(0, 1), **turned) for key, layer in layers.items()}
        return found, reference.apply(variables, x, **call)

    found, (carry, states) = run(filled(reference), X, LENGTHS)
    for end, outputs in found.values():
        same(end, carry)
        np.testing.assert_allclose(outputs, np.swapaxes(states, 0, 1), rtol=0, atol=2e-6)


def test_a_layer_runs_outside_of_jit():
    layer = Recurrent(CELLS["gru"])
    variables = jax.tree.map(jnp.asarray, filled(layer))
    outputs = layer.apply(variables, X, seq_lengths=LENGTHS)
    np.testing.assert_allclose(outputs, jax.jit(layer.apply)(variables, X, seq_lengths=LENGTHS), rtol=0, atol=2e-6)


# The others are nn.RNN of their cells, as the test above finds.
@pytest.mark.parametrize("name", daily(LAYERS, {"recurrent_lstm", "irnn", "lru", "tarnn_zero", *ALONE}))
def test_padding_reaches_nothing_and_a_stream_goes_on(name):
    layer = LAYERS[name]
    apply = functools.partial(layer.apply, return_carry=True)

    @jax.jit
    def run(variables, x, lengths):
        # The stream in two chunks: the second sequence has ended with the first one, and keeps its carry.
        half, first = apply(variables, x[:, :3], seq_lengths=jnp.minimum(lengths, 3))
        end, second = apply(variables, x[:, 3:], half, seq_lengths=jnp.maximum(lengths - 3, 0))
        whole = apply(variables, x, seq_lengths=lengths)
        return whole, each_alone(apply, variables, x), end, jnp.concatenate([first, second], 1)

    (carry, states), rows, end, joined = jax.tree.map(np.asarray, run(filled(layer), X, LENGTHS.astype(np.int32)))
    for row, (length, (alone, own)) in enumerate(zip(LENGTHS, rows, strict=True)):
        np.testing.assert_allclose(states[row, :length], own[0], rtol=0, atol=2e-6)
        same(jax.tree.map(lambda leaf, row=row: leaf[row], carry), jax.tree.map(lambda leaf: leaf[0], alone))
    same(end, carry)
    np.testing.assert_allclose(joined[REAL], states[REAL], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "name",
    daily(
        ["recurrent_lstm", "recurrent_cornn", "recurrent_irnn", *OWN, *ALONE],
        {"recurrent_cornn", "irnn", "tarnn", "lru", "stack", "dual"},
    ),
)
def test_a_narrow_carry_is_widened(name):
    layer = LAYERS[name]
    variables = filled(layer)
    run = jax.jit(functools.partial(layer.apply, return_carry=True))
    draw = np.random.default_rng(2)
    first = jax.eval_shape(run, variables, X[:, :2])[0]
    # Integers are the steps done.
    value = lambda leaf: 2 if leaf.dtype.kind == "i" else 0.5 * draw.normal(size=leaf.shape)
    carry = jax.tree.map(lambda leaf: np.broadcast_to(value(leaf), leaf.shape).astype(leaf.dtype), first)
    narrow = lambda leaf: leaf if leaf.dtype.kind in "ic" else leaf.astype(jnp.bfloat16)
    whole = lambda leaf: leaf if leaf.dtype.kind in "ic" else np.ones(leaf.shape, np.int32)
    for change, limit in ((narrow, 0.05), (whole, 1e-5)):
        given = jax.tree.map(change, carry)
        wide = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), given, carry)
        end, states = run(variables, X[:, 2:], given)
        right, want = run(variables, X[:, 2:], wide)
        assert states.dtype == jnp.float32
        assert [leaf.dtype for leaf in jax.tree.leaves(end)] == [leaf.dtype for leaf in jax.tree.leaves(right)]
        np.testing.assert_allclose(states, want, rtol=0, atol=limit)


@pytest.mark.parametrize("layer", [Recurrent(GRUCell(4)), IncrementalRNN(4, length=6), LRU(4)])
def test_both_directions(layer):
    both = nn.Bidirectional(layer, layer.clone())
    apply = functools.partial(both.apply, return_carry=True)
    run = jax.jit(
        lambda variables, x, lengths: (apply(variables, x, seq_lengths=lengths), each_alone(apply, variables, x))
    )
    (carry, states), rows = jax.tree.map(np.asarray, run(filled(both), X, LENGTHS))
    assert states.shape == (3, 6, 8)
    for row, (length, (alone, own)) in enumerate(zip(LENGTHS, rows, strict=True)):
        np.testing.assert_allclose(states[row, :length], own[0], rtol=0, atol=2e-6)
        same(jax.tree.map(lambda leaf, row=row: leaf[row], carry), jax.tree.map(lambda leaf: leaf[0], alone))


SEVERAL = nn.Sequential([nn.Dense(4), nn.Bidirectional(LRU(4), LRU(4)), nn.gelu, MinGRU(4)])


@pytest.mark.parametrize(
    ("layer", "read"),
    [
        (Recurrent(LSTMCell(4)), "last"),
        (Recurrent(LSTMCell(4)), "mean"),
        (ALONE["stack"], "all"),
        (nn.RNN(nn.GRUCell(4)), "mean"),
        (SEVERAL, "last"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_answer_does_not_depend_on_the_padding(layer, read):
    network = SequenceNetwork(layer, 2, read=read)
    variables = filled(network)

    def loss(variables, x, lengths):
        outputs = network.apply(variables, x, seq_lengths=lengths)
        return ((outputs**2).reshape(3, -1, 2) * (REAL[..., None] if read == "all" else 1)).sum(), outputs

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    grads, outputs = jax.tree.map(np.asarray, gradient(variables, X, LENGTHS))
    spoilt = np.where(REAL[..., None], X, np.nan)
    again, _ = gradient(variables, spoilt, LENGTHS)
    same(again, grads)
    rows = jax.jit(functools.partial(each_alone, network.apply))(variables)
    for row, (length, alone) in enumerate(zip(LENGTHS, rows, strict=True)):
        found = outputs[row, :length] if read == "all" else outputs[row]
        np.testing.assert_allclose(found, alone[0], rtol=0, atol=2e-6)
    assert jax.tree.structure(jax.eval_shape(network.init, KEY, X)) == jax.tree.structure(variables)


def test_ids_and_rows_without_steps():
    network = SequenceNetwork(Recurrent(GRUCell(4)), 2, read="mean", vocabulary=5, embedding=3)
    ids = np.where(REAL, np.random.default_rng(0).integers(0, 5, (3, 6)), -1)
    variables = filled(network, np.maximum(ids, 0))
    apply = jax.jit(network.apply)
    outputs = apply(variables, ids, seq_lengths=LENGTHS)
    np.testing.assert_allclose(outputs[1], apply(variables, ids[1:2, :2])[0], rtol=0, atol=2e-6)
    filling = apply(variables, ids, seq_lengths=np.array([6, 0, 4]))  # a row that fills up a batch
    assert np.isfinite(filling).all()
    np.testing.assert_array_equal(filling[0], outputs[0])


NETWORK = SequenceNetwork(Recurrent(LSTMCell(4)), 2)
LAYER = Recurrent(LSTMCell(4))


def call(layer, *args, **options):
    """The call, traced only; its arguments are known, so that it checks their values too."""
    return jax.eval_shape(lambda: layer.init_with_output(KEY, *args, **options))


START = np.zeros((3, 4), np.float32)
INCREMENTAL = IncrementalRNN(4, length=6)

BAD = {
    "rank": (lambda: call(LAYER, X[0]), r"x has shape \(6, 3\); expected \[batch, time, features\]"),
    "rank of a parallel layer": (lambda: call(LRU(4), X[0]), r"x has shape \(6, 3\)"),
    "mask": (lambda: call(LAYER, X, seq_lengths=REAL), r"seq_lengths is bool\[3, 6\].*mask.sum\(1\)"),
    "floats": (lambda: call(LAYER, X, seq_lengths=LENGTHS / 1.0), r"seq_lengths is float64\[3\]"),
    "rows": (lambda: call(LAYER, X, seq_lengths=LENGTHS[:2]), r"each of the 3 sequences"),
    "beyond": (lambda: call(LAYER, X, seq_lengths=LENGTHS + 1), r"seq_lengths\[0\]=7 must be in \[0, 6\]"),
    "negative": (lambda: call(LAYER, X, seq_lengths=LENGTHS - 3), r"seq_lengths\[1\]=-1 must be in \[0, 6\]"),
    "no steps": (lambda: call(NETWORK, X, seq_lengths=LENGTHS - 2), r"seq_lengths\[1\]=0 must be in \[1, 6\]"),
    "batch statistics": (
        lambda: call(Recurrent(LTCSpikingCell(4)), X, seq_lengths=LENGTHS),
        r"norm='batch' with seq_lengths.*norm='layer'",
    ),
    "a layer that takes none": (
        lambda: call(SequenceNetwork(nn.Conv(4, [3]), 2), X, seq_lengths=LENGTHS),
        r"layer Conv, which takes none",
    ),
    "structure": (lambda: call(LAYER, X, [START]), r"initial_carry has arrays .*carry of LSTMCell"),
    "width": (
        lambda: call(MinGRU(4), X, np.zeros((3, 5), np.float32)),
        r"initial_carry has shape \(3, 5\).*another width",
    ),
    "complex": (lambda: call(MinGRU(4), X, np.zeros((3, 4), np.complex64)), r"initial_carry is complex64, but .* real"),
    "steps done": (
        lambda: call(INCREMENTAL, X, (START, np.zeros(3, np.float32))),
        r"initial_carry\[1\] is float32; expected integers",
    ),
    "beyond the step sizes": (
        lambda: INCREMENTAL.apply(filled(INCREMENTAL), X, (START, np.full(3, 2, np.int32))),  # not traced: known steps
        r"length=6, but the sequence has 8 steps",
    ),
    "stack": (lambda: call(ALONE["stack"], X, (START,)), r"one state for each of the 2 layers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()


# Training through time

NET = step_network(TARNNCell(4, length=6), 2, inputs=3)
TARGETS = np.array([0, 1, 1])
SGD = optax.sgd(0.1)


def answer_loss(params, states, targets, part):
    outputs = NET.read(params, states)
    return part.progress * optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def step_loss(params, states, targets, part):
    errors = ((NET.read(params, states) - targets[..., None]) ** 2).sum(-1)
    return (errors if part.real is None else jnp.where(part.real, errors, 0)).sum()


def stepper(make, terminal, tx=SGD):
    """A step over sequences from the start, compiled once for inputs of one shape."""
    loss = answer_loss if terminal else step_loss
    step = jax.jit(make(SequenceProblem(NET.cell, loss, encode=NET.encode, terminal=terminal, time_axis=1), tx))
    return functools.partial(step, tx.init(started()[0]), *started())


@functools.cache
def started():
    """The parameters and the carry of three sequences."""
    return jax.jit(lambda: (NET.init(KEY), NET.start(3)))()


def test_the_gradient_is_that_of_each_sequence_alone():
    spoilt = np.where(REAL[..., None], X, 7.0)
    _, params, carry, metrics = stepper(bptt_step, True)(spoilt, TARGETS, seq_lengths=LENGTHS)
    start, _ = started()

    def alone(params, row):
        xs = NET.encode(params, X[row, : LENGTHS[row], None])
        _, states = jax.lax.scan(functools.partial(NET.cell, params), NET.start(1), xs)
        outputs = NET.read(params, states[-1])
        return optax.softmax_cross_entropy_with_integer_labels(outputs, TARGETS[row : row + 1]).mean()

    mean = lambda params: sum(alone(params, row) for row in range(3)) / 3
    value, grads = jax.jit(jax.value_and_grad(mean))(start)
    np.testing.assert_allclose(metrics.loss, [value], rtol=0, atol=1e-6)
    same(params, jax.tree.map(lambda p, g: np.asarray(p) - np.float32(0.1) * np.asarray(g), start, grads))
    np.testing.assert_array_equal(carry[2], LENGTHS)


@pytest.mark.parametrize(
    ("make", "terminal"),
    [
        (functools.partial(fptt_step, part_length=2), True),
        (functools.partial(fptt_step, part_length=4, recompute_state=True, skip_nonfinite=True), False),
        (functools.partial(tbptt_step, parts=3), False),
        (functools.partial(bptt_step, parts=3, remat=True), True),
    ],
)
def test_steps_over_parts_do_not_read_the_padding(make, terminal):
    targets = TARGETS if terminal else X[..., 0]
    other = np.where(REAL[..., None], X, -3.0)
    step = stepper(make, terminal)
    found = step(X, targets, seq_lengths=LENGTHS)
    again = step(other, targets if terminal else other[..., 0], seq_lengths=LENGTHS)
    same(found[1:3], again[1:3])
    np.testing.assert_array_equal(found[2][2], LENGTHS)
    same(step(X, targets, seq_lengths=np.full(3, 6))[1:3], step(X, targets)[1:3])


def test_lengths_of_a_step_are_checked():
    with pytest.raises(ValueError, match=r"one integer for each of the 3 sequences"):
        stepper(bptt_step, True)(X, TARGETS, seq_lengths=LENGTHS[:2])
    problem = SequenceProblem(NET.cell, answer_loss, encode=NET.encode, terminal=True, time_axis=1)
    with pytest.raises(ValueError, match=r"seq_lengths\[0\]=7 must be in \[0, 6\]"):
        bptt_step(problem, SGD)(SGD.init(None), *started(), X, TARGETS, seq_lengths=LENGTHS + 1)


def test_a_stream_in_pieces_is_the_whole_with_lengths():
    """``fptt_online`` is told how many steps of each piece are real; a sequence that has ended waits."""
    whole = stepper(functools.partial(fptt_step, part_length=3), False)(X, X[..., 0], seq_lengths=LENGTHS)
    learn = jax.jit(fptt_online(SequenceProblem(NET.cell, step_loss, encode=NET.encode, time_axis=1), SGD))
    (params, carry), losses = started(), []
    state = SGD.init(params)
    for first in (0, 3):
        piece = X[:, first : first + 3]
        real = np.clip(LENGTHS - first, 0, 3)
        state, params, carry, metrics = learn(state, params, carry, piece, piece[..., 0], seq_lengths=real)
        losses.append(metrics.loss)
    same((params, carry), whole[1:3])
    np.testing.assert_allclose(losses, whole[3].loss, rtol=0, atol=1e-6)


def test_a_stream_with_one_target_takes_no_lengths():
    problem = SequenceProblem(NET.cell, answer_loss, encode=NET.encode, terminal=True, time_axis=1)
    with pytest.raises(ValueError, match=r"seq_lengths with terminal=True.*fptt_step"):
        fptt_online(problem, SGD)(SGD.init(None), *started(), X, TARGETS, seq_lengths=LENGTHS)
