"""What the README shows is what the study trains: the public call and the study's arm give the same bits."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from public_calls import CASES

import effjax

# Bits of two programs are compared. Of these they are equal only as users compile them, which takes long: nightly.
OPTIMIZED = {"samuel", "bucket_sampler", "token_drop"}
MARKS = {stem: [pytest.mark.optimized, pytest.mark.nightly] for stem in OPTIMIZED}
STEMS = [pytest.param(stem, marks=MARKS.get(stem, ())) for stem in effjax.METHODS]


def bits(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key) else leaf


@pytest.mark.once
@pytest.mark.study
@pytest.mark.parametrize("stem", STEMS)
def test_the_public_call_gives_the_bits_of_the_study_s_arm(stem, tmp_path):
    case = CASES[stem]
    loop, arm = case(tmp_path) if "tmp_path" in inspect.signature(case).parameters else case()
    assert jax.tree.structure(loop) == jax.tree.structure(arm)
    assert jax.tree.leaves(loop)
    for left, right in zip(jax.tree.leaves(loop), jax.tree.leaves(arm), strict=True):
        np.testing.assert_array_equal(bits(left), bits(right))
