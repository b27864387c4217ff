"""A network trained on images, to be adapted to the same images with their pixels permuted."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.data.sets import load
from effjax.data.shift import permute_pixels
from effjax.models.mlp import MLP
from effjax.tasks.image import image_task
from effjax.tasks.task import Task
from effjax.train.loaders import column_loader
from effjax.train.loop import fit
from effjax.train.trainer import supervised

_MLP = re.compile(r"mlp((?:-\d+)+)")


def permuted_task(data: str, model: str, *, steps: int = 1500, batch_size: int = 64) -> Task:
    """Train an MLP by Adam, and make the task to adapt it to images whose pixels have one fixed permutation.

    Args:
      data: name of a set of images.
      model: ``"mlp-64-64"``: the widths of the hidden layers.
      steps: of the training; its rate falls linearly from 3e-3.
      batch_size: images of a step, drawn with replacement.

    Returns:
      A ``Task`` whose ``init`` gives the trained parameters, whatever the key.

    Raises:
      ValueError: another model.

    Example:
      >>> permuted_task("digits", "mlp-8", steps=2).name
      'digits, pixels permuted/mlp-8'
    """
    widths = _MLP.fullmatch(model)
    if not widths:
        raise ValueError(f"model={model!r} on {data!r} must be like 'mlp-64-64', the widths of its hidden layers.")
    dataset = load(data)
    module = MLP(tuple(map(int, widths[1][1:].split("-"))), classes=len(dataset.classes))
    before = image_task(dataset, module)
    rows = np.random.default_rng(0).integers(0, len(before.train["label"]), (steps, batch_size))
    drawn = lambda batch, index, rng: {name: column[rows[index]] for name, column in before.train.items()}
    loader = column_loader(before.train, batch_size, transform=drawn)
    program = supervised(before, optax.adam(optax.linear_schedule(3e-3, 0.0, steps)), steps=steps, loader=loader)
    params = jax.tree.map(jnp.asarray, fit(program, seed=0).state.params)
    permuted = permute_pixels(0, np.shape(dataset.splits["train"]["image"])[1:])
    splits = {name: permuted(columns) for name, columns in dataset.splits.items()}
    after = image_task(dataclasses.replace(dataset, splits=splits), module)
    return after._replace(
        name=f"{data}, pixels permuted/{model}",
        init=lambda key: {"params": params},
        example_inputs=after.test["image"][:64],
    )
