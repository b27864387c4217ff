"""Random, magnitude and Fisher pruning, and least-squares repair."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models.bert import Bert, BertClassifier
from effjax.models.decoder import Decoder
from effjax.models.parts import parts
from effjax.transformers.fisher import GateFisher, fisher_spec, gate_fisher, swap_within
from effjax.transformers.prune_rivals import magnitude_scores, random_spec, ranked_spec
from effjax.transformers.prune_spec import PruneShape, PruneSpec, prune_shape
from effjax.transformers.repair import repair_outputs
from effjax.transformers.slicing import slice_model
from effjax.transformers.validation import prune_batches

pytestmark = pytest.mark.promotes  # Flax mixes the dtypes of activations and statistics

SHAPE = PruneShape(4, 3, 5, hidden_size=6, head_width=2, kv_width=2, group_size=2)
SPEC = PruneSpec(SHAPE, attention=(1,), mlp=(0, 3), heads=((0, 1), (2, 2), (1, 0)), groups=((1, 4),), hard=(2,))
IDS = np.random.default_rng(0).integers(3, 30, (3, 6)).astype(np.int32)
MASK = np.arange(6) < np.array([[6], [4], [5]])


def drawn(module, seed=1):
    shapes = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
    draws = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: draws.normal(0.1, 0.3, leaf.shape).astype(np.float32), shapes)


def test_random_spec_removes_as_many_of_each():
    found = [random_spec(jax.random.key(seed), SPEC) for seed in range(20)]
    counts = lambda spec: {name: count for name, count in spec.removed.items() if name != "hard"}
    assert all(counts(spec) == counts(SPEC) for spec in found)
    assert found[0] == random_spec(jax.random.key(0), SPEC)
    assert len(set(found)) > 10
    # The head of the block that is gone is not counted.
    assert all(len(spec.heads) == 2 and not {layer for layer, _ in spec.heads} & set(spec.attention) for spec in found)
    assert {spec.mlp for spec in found} > {(0, 3)}
    assert found[0].hard == (2,)
    typed, raw = jax.random.key(3), random_spec(jax.random.key(3), PruneSpec(SHAPE))
    assert raw == PruneSpec(SHAPE)
    assert typed.shape == ()


def test_ranked_spec_takes_the_lowest_and_refuses_other_scores():
    scores = SPEC.gates()
    scores = scores._replace(
        attention=np.array([3.0, 2.0, 1.0, 4.0]),
        mlp=np.array([0.0, 1.0, 2.0, 0.5]),
        heads=np.arange(12.0).reshape(4, 3)[::-1],
        groups=np.arange(20.0).reshape(4, 5),
    )
    found = ranked_spec(scores, SPEC)
    assert found.attention == (2,)
    assert found.mlp == (0, 3)
    assert found.heads == ((3, 0), (3, 1))
    assert found.groups == ((1, 0),)
    for wrong, message in (
        (scores._replace(mlp=np.zeros(3)), "scores.mlp"),
        (scores._replace(heads=np.full((4, 3), np.nan)), "scores.heads"),
        (scores._replace(heads=np.full((4, 3), np.inf)), "removes 2 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            ranked_spec(wrong, SPEC)


@pytest.mark.parametrize("scanned", [False, True])
def test_magnitude_is_the_root_mean_square_of_an_elements_weights(scanned):
    module = Decoder(30, 8, 2, 4, 12, max_positions=8, num_kv_heads=2, scan_layers=scanned)
    params = drawn(module)
    scores = magnitude_scores(module, params, group_size=4)
    layer = jax.tree.map(lambda leaf: leaf[1], params["layers"]) if scanned else params["layer_1"]
    kernel = {name: layer[block][name]["kernel"] for block in layer for name in layer[block] if name != "norm"}
    # The second head of keys and values, with the two query heads that share it.
    head = [kernel["query"][:, 4:], kernel["key"][:, 2:], kernel["value"][:, 2:], kernel["output"][4:]]
    group = [kernel["gate"][:, 8:], kernel["up"][:, 8:], kernel["down"][8:]]
    rms = lambda arrays: np.sqrt(np.mean(np.concatenate([array.ravel() for array in arrays]) ** 2))
    assert scores.heads.shape == (2, 2)
    assert scores.groups.shape == (2, 3)
    assert scores.heads[1, 1] == pytest.approx(rms(head))
    assert scores.groups[1, 2] == pytest.approx(rms(group))
    assert scores.attention[1] == pytest.approx(rms([kernel[name] for name in ("query", "key", "value", "output")]))
    assert scores.mlp[1] == pytest.approx(rms([kernel[name] for name in ("gate", "up", "down")]))


def test_fisher_is_the_mean_product_of_each_samples_gradients():
    draws = np.random.default_rng(0)
    x, w = draws.normal(size=(5, 4)).astype(np.float32), draws.normal(size=(4, 3)).astype(np.float32)
    labels = np.array([0, 2, -1, 1, 1])
    shape = PruneShape(layers=1, heads=4, groups=2)
    apply = lambda params, x, gates: (x * gates.heads[0][None]) @ params + gates.groups.sum() * 0
    found = gate_fisher(apply, w, shape, prune_batches(x, labels, batch_size=3))
    logits = x @ w
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    errors = (probabilities - np.eye(3)[labels])[labels >= 0]
    grads = x[labels >= 0] * (errors @ w.T)
    np.testing.assert_allclose(found.heads[0], grads.T @ grads / 4, rtol=1e-4)
    assert found.groups.shape == (1, 2, 2)
    assert not found.groups.any()
    with pytest.raises(ValueError, match="batches are empty"):
        gate_fisher(apply, w, shape, [])


def test_fisher_spec_is_the_cheapest_of_all():
    draws = np.random.default_rng(0)
    shape = PruneShape(2, 2, 3, hidden_size=6, head_width=3, kv_width=3, group_size=4)
    for macs in (0.9, 0.6, 0.3):
        diagonal = draws.uniform(size=(2, 2)), draws.uniform(size=(2, 3))
        fisher = GateFisher(*(np.stack([np.diag(row) for row in part]) for part in diagonal))
        spec = fisher_spec(fisher, shape, macs=macs, length=5)
        assert spec.kept_macs(5) <= macs + 1e-9
        values, best = np.concatenate([part.ravel() for part in diagonal]), np.inf
        for kept in itertools.product((False, True), repeat=10):
            off = ~np.array(kept)
            places = lambda mask, width: tuple((int(i) // width, int(i) % width) for i in np.flatnonzero(mask))
            other = PruneSpec(shape, heads=places(off[:4], 2), groups=places(off[4:], 3))
            if other.kept_macs(5) <= macs + 1e-9:
                best = min(best, values[off].sum())
        cost = sum(diagonal[0][place] for place in spec.heads) + sum(diagonal[1][place] for place in spec.groups)
        assert cost == pytest.approx(best)
    with pytest.raises(ValueError, match=r"fisher\.heads"):
        fisher_spec(fisher._replace(heads=np.zeros((2, 3, 3))), shape, macs=0.5, length=5)
    with pytest.raises(ValueError, match=r"macs=1\.0"):
        fisher_spec(fisher, shape, macs=1.0, length=5)
    with pytest.raises(ValueError, match="says no sizes"):
        fisher_spec(fisher, PruneShape(2, 2, 3), macs=0.5, length=5)


def test_swaps_lower_the_full_form():
    draws = np.random.default_rng(0)
    for _ in range(20):
        root = draws.normal(size=(6, 3))
        matrix, removed = root @ root.T, np.arange(6) < 3
        found = swap_within(matrix, removed)
        assert found.sum() == 3
        now, before = (mask.astype(float) @ matrix @ mask.astype(float) for mask in (found, removed))
        assert now <= before + 1e-9


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["bert", "opt"])
def test_repair_restores_what_kept_columns_can_say(name):
    """Where a head and a group are copies of others, the model without them becomes the whole one again."""
    options = {"norm": "layer", "mlp": "relu", "positions": "learned", "use_bias": True}
    if name == "bert":
        module = BertClassifier(Bert(30, 8, 2, 2, 12, max_positions=8), classes=3)
    else:
        module = Decoder(30, 8, 2, 2, 12, max_positions=8, **options)
    params = jax.tree.map(np.array, drawn(module))
    layers = params["encoder"] if name == "bert" else params
    for part in ("query", "key", "value"):
        for leaf in layers["layer_0"]["attention"][part].values():
            leaf[..., 4:] = leaf[..., :4]
    for leaf in layers["layer_1"]["mlp"]["up"].values():
        leaf[..., 8:] = leaf[..., :4]
    spec = PruneSpec(prune_shape(module, group_size=4), heads=((0, 1),), groups=((1, 2),))
    batches = prune_batches({"input_ids": IDS, "mask": MASK}, np.zeros(3, np.int32), batch_size=4)
    repaired = repair_outputs(module, params, spec, batches, ridge=1e-9)
    run = jax.jit(lambda module, params: module.apply({"params": params}, IDS, MASK), static_argnums=0)
    whole = run(module, params)
    fixed, broken = (run(*slice_model(module, tree, spec)) for tree in (repaired, params))
    real = slice(None) if name == "bert" else MASK
    np.testing.assert_allclose(fixed[real], whole[real], atol=2e-3)
    assert np.abs(broken - whole)[real].max() > 0.04
    changed = [path for path, a, b in _pairs(params, repaired) if not np.array_equal(a, b)]
    assert len(changed) == 4
    assert all("output" in path or "down" in path for path in changed)


def test_repair_brings_the_stream_as_close_as_it_can():
    """What the gone attention block added is made up for: no other output layer comes closer on these texts."""
    options = {"norm": "layer", "mlp": "relu", "positions": "learned", "use_bias": True}
    module = Decoder(30, 8, 1, 2, 12, max_positions=8, **options)
    params, cut = drawn(module), parts(module)
    spec = PruneSpec(prune_shape(module, group_size=4), attention=(0,), groups=((0, 2),))
    inputs = {"input_ids": IDS, "mask": MASK}
    repaired = repair_outputs(module, params, spec, prune_batches(inputs, np.zeros(3, int), batch_size=3), ridge=1e-9)
    gates = jax.tree.map(lambda gate: jnp.asarray(gate[0]), spec.gates())

    @jax.jit
    @jax.value_and_grad
    def distance(layer):
        x = cut.embed(params, inputs)
        apart = cut.layer(layer, x, inputs, gates) - cut.layer(params["layer_0"], x, inputs)
        return jnp.sum(jnp.where(MASK[..., None], apart, 0) ** 2)

    (before, steep), (after, flat) = (distance(tree["layer_0"]) for tree in (params, repaired))
    assert after < 0.5 * before
    size = lambda grads: np.abs(grads["mlp"]["down"]["kernel"]).max()
    assert size(flat) < 1e-3 * size(steep)


def _pairs(left, right):
    pairs = zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True)
    return [(jax.tree_util.keystr(path), a, b) for (path, a), b in pairs]


def test_repair_refuses_what_it_cannot_do():
    module = Bert(30, 8, 2, 2, 12, scan_layers=True)
    spec = PruneSpec(prune_shape(module, group_size=4), heads=((0, 1),))
    batches = prune_batches({"input_ids": IDS}, np.zeros(3, np.int32), batch_size=4)
    with pytest.raises(ValueError, match="scan_layers=False"):
        repair_outputs(module, {}, spec, batches)
    with pytest.raises(ValueError, match="batches are empty"):
        repair_outputs(module, {}, spec, [])
    with pytest.raises(ValueError, match="ridge=0"):
        repair_outputs(module, {}, spec, batches, ridge=0.0)
    with pytest.raises(ValueError, match="another model"):
        repair_outputs(Bert(30, 8, 3, 2, 12), {}, spec, batches)
    assert jnp.ndim(0) == 0
