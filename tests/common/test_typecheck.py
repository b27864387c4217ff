"""Annotations of the package are checked while the tests run; ``pytest.raises`` would switch that off."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from effjax.core.errors import check_number
from effjax.graph.measures import masked_cross_entropy
from effjax.hardness.risk_coverage import risk_coverage_curve

CALLS = {
    "shape": lambda: masked_cross_entropy(jnp.zeros((3, 2)), jnp.zeros(4, int), jnp.ones(3, bool)),
    "dtype": lambda: risk_coverage_curve(jnp.zeros(3), jnp.zeros(3, int)),
    "no shape": lambda: check_number(3, 2),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_argument_is_noticed(case):
    error = None
    try:
        CALLS[case]()
    except Exception as raised:
        error = raised
    # beartype's own where no annotation is a shape
    assert isinstance(error, TypeCheckError) or "violates type hint" in str(error)
