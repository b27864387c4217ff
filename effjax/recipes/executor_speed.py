"""How long executors of gated blocks take at given shares of open examples: the speed part of dynamic inference."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.recipes.spec import Arm, Claim, Group, Role
from effjax.tasks.task import Metric, Task
from effjax.train.program import Loader, Phase, Program
from effjax.vision.dynamic_inference import block_macs, dynamic_inference
from effjax.vision.gated_executors import Executor, ResidualBlock
from effjax.vision.skip_estimate import break_even

METRIC = Metric("gap", "min", "largest difference from the masked network")
SPEED_UP = 0.6
"""Of the dense time: what the ladder should take at most where half of the examples are open."""


class Shape(NamedTuple):
    """A network of equal blocks.

    Attributes:
      blocks: of it.
      params: of each block.
      x: inputs.
    """

    blocks: list[ResidualBlock]
    params: list[tuple[Any, None]]
    x: np.ndarray


def make_shape(name: str, blocks: int, batch: int, dtype: str) -> Shape:
    """Blocks of random weights: ``basic-64-16`` (channels, side), ``bottleneck-1024-14`` or ``mlp-1024``."""
    kind, *sizes = name.split("-")
    wanted = {"basic": 2, "bottleneck": 2, "mlp": 1}
    if kind not in wanted or len(sizes) != wanted[kind] or not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(f"shapes: {name!r} must be basic-CHANNELS-SIDE, bottleneck-CHANNELS-SIDE or mlp-WIDTH.")
    width, side = int(sizes[0]), int(sizes[-1])
    rng = np.random.default_rng(0)
    kernels = {
        "basic": [(3, 3, width, width)] * 2,
        "bottleneck": [(1, 1, width, max(1, width // 4)), (3, 3, *[max(1, width // 4)] * 2), (1, 1, width // 4, width)],
        "mlp": [(width, 4 * width), (4 * width, width)],
    }[kind]

    def branch(kernels: Any, x: jax.Array) -> jax.Array:
        for place, kernel in enumerate(kernels):
            x = jax.nn.relu(x) if place else x
            x = x @ kernel if kernel.ndim == 2 else _conv(x, kernel)
        return x

    draw = lambda shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.dtype(dtype))
    params = [([draw(shape) for shape in kernels], None) for _ in range(blocks)]
    shape = (batch, width) if kind == "mlp" else (batch, side, side, width)
    return Shape([ResidualBlock(branch)] * blocks, params, np.asarray(draw(shape)))


def _conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def gates_at(rate: float, batch: int, blocks: int) -> np.ndarray:
    """Gates of exactly this share of open examples in every block, others in each."""
    rng = np.random.default_rng(0)
    order = np.argsort(rng.random((blocks, batch)), axis=1)
    return (order < round(rate * batch)).T.astype(np.float32)


def speed_groups(config: Any) -> list[Group]:
    """One group for each shape and batch."""
    return [
        Group(
            f"{name}-b{batch}",
            METRIC,
            functools.partial(make_shape, name, config.shape_blocks, batch, config.train.dtype),
            list(_arms(config, batch)),
            about=functools.partial(_about, batch),
        )
        for name in config.shapes
        for batch in config.batches
    ]


def speed_claims(config: Any) -> dict[str, tuple[Claim, ...]]:
    """At half of the examples the ladder takes at most 0.6 of the dense time, where the estimate says that it pays."""
    found: dict[str, tuple[Claim, ...]] = {}
    for name in config.shapes:
        for batch in config.batches:
            if _estimate(name, config, batch).ratio(0.5) <= SPEED_UP:
                found[f"{name}-b{batch}"] = (
                    Claim("ladder-50", "<=", "dense", of="step_ms", times=SPEED_UP),
                    Claim("ladder-100", "<=", "dense", of="step_ms", times=1.2, why="with nothing to skip"),
                )
    return found


def _estimate(name: str, config: Any, batch: int) -> Any:
    kind, *sizes = name.split("-")
    width, side = int(sizes[0]), int(sizes[-1])
    inner = width // 4
    macs = {
        "basic": 18 * width * width * side * side,
        "bottleneck": (2 * width * inner + 9 * inner * inner) * side * side,
        "mlp": 8 * width * width,
    }[kind]
    places = 1 if kind == "mlp" else side * side
    size = jnp.dtype(config.train.dtype).itemsize
    weights = size * macs / places  # every one is used once for a place
    return break_even(macs, float(size * places * width), device=_device(), batch=batch, weight_bytes=weights)


def _device() -> str:
    return jax.default_backend() if jax.default_backend() in ("cpu", "tpu") else "gpu"


def _about(batch: int, shape: Shape) -> list[str]:
    macs = block_macs(shape.blocks[:1], shape.params[:1], shape.x[:1])[0].once
    weights = sum(kernel.nbytes for kernel in shape.params[0][0])
    where = {"cpu": "one CPU core", "tpu": "a TPU v5e", "gpu": "an H200"}
    estimate = functools.partial(break_even, macs, shape.x[0].nbytes, batch=batch, weight_bytes=weights)
    return [f"estimate on {where[device]}: {estimate(device=device)}" for device in dict.fromkeys((_device(), "gpu"))]


def _arms(config: Any, batch: int) -> Iterator[Arm]:
    def arm(name: str, role: Role, label: str, executor: Executor | None, rate: float) -> Arm:
        return Arm(name, role, functools.partial(_program, config, executor, rate), label)

    half = max(1, round(0.5 * batch))
    yield arm("dense", "baseline", "no gates", None, 1.0)
    yield arm("masked", "control", "everything, masked; half open", Executor("masked"), 0.5)
    for rate in config.open_rates:
        percent = round(100 * rate)
        yield arm(f"ladder-{percent}", "method", f"ladder, {percent} % open", Executor("ladder"), rate)
    yield arm("capacity-50", "alternative", "fixed capacity of half", Executor("capacity", capacity=half), 0.5)
    yield arm("map-50", "alternative", "one after another, half open", Executor("map"), 0.5)


def _program(config: Any, executor: Executor | None, rate: float, shape: Shape) -> Program:
    """A program whose step is one inference call."""
    blocks, batch = len(shape.blocks), len(shape.x)
    gates = gates_at(rate, batch, blocks)

    def run(params: Any, x: Any, gates: Any, how: Executor | None) -> jax.Array:
        held = [(own, None) for own in params]
        given = None if how is None else gates
        return dynamic_inference(shape.blocks, held, x, gates=given, executor=how or Executor("masked")).outputs

    def step(state: Any, batch: Any, aux: Any) -> tuple[Any, dict[str, jax.Array]]:
        x, gates = aux
        outputs = run(state["params"], x, gates, executor)
        # The outputs are kept: of a mean alone the compiler makes a program that never writes a map to memory.
        return {**state, "outputs": outputs}, {"loss": jnp.mean(outputs, dtype=jnp.float32)}

    def evaluate(state: Any) -> dict[str, float]:
        found, wanted = (
            jax.jit(functools.partial(run, how=how))(state["params"], shape.x, gates)
            for how in (executor, Executor("masked"))
        )
        return {"gap": float(jnp.abs(found - wanted).max())}

    params = {"params": [own for own, _ in shape.params]}
    first: Callable[..., jax.Array] = lambda variables, x: shape.blocks[0].branch(variables["params"][0], x)
    task = Task(
        name=f"random/{blocks} blocks",
        source="Random weights and inputs.",
        metric=METRIC,
        init=lambda key: params,
        loss=lambda *arguments, **options: (jnp.float32(0), ({}, {})),
        infer=first,
        evaluate=lambda variables: evaluate(variables),
        train={},
        example_inputs=shape.x[:1],
        dtype=config.train.dtype,
    )
    return Program(
        task=task,
        init=lambda key: {**jax.tree.map(jnp.array, params), "outputs": jnp.zeros_like(shape.x)},
        phases=(Phase(step, 1, aux=lambda state: (jnp.asarray(shape.x), jnp.asarray(gates))),),
        params=lambda state: {"params": state["params"]},
        loader=Loader(None, batch),
        evaluate=evaluate,
        trained=lambda state: {},
    )
