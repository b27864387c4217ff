"""Paths, selection and dtype-safe helpers on the trees that users bring."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.tree import leaf_paths, only_node, select, unread, wide


class Pair(NamedTuple):
    value: int
    other: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:  # the way Equinox modules are registered
    weight: jax.Array
    layers: tuple


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(2, 3, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(3, 3, rngs=rngs)])


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="first", kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model")))(x)


def test_paths_of_dicts_sequences_and_dataclasses():
    tree = {"a": [1, (2,)], "b": Linear(jnp.ones(1), ({"value": 3}, 4))}
    assert leaf_paths(tree) == ["a/0", "a/1/0", "b/weight", "b/layers/0/value", "b/layers/1"]


def test_paths_of_nnx_state_module_and_pure_dict_agree():
    module = Net(nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    expected = ["first/bias", "first/kernel", "rest/0/bias", "rest/0/kernel"]
    assert leaf_paths(state) == expected
    assert leaf_paths(nnx.to_pure_dict(state)) == expected
    assert leaf_paths(module) == expected


def test_paths_of_boxed_linen_params_are_those_of_plain_ones():
    boxed = LinenNet().init(jax.random.key(0), jnp.ones((1, 2)))
    assert leaf_paths(boxed) == leaf_paths(nn.meta.unbox(boxed)) == ["params/first/bias", "params/first/kernel"]


def test_a_field_or_parameter_called_value_keeps_its_name():
    assert leaf_paths(Pair(1, 2)) == ["value", "other"]
    assert leaf_paths({"head": {"value": 1}}) == ["head/value"]
    assert leaf_paths(3) == [""]


def test_select_first_match_wins_and_counts():
    tree = {"a": {"kernel": 0, "bias": 0}, "b": {"kernel": 0}, "c": 0}
    found = select(tree, ["a/kernel", "kernel$"])
    assert found.tree == {"a": {"kernel": 0, "bias": -1}, "b": {"kernel": 1}, "c": -1}
    assert found.counts == (1, 1)


def test_select_works_alike_on_linen_and_nnx():
    linen = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
    assert select(linen, ["kernel$"]).counts == (1,)
    assert select(nnx.state(Net(nnx.Rngs(0)), nnx.Param), ["kernel$"]).counts == (2,)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["kernl"], r"layers: 'kernl' matches none of the 2 leaves\. Did you mean .*'kernel'"),
        (["zzz"], r"'zzz' matches none of the 2 leaves\. The leaves begin with \['bias', 'kernel'\]"),
        (["k", "kernel"], r"'kernel' matches only leaves that an earlier pattern claims \(1, e\.g\. 'kernel'\)"),
        (["("], r"layers: '\(' is not a regular expression"),
    ],
)
def test_select_says_what_is_wrong(patterns, message):
    with pytest.raises(ValueError, match=message):
        select({"kernel": 0, "bias": 0}, patterns, argument="layers")


def test_wide_is_float32_at_least():
    assert wide(jnp.bfloat16(0.5)).dtype == jnp.float32
    assert wide(3).dtype == jnp.float32
    with jax.enable_x64(True):
        assert wide(np.float64(0.1)).dtype == jnp.float64
        assert wide(np.float64(0.1)) == 0.1


def test_the_one_node_of_a_type_is_found_and_none_or_two_are_refused():
    one = Pair(1, 2)
    assert only_node([{"a": one}, 3], Pair, maker="pairs") is one
    for tree in ([3], [one, one]):
        with pytest.raises(ValueError, match=f"state=list holds {tree.count(one)} Pair.*pairs returned"):
            only_node(tree, Pair, maker="pairs")


def test_leaves_that_the_first_result_does_not_depend_on_are_found_inside_jit_and_scan():
    def fn(tree):
        inner = jax.jit(lambda a, b: (a, b))(tree["a"], tree["b"])
        total, _ = jax.lax.scan(lambda sum, row: (sum + row, None), inner[0], tree["rows"])
        return total, tree["d"]

    assert unread(fn, {"a": 1.0, "b": 2.0, "d": 3.0, "rows": jnp.ones(4)}) == ["b", "d"]
