"""One row for every optimizer of effjax; ``test_optimizers.py`` runs the matrix over them.

To join: add a row to ``CASES``, and to ``REFUSALS`` each combination that cannot work, with words of its error.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effjax.finetune.chain import cola_init
from effjax.finetune.chain_config import ColaConfig
from effjax.finetune.cola import cola
from effjax.finetune.lora import lora_merge
from effjax.finetune.lora_config import LoraRule
from effjax.optim.batch_size import scale_by_batch_size
from effjax.optim.dcl import dcl, dcl_lagrangian
from effjax.optim.dual_ascent import Constraint, DclConfig, scale_by_nupi
from effjax.optim.one_gradient import samuel_one_gradient
from effjax.optim.samuel import samuel, samuel_eval_params, samuel_init, samuel_sync, samuel_value_and_grad
from effjax.recurrent.fptt import fptt, fptt_eval_params

PyTree = Any
Loss = Callable[[PyTree], jax.Array]


class OptimizerCase(NamedTuple):
    """An optimizer and how its loop calls it.

    Attributes:
      stem: the row of ``METHODS``.
      make: ``(**keywords) -> transformation``.
      injected: a numeric keyword and its value, to be injected.
      start: parameters of one network -> those that the optimizer works on.
      call: ``(loss, params, state) -> (grads, keywords of update)``.
      after: ``(state, params) -> params``, after the updates were applied.
      evaluate: ``(state, params) -> parameters of one network``.
      learning_rate: whether ``optax.tree.get(state, 'learning_rate')`` finds one.
    """

    stem: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    injected: tuple[str, float]
    start: Callable[[PyTree], PyTree] = lambda params: params
    call: Callable[[Loss, PyTree, PyTree], tuple[PyTree, dict[str, Any]]] = lambda loss, params, state: (
        jax.grad(loss)(params),
        {},
    )
    after: Callable[[PyTree, PyTree], PyTree] = lambda state, params: params
    evaluate: Callable[[PyTree, PyTree], PyTree] = lambda state, params: params
    learning_rate: bool = True


def _samuel_call(loss: Loss, params: PyTree, state: PyTree) -> tuple[PyTree, dict[str, Any]]:
    losses, grads = samuel_value_and_grad(loss, loop="vmap")(params)
    return grads, {"value": losses}


def _samuel(base: Any, *arguments: Any, experts: int = 4, **keywords: Any) -> OptimizerCase:
    return OptimizerCase(
        "samuel",
        lambda **overrides: samuel(base, *arguments, **{"period": 5, **keywords, **overrides}),
        ("eta_scale", 10.0),
        lambda params: samuel_init(params, experts),
        _samuel_call,
        samuel_sync,
        samuel_eval_params,
        learning_rate=bool(arguments),
    )


def _one_gradient(base: Any, **keywords: Any) -> OptimizerCase:
    return OptimizerCase(
        "samuel",
        lambda **overrides: samuel_one_gradient(base, (0.2, 0.1, 0.05), **{"every": 3, **keywords, **overrides}),
        ("eta_scale", 10.0),
        call=lambda loss, params, state: (jax.grad(loss)(params), {"value_fn": loss}),
    )


def _batch_sized(**keywords: Any) -> OptimizerCase:
    return OptimizerCase(
        "bucket_sampler",
        lambda **overrides: optax.chain(
            optax.scale_by_adam(),
            scale_by_batch_size(**{"reference": 64, **keywords, **overrides}),
            optax.scale_by_learning_rate(0.1),
        ),
        ("reference", 32.0),
        call=lambda loss, params, state: (jax.grad(loss)(params), {"batch_size": 96}),
        learning_rate=False,
    )


def _fptt(base: optax.GradientTransformation, **keywords: Any) -> OptimizerCase:
    return OptimizerCase(
        "fptt",
        lambda **overrides: fptt(base, **{"alpha": 0.1, **keywords, **overrides}),
        ("alpha", 0.3),
        evaluate=fptt_eval_params,
        learning_rate=False,
    )


# Both are violated at the start and not at the end.
_LIMITS = {"mean": Constraint(">=", 1.7), "rows": Constraint("<=", 1.0, (8,))}


def _dcl_values(params: PyTree) -> dict[str, jax.Array]:
    return {"mean": params["b"].mean(), "rows": params["w"].sum(1)}


def _dcl(base: optax.GradientTransformation, **keywords: Any) -> OptimizerCase:
    def call(loss: Loss, params: PyTree, state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        config = DclConfig(_LIMITS, **keywords)
        grads = jax.grad(lambda p: dcl_lagrangian(state, loss(p), _dcl_values(p), config))(params)
        return grads, {"values": _dcl_values(params)}

    make = lambda **overrides: optax.chain(dcl(DclConfig(_LIMITS, **{**keywords, **overrides})), base)
    return OptimizerCase("dcl", make, ("limit", 20.0), call=call, learning_rate=False)


_COLA = ColaConfig(LoraRule("kernel", rank=3, alpha=3.0), knots=(100,))


def _cola_start(params: PyTree) -> PyTree:
    kernel = jnp.concatenate([params["w"], params["b"][:, None]], axis=1)
    state = cola_init(jax.random.key(1), {"kernel": kernel, "bias": jnp.zeros(3, kernel.dtype)}, _COLA)
    return {"base": state.base, "lora": state.lora}


def _cola_network(base: PyTree, lora: PyTree) -> PyTree:
    merged = lora_merge(base, lora, 1.0)
    rows = merged["kernel"] + merged["bias"][None]
    return {"w": rows[:, :2], "b": rows[:, 2]}


def _cola_call(loss: Loss, params: PyTree, state: PyTree) -> tuple[PyTree, dict[str, Any]]:
    grads = jax.grad(lambda lora: loss(_cola_network(params["base"], lora)))(params["lora"])
    return {"base": jax.tree.map(jnp.zeros_like, params["base"]), "lora": grads}, {}


_RATES = (0.3, 0.1, 0.03, 0.01)

CASES: dict[str, OptimizerCase] = {
    "samuel": _samuel(lambda lr: optax.sgd(lr, 0.9), _RATES),
    "samuel-adam-argmax-copy": _samuel(optax.adam, _RATES, select="argmax", inner_state="copy"),
    "samuel-average": _samuel(optax.sgd, _RATES, select="average", normalize=False),
    "samuel-mixed": _samuel((optax.sgd(0.1), optax.adam(0.1)), experts=2),
    "samuel-one-gradient": _one_gradient(lambda lr: optax.sgd(lr, 0.5)),
    "samuel-one-gradient-adam-sample": _one_gradient(optax.adam, select="sample"),
    "scale-by-batch-size": _batch_sized(),
    "fptt": _fptt(optax.sgd(0.1, 0.5)),
    "fptt-adam-lmbda2": _fptt(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), lmbda=2.0),
    "dcl": _dcl(optax.sgd(0.1, 0.5)),
    "dcl-nupi-adam": _dcl(
        optax.adam(0.1), dual=optax.chain(scale_by_nupi(), optax.sgd(0.1)), penalty=0.5, every=2, price=50.0
    ),
    "cola": OptimizerCase(
        "cola",
        lambda **overrides: cola(optax.adam(**{"learning_rate": 0.1, **overrides}), _COLA),
        ("learning_rate", 0.05),
        _cola_start,
        _cola_call,
        evaluate=lambda state, params: _cola_network(params["base"], params["lora"]),
        learning_rate=False,
    ),
}

# (case, combination) -> words of the error that says why it cannot work.
REFUSALS: dict[tuple[str, str], str] = {
    **{
        (name, combination): "cannot sit inside optax.partition or optax.masked"
        for name in CASES
        if name.startswith(("samuel", "cola"))
        for combination in ("partition", "masked")
    },
    **{(name, "vmap"): "cannot run under vmap" for name in CASES if "one-gradient" in name},
}


def parameters(dtype: Any = jnp.float32) -> PyTree:
    """Parameters of a small quadratic problem; the leading axis divides by eight devices."""
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "w": (1.0 + jax.random.uniform(keys[0], (8, 2))).astype(dtype),
        "b": (1.0 + jax.random.uniform(keys[1], (8,))).astype(dtype),
    }


def quadratic(params: PyTree) -> jax.Array:
    """Ill-conditioned mildly; least value 0 at w = -1, b = 2."""
    w, b = (params[name].astype(jnp.float32) for name in ("w", "b"))
    return jnp.sum((w + 1.0) ** 2) + 0.3 * jnp.sum((b - 2.0) ** 2)


def stepper(
    case: OptimizerCase, tx: optax.GradientTransformationExtraArgs, loss: Loss = quadratic
) -> Callable[..., Any]:
    """One step of the case's loop, ready for ``jit`` and ``scan``."""

    def step(params: PyTree, state: PyTree, **unknown: Any) -> tuple[PyTree, PyTree, PyTree]:
        grads, keywords = case.call(loss, params, state)
        updates, state = tx.update(grads, state, params, **keywords, **unknown)
        return case.after(state, optax.apply_updates(params, updates)), state, updates

    return step
