"""The AxFormer study on one's own fine-tuned checkpoint: pruned as it is, exported smaller, measured."""

import json

import jax
import numpy as np
import pytest

from effjax.core.cost import count_params
from effjax.models.bert import Bert, BertClassifier
from effjax.models.convert import save_weights
from effjax.models.families import FAMILIES
from effjax.models.family_parts import dense
from effjax.models.pretrained import load_pretrained
from effjax.recipes.axformer import AxformerStudy, groups
from effjax.recipes.axformer_choices import static_spec
from effjax.recipes.spec import Budget
from effjax.train.loop import fit
from effjax.transformers.prune_spec import PruneShape, PruneSpec


def write_classifier(folder, tokenizer, head=True, **config):
    """A folder as Hugging Face writes it, with random weights and the tokenizer of the texts."""
    folder.mkdir()
    module = BertClassifier(Bert(tokenizer.vocab_size, 8, 1, 2, 16, max_positions=32), classes=2)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    draws = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draws.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)
    rules = [rule for rule in FAMILIES["bert"].rules("bert.", {}) if rule.target is not None]
    rules = [*dense("classifier", "head"), *(rule._replace(target=f"encoder/{rule.target}") for rule in rules)]
    tree = params if head else {"encoder": params["encoder"]}
    save_weights(folder / "model.safetensors", tree, rules)
    sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 32, "type_vocab_size": 2, "pool": "mean"}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **sizes, **config}))
    tokenizer.save(folder)
    return params


def study_of(folder, monkeypatch, **fields):
    monkeypatch.setenv("EFFJAX_MODELS", str(folder.parent))
    config = AxformerStudy(
        tasks=(f"sms_spam/{folder.name}",),
        budget=Budget(1, "epochs"),
        seeds=(0,),
        train_rows=60,
        test_rows=20,
        max_length=16,
        group_size=4,
        **fields,
    )
    return groups(config)[0]


@pytest.fixture
def tokenizer():
    from effjax.data.tokens import train_tokenizer

    return train_tokenizer(["free call now", "see you at home"] * 3, 60)


def test_a_fine_tuned_checkpoint_is_pruned_as_it_is(tmp_path, monkeypatch, tokenizer):
    params = write_classifier(tmp_path / "tuned", tokenizer)
    group = study_of(tmp_path / "tuned", monkeypatch)
    loaded = group.load()
    assert loaded.tuned
    assert "nothing is trained" in loaded.task.source
    (arm,) = [arm for arm in group.arms if arm.name == "axformer-loose"]
    program = arm.build(loaded)
    state = fit(program, 0).state
    jax.tree.map(np.testing.assert_array_equal, state.train.params, params)
    assert program.evaluate(state)["kept_params"] < 1
    program.export(state, tmp_path / "small")
    spec = PruneSpec.load(tmp_path / "small" / "prune_spec.json")
    small = load_pretrained(tmp_path / "small", classes=2)
    assert not small.initialised
    assert count_params(params) - count_params(small.params) == spec.removed_params > 0
    assert loaded.search.cache_info().misses == 1
    assert len(json.loads((tmp_path / "small" / "latency.json").read_text())["median_ms"]) == 4


@pytest.mark.nightly
def test_heads_that_do_not_fit_are_told(tmp_path, monkeypatch, tokenizer):
    write_classifier(tmp_path / "bare", tokenizer, head=False)
    assert not study_of(tmp_path / "bare", monkeypatch).load().tuned
    with pytest.raises(ValueError, match="has no head for 2 classes"):
        study_of(tmp_path / "bare", monkeypatch, fine_tuned=True).load()
    write_classifier(tmp_path / "other", tokenizer, id2label={"0": "spam", "1": "ham"})
    with pytest.raises(ValueError, match="the same in another order"):
        study_of(tmp_path / "other", monkeypatch).load()


def test_a_static_model_has_the_operations_asked_for():
    shape = PruneShape(6, 2, 8, hidden_size=16, head_width=8, kv_width=8, group_size=8)
    for share in (0.2, 0.5, 0.77, 1.0):
        spec = static_spec(shape, share, 12)
        assert spec.attention == spec.mlp
        assert 0 not in spec.mlp
        # As close as one group in each of the layers that stay.
        step = (6 - len(spec.mlp)) * shape.macs_of("group", 12) / 6
        step /= shape.macs_of("attention", 12) + shape.macs_of("mlp", 12)
        assert share - step < spec.kept_macs(12) <= share + 1e-9
    assert not static_spec(shape, 1.0, 12).removed_any


@pytest.mark.nightly
def test_arms_that_train_on_move_what_is_left_alone(tmp_path, monkeypatch, tokenizer):
    """Removed parts get no gradient; a teacher moves the others elsewhere than labels do."""
    params = write_classifier(tmp_path / "tuned", tokenizer)
    group = study_of(tmp_path / "tuned", monkeypatch, dropout=0.0, learning_rates=(1e-2,), tune_epochs=3)
    loaded = group.load()
    builds = {arm.name: arm.build for arm in group.arms}
    states = {}
    for name in ("axformer-loose", "axformer-tuned", "axformer-distilled", "axformer-hard", "small-distilled"):
        program = builds[name](loaded)
        states[name] = fit(program, 0).state
        assert 0 <= program.evaluate(states[name])["accuracy"] <= 1
    loose, tuned, distilled = (states[name] for name in ("axformer-loose", "axformer-tuned", "axformer-distilled"))
    jax.tree.map(np.testing.assert_array_equal, loose.train.params, params)  # donated by no other arm
    jax.tree.map(np.testing.assert_array_equal, tuned.gates, loose.gates)
    layer = lambda state: state.train.params["encoder"]["layer_0"]
    assert loose.gates.attention[0] == 0
    assert loose.gates.mlp[0] == 1
    jax.tree.map(np.testing.assert_array_equal, layer(tuned)["attention"]["value"], layer(loose)["attention"]["value"])
    down = lambda state: np.asarray(layer(state)["mlp"]["down"]["kernel"])
    assert np.abs(down(tuned) - down(loose)).max() > 1e-3
    head = lambda state: np.asarray(state.train.params["head"]["kernel"])
    assert np.abs(head(tuned) - head(loose)).max() > 1e-3
    assert np.abs(head(distilled) - head(tuned)).max() > 1e-5
    assert not loose.gates.hard.any()
