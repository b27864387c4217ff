"""Tasks of which a part is trained: what is frozen stays, evaluation is of the merged network, a head trains too."""

import jax
import numpy as np
import optax
import pytest

from effjax.finetune.lora import lora_merge
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.tasks.adapted import adapted_task, lora_task
from effjax.tasks.image import image_task
from effjax.train.loop import fit
from effjax.train.trainer import supervised

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def plain():
    return image_task("digits", "mlp", train_rows=64, test_rows=32)


def test_adapters_train_through_the_ordinary_trainer(plain):
    config = LoraConfig(LoraRule("kernel", rank=2, alpha=4.0))
    task = lora_task(plain, config)
    start, _ = jax.random.split(KEY)
    base = jax.jit(plain.init)(start)["params"]
    variables = jax.jit(task.init)(KEY)
    for a, b in zip(jax.tree.leaves(variables["frozen"]), jax.tree.leaves(base), strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(variables["params"]) == {"lora"}
    assert task.evaluate(variables) == pytest.approx(plain.evaluate({"params": base}), rel=1e-5)  # b begins at zero
    program = supervised(task, optax.adam(1e-2), steps=20, batch_size=32)
    state = fit(program, seed=0).state
    frozen = state.model["frozen"]
    moved = lora_merge(frozen, state.params["lora"], 2.0)
    found = program.judged(state)
    assert found == pytest.approx(plain.evaluate({"params": moved}), rel=1e-5)
    assert found["nll"] < 0.5 * program.judged(jax.jit(program.init)(jax.random.key(0)))["nll"]
    for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(base), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_no_body_is_the_head(plain):
    names = sorted(jax.jit(plain.init)(KEY)["params"])
    task = adapted_task(
        plain._replace(details={"body": names[0]}),
        lambda key, params: (params, {}),
        lambda frozen, trained: frozen,
    )
    variables = jax.jit(task.init)(KEY)
    assert set(variables["frozen"]) == {names[0]}
    assert sorted(variables["params"]["head"]) == names[1:]
    whole = jax.jit(plain.init)(jax.random.split(KEY)[0])
    assert task.evaluate(variables) == pytest.approx(plain.evaluate(whole), rel=1e-6)
