"""The form of attention and of GELU for CPUs against that for accelerators: values, gradients, second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models import attention
from effjax.models.activations import exact_gelu
from effjax.models.attention import attend

RNG = np.random.default_rng(0)
QUERY, TANGENT = (jnp.asarray(RNG.normal(size=(2, 5, 4, 8)), jnp.float32) for _ in "qt")
MASK = jnp.asarray([[1, 1, 1, 0, 0], [0] * 5], bool)[:, None, None]  # the second row sees nothing


@pytest.mark.parametrize(("kv_heads", "causal", "mask"), [(4, False, MASK), (2, True, MASK), (1, False, None)])
def test_both_forms_agree_to_the_second_derivative(kv_heads, causal, mask):
    key, value = (jnp.asarray(RNG.normal(size=(2, 5, kv_heads, 8)), jnp.float32) for _ in "kv")
    cpu = lambda q, k, v: attend(q, k, v, mask, causal=causal)
    accelerator = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)

    @jax.jit
    def outcomes(q, k, v):
        found = []
        for form in (cpu, accelerator):
            y, pull = jax.vjp(form, q, k, v)
            turned = jax.jvp(jax.grad(lambda q, form=form: jnp.sum(jnp.sin(form(q, k, v)))), (q,), (TANGENT,))[1]
            found.append((y, pull(TANGENT), turned))
        return found

    (y, grads, turned), (want, want_grads, want_turned) = outcomes(QUERY, key, value)
    np.testing.assert_allclose(y, want, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), (grads, turned), (want_grads, want_turned))
    assert min(np.abs(leaf).max() for leaf in (*want_grads, want_turned)) > 0.1


def test_the_exponential_is_computed_once():
    def loss(q):
        return jnp.sum(attend(q, QUERY, QUERY, MASK) ** 2)

    for form in (loss, jax.grad(loss)):
        assert str(jax.make_jaxpr(form)(QUERY)).count(" = exp ") == 1
    text = jax.jit(jax.grad(loss)).lower(QUERY).compile().as_text()
    assert text.count(" exponential(") == 1, text


def test_what_is_chosen(monkeypatch):
    called = []
    monkeypatch.setattr(attention, "_attend_on_cpu", lambda query, *_: called.append(query.dtype) or query)
    for dtype in (jnp.float32, jnp.bfloat16):
        jax.eval_shape(attend, *[jax.ShapeDtypeStruct((1, 3, 2, 4), dtype)] * 3)
    assert called == [jnp.float32]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.eval_shape(attend, QUERY, QUERY, QUERY)
    assert called == [jnp.float32]


def test_gelu_is_that_of_flax():
    x = jnp.linspace(-6, 6, 101)
    for form in (lambda f: f, lambda f: jax.grad(lambda x: f(x).sum())):
        got, want = jax.jit(lambda x, form=form: (form(exact_gelu)(x), form(lambda x: jax.nn.gelu(x, False))(x)))(x)
        np.testing.assert_allclose(got, want, atol=1e-6)
    narrow = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(exact_gelu(narrow), jax.nn.gelu(narrow, False))
