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


def filled(module):
    """Variables with every parameter off its start, so that none hides."""
    variables = jax.jit(module.init)(KEY, X)
    leaves, tree = jax.tree.flatten(variables)
    draw = np.random.default_rng(1)
    return tree.unflatten([leaf + 0.1 * draw.normal(size=leaf.shape).astype(leaf.dtype) for leaf in leaves])


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
    variables = filled(reference)
    carry, states = jax.jit(functools.partial(reference.apply, **options))(variables, X, seq_lengths=LENGTHS)
    inner = {"params": variables["params"]["cell"]}
    for layer, own in [(Recurrent(CELLS[name]), variables), *((OWN[key], inner) for key in OWN if key == name)]:
        call = jax.jit(functools.partial(layer.apply, return_carry=True, **options))
        found, outputs = call(own, X, seq_lengths=LENGTHS)
        same(found, carry)
        np.testing.assert_allclose(outputs, states, rtol=0, atol=2e-6)
        turned = layer.apply(own, X.swapaxes(0, 1), seq_lengths=LENGTHS, time_major=True, **options)
        np.testing.assert_allclose(turned, np.swapaxes(states, 0, 1), rtol=0, atol=2e-6)


# The others are nn.RNN of their cells, as the test above finds.
@pytest.mark.parametrize("name", daily(LAYERS, {"recurrent_lstm", "irnn", "lru", "tarnn_zero", *ALONE}))
def test_padding_reaches_nothing_and_a_stream_goes_on(name):
    layer = LAYERS[name]
    variables = filled(layer)
    apply = jax.jit(functools.partial(layer.apply, return_carry=True))
    carry, states = apply(variables, X, seq_lengths=LENGTHS)
    for row, length in enumerate(LENGTHS):
        alone, own = layer.apply(variables, X[row : row + 1, :length], return_carry=True)
        np.testing.assert_allclose(states[row, :length], own[0], rtol=0, atol=2e-6)
        same(jax.tree.map(lambda leaf, row=row: leaf[row], carry), jax.tree.map(lambda leaf: leaf[0], alone))
    # The stream in two chunks: the second sequence has ended with the first one, and keeps its carry.
    half, first = apply(variables, X[:, :3], seq_lengths=np.minimum(LENGTHS, 3))
    end, second = apply(variables, X[:, 3:], half, seq_lengths=np.maximum(LENGTHS - 3, 0))
    same(end, carry)
    joined = np.concatenate([first, second], 1)
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
    carry, _ = layer.apply(variables, X[:, :2], return_carry=True)
    narrow = lambda leaf: leaf if leaf.dtype.kind in "ic" else leaf.astype(jnp.bfloat16)
    whole = lambda leaf: leaf if leaf.dtype.kind in "ic" else jnp.ones(leaf.shape, jnp.int32)
    for change, limit in ((narrow, 0.05), (whole, 1e-5)):
        given = jax.tree.map(change, carry)
        wide = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), given, carry)
        end, states = layer.apply(variables, X[:, 2:], given, return_carry=True)
        right, want = layer.apply(variables, X[:, 2:], wide, return_carry=True)
        assert states.dtype == jnp.float32
        assert [leaf.dtype for leaf in jax.tree.leaves(end)] == [leaf.dtype for leaf in jax.tree.leaves(right)]
        np.testing.assert_allclose(states, want, rtol=0, atol=limit)


@pytest.mark.parametrize("layer", [Recurrent(GRUCell(4)), IncrementalRNN(4, length=6), LRU(4)])
def test_both_directions(layer):
    both = nn.Bidirectional(layer, layer.clone())
    variables = filled(both)
    carry, states = both.apply(variables, X, seq_lengths=LENGTHS, return_carry=True)
    assert states.shape == (3, 6, 8)
    for row, length in enumerate(LENGTHS):
        alone, own = both.apply(variables, X[row : row + 1, :length], return_carry=True)
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

    grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(variables, X, LENGTHS)
    spoilt = np.where(REAL[..., None], X, np.nan)
    again, _ = jax.jit(jax.grad(loss, has_aux=True))(variables, spoilt, LENGTHS)
    same(again, grads)
    for row, length in enumerate(LENGTHS):
        alone = network.apply(variables, X[row : row + 1, :length])[0]
        found = outputs[row, :length] if read == "all" else outputs[row]
        np.testing.assert_allclose(found, alone, rtol=0, atol=2e-6)
    assert jax.tree.structure(jax.eval_shape(network.init, KEY, X)) == jax.tree.structure(variables)


def test_ids_and_rows_without_steps():
    network = SequenceNetwork(Recurrent(GRUCell(4)), 2, read="mean", vocabulary=5, embedding=3)
    ids = np.where(REAL, np.random.default_rng(0).integers(0, 5, (3, 6)), -1)
    variables = jax.jit(network.init)(KEY, np.maximum(ids, 0))
    outputs = jax.jit(network.apply)(variables, ids, seq_lengths=LENGTHS)
    np.testing.assert_allclose(outputs[1], network.apply(variables, ids[1:2, :2])[0], rtol=0, atol=2e-6)
    filling = jax.jit(network.apply)(variables, ids, seq_lengths=np.array([6, 0, 4]))  # a row that fills up a batch
    assert np.isfinite(filling).all()
    np.testing.assert_array_equal(filling[0], outputs[0])


NETWORK = SequenceNetwork(Recurrent(LSTMCell(4)), 2)
LAYER = Recurrent(LSTMCell(4))


def call(layer, *args, **options):
    return layer.apply(filled(layer), *args, **options)


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
    "structure": (lambda: call(LAYER, X, [jnp.zeros((3, 4))]), r"initial_carry has arrays .*carry of LSTMCell"),
    "width": (lambda: call(MinGRU(4), X, jnp.zeros((3, 5))), r"initial_carry has shape \(3, 5\).*another width"),
    "complex": (lambda: call(MinGRU(4), X, jnp.zeros((3, 4), complex)), r"initial_carry is complex64, but .* real"),
    "steps done": (
        lambda: call(IncrementalRNN(4, length=6), X, (jnp.zeros((3, 4)), jnp.zeros(3))),
        r"initial_carry\[1\] is float32; expected integers",
    ),
    "beyond the step sizes": (
        lambda: call(IncrementalRNN(4, length=6), X, (jnp.zeros((3, 4)), jnp.full(3, 2))),
        r"length=6, but the sequence has 8 steps",
    ),
    "stack": (lambda: call(ALONE["stack"], X, (jnp.zeros((3, 4)),)), r"one state for each of the 2 layers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()


# Training through time

NET = step_network(TARNNCell(4, length=6), 2, inputs=3)
TARGETS = np.array([0, 1, 1])


def answer_loss(params, states, targets, part):
    outputs = NET.read(params, states)
    return part.progress * optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def step_loss(params, states, targets, part):
    errors = ((NET.read(params, states) - targets[..., None]) ** 2).sum(-1)
    return (errors if part.real is None else jnp.where(part.real, errors, 0)).sum()


def trained(make, terminal, x, targets, *, rows=3, **options):
    loss = answer_loss if terminal else step_loss
    problem = SequenceProblem(NET.cell, loss, encode=NET.encode, terminal=terminal, time_axis=1)
    params, tx = jax.jit(NET.init)(KEY), optax.sgd(0.1)
    step = jax.jit(make(problem, tx))
    return step(tx.init(params), params, NET.start(rows), x, targets, **options)


def test_the_gradient_is_that_of_each_sequence_alone():
    spoilt = np.where(REAL[..., None], X, 7.0)
    _, params, carry, metrics = trained(bptt_step, True, spoilt, TARGETS, seq_lengths=LENGTHS)
    start = jax.jit(NET.init)(KEY)

    def alone(params, row):
        xs = NET.encode(params, X[row, : LENGTHS[row], None])
        _, states = jax.lax.scan(functools.partial(NET.cell, params), NET.start(1), xs)
        outputs = NET.read(params, states[-1])
        return optax.softmax_cross_entropy_with_integer_labels(outputs, TARGETS[row : row + 1]).mean()

    mean = lambda params: sum(alone(params, row) for row in range(3)) / 3
    value, grads = jax.jit(jax.value_and_grad(mean))(start)
    np.testing.assert_allclose(metrics.loss, [value], rtol=0, atol=1e-6)
    same(params, jax.tree.map(lambda p, g: p - 0.1 * g, start, grads))
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
    found = trained(make, terminal, X, targets, seq_lengths=LENGTHS)
    again = trained(make, terminal, other, targets if terminal else other[..., 0], seq_lengths=LENGTHS)
    same(found[1:3], again[1:3])
    np.testing.assert_array_equal(found[2][2], LENGTHS)
    whole = trained(make, terminal, X, targets, seq_lengths=np.full(3, 6))
    same(whole[1:3], trained(make, terminal, X, targets)[1:3])


def test_lengths_of_a_step_are_checked():
    with pytest.raises(ValueError, match=r"one integer for each of the 3 sequences"):
        trained(bptt_step, True, X, TARGETS, seq_lengths=LENGTHS[:2])
    problem = SequenceProblem(NET.cell, answer_loss, encode=NET.encode, terminal=True, time_axis=1)
    params, tx = jax.jit(NET.init)(KEY), optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"seq_lengths\[0\]=7 must be in \[0, 6\]"):
        bptt_step(problem, tx)(tx.init(params), params, NET.start(3), X, TARGETS, seq_lengths=LENGTHS + 1)


def test_a_stream_in_pieces_is_the_whole_with_lengths():
    """``fptt_online`` is told how many steps of each piece are real; a sequence that has ended waits."""
    whole = trained(functools.partial(fptt_step, part_length=3), False, X, X[..., 0], seq_lengths=LENGTHS)
    problem = SequenceProblem(NET.cell, step_loss, encode=NET.encode, time_axis=1)
    params, tx = jax.jit(NET.init)(KEY), optax.sgd(0.1)
    learn = jax.jit(fptt_online(problem, tx))
    state, carry, losses = tx.init(params), NET.start(3), []
    for first in (0, 3):
        piece = X[:, first : first + 3]
        real = np.clip(LENGTHS - first, 0, 3)
        state, params, carry, metrics = learn(state, params, carry, piece, piece[..., 0], seq_lengths=real)
        losses.append(metrics.loss)
    same((params, carry), whole[1:3])
    np.testing.assert_allclose(losses, whole[3].loss, rtol=0, atol=1e-6)


def test_a_stream_with_one_target_takes_no_lengths():
    problem = SequenceProblem(NET.cell, answer_loss, encode=NET.encode, terminal=True, time_axis=1)
    params, tx = jax.jit(NET.init)(KEY), optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"seq_lengths with terminal=True.*fptt_step"):
        fptt_online(problem, tx)(tx.init(params), params, NET.start(3), X, TARGETS, seq_lengths=LENGTHS)
