"""A Program small enough to check by hand: linear regression on a fixed design."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.tasks.task import Metric, Task
from effjax.train.program import BatchShape, Loader, Phase, Program

ROWS, WIDTH, BATCH = 64, 5, 8


class ToyBatches:
    """Rows in a seeded order; the state is the number of batches given out."""

    def __init__(self, seed: int, poison: int | None = None):
        rng = np.random.default_rng(seed)
        self._x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
        self._y = (self._x @ np.arange(WIDTH) + 0.1 * rng.normal(size=ROWS)).astype(np.float32)
        self._order = rng.integers(0, ROWS, size=(1000, BATCH))
        self._poison = poison
        self._given = 0

    def __iter__(self):
        return self

    def __next__(self):
        rows = self._order[self._given]
        x = self._x[rows]
        if self._given == self._poison:
            x = np.full_like(x, np.nan)
        self._given += 1
        return {"x": x, "y": self._y[rows]}

    def get_state(self):
        return {"given": self._given}

    def set_state(self, state):
        self._given = state["given"]


class UnevenBatches(ToyBatches):
    """Every third batch is half as large."""

    def __next__(self):
        batch = super().__next__()
        rows = BATCH // 2 if self._given % 3 == 0 else BATCH
        return {name: column[:rows] for name, column in batch.items()}


def uneven_shapes(steps: int = 40) -> list[BatchShape]:
    batch = {"x": np.ones((BATCH, WIDTH), np.float32), "y": np.ones(BATCH, np.float32)}
    half = {name: column[: BATCH // 2] for name, column in batch.items()}
    small = steps // 3
    return [BatchShape(batch, steps - small, BATCH, 10 * BATCH), BatchShape(half, small, BATCH // 2, 10 * BATCH // 2)]


def uneven(steps: int = 40, shapes: list[BatchShape] | None = None) -> Program:
    return toy(steps, opened=UnevenBatches, shapes=uneven_shapes(steps) if shapes is None else shapes)


def toy(
    steps: int = 40,
    *,
    rate: float = 0.05,
    poison: int | None = None,
    opened=None,
    shapes=(),
    parts: tuple[int, ...] | None = None,
    over=None,
    leave=None,
    aux=None,
    evaluate=None,
    **fields,
) -> Program:
    """``parts`` are the lengths of phases that share one step; ``over``, ``leave`` and ``aux`` are of each."""
    tx = optax.adam(rate)

    def init(key):
        params = {"w": jax.random.normal(key, (WIDTH,))}
        return {"params": params, "opt": tx.init(params), "key": jax.random.key(1)}

    def step(state, batch, aux):
        key, noise = jax.random.split(state["key"])

        def loss(params):
            error = batch["x"] @ params["w"] - batch["y"]
            return jnp.mean(error**2) + 1e-3 * jax.random.normal(noise)

        value, grads = jax.value_and_grad(loss)(state["params"])
        updates, opt = tx.update(grads, state["opt"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt, "key": key}, {"loss": value, "norm": optax.tree.norm(params)}

    task = Task(
        name="toy",
        source="made up",
        metric=Metric("w0", "max", "first weight"),
        init=init,
        loss=None,
        infer=lambda params, x: x @ params["w"],
        evaluate=lambda params: {"w0": float(params["w"][0])},
        train=None,
        example_inputs=np.zeros((4, WIDTH), np.float32),
    )
    phases = [Phase(step, count, over, leave, aux) for count in parts or (steps,)]
    loader = Loader(opened or (lambda seed: ToyBatches(seed, poison)), BATCH, shapes=tuple(shapes))
    return Program(task, init, tuple(phases), lambda state: state["params"], loader, evaluate, **fields)
