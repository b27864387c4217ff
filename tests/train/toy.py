"""A Program small enough to check by hand: linear regression on a fixed design."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.train.program import BatchShape, Program

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


def uneven(steps: int = 40, **fields) -> Program:
    values = {"batches": UnevenBatches, "shapes": lambda: uneven_shapes(steps), "compiles": 2}
    return toy(steps, **values | fields)


def toy(steps: int = 40, *, rate: float = 0.05, poison: int | None = None, **fields) -> Program:
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

    values = {
        "init": init,
        "step": step,
        "batches": lambda seed: ToyBatches(seed, poison),
        "evaluate": lambda state: {"w0": float(state["params"]["w"][0])},
        "infer": lambda params, x: x @ params["w"],
        "params": lambda state: state["params"],
        "example_inputs": np.zeros((4, WIDTH), np.float32),
        "total_steps": steps,
        "batch_size": BATCH,
    }
    return Program(**values | fields)
