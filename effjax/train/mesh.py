"""Device meshes with Auto axes, and shardings by rules on state paths."""

import math
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from effjax.core.tree import leaf_paths, select
from effjax.train.options import MeshOptions

PyTree = Any
Result = TypeVar("Result")


def start_distributed() -> None:
    """Call ``jax.distributed.initialize`` where a launcher has announced several processes; else do nothing.

    Recognised: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, a SLURM step of
    several tasks, Open MPI, and a TPU pod slice (several worker host names).
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env and "JAX_NUM_PROCESSES" in env:
        jax.distributed.initialize(
            coordinator_address=env["JAX_COORDINATOR_ADDRESS"],
            num_processes=int(env["JAX_NUM_PROCESSES"]),
            process_id=int(env["JAX_PROCESS_ID"]),
        )
    elif (
        ("SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1)
        or int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    ):
        jax.distributed.initialize()


def together(action: Callable[[], Result]) -> Result:
    """Do something in every process; where one of them is refused all are, in place of waiting for it.

    Raises:
      ElsewhereError: in the processes where it worked.
    """
    if jax.process_count() == 1:
        return action()
    from jax.experimental import multihost_utils

    error, result = None, None
    try:
        result = action()
    except Exception as refused:
        error = refused
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
    if error is not None:
        raise error
    if failed.size:
        raise ElsewhereError(f"process {failed[0]} of this run was refused; its message says why.")
    return cast(Result, result)


class ElsewhereError(ValueError):
    """Another process of a distributed run was refused."""


def make_mesh(options: MeshOptions) -> Mesh | None:
    """A mesh with the axes data, model and expert (Auto), or None when one device does everything.

    Raises:
      ValueError: the axes do not multiply to a number of devices that exists.
    """
    sizes = {"data": options.data, "model": options.model, "expert": options.expert}
    available = jax.device_count()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = available // fixed
    needed = math.prod(sizes.values())
    if needed < 1 or needed > available or (jax.process_count() > 1 and needed != available):
        raise ValueError(
            f"mesh={sizes} needs {max(needed, fixed)} devices and {available} are there. "
            "Make the product of the axes equal to the number of devices, or set one axis to -1."
        )
    if needed == 1:
        return None
    devices = jax.devices()[:needed]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices)


def state_shardings(mesh: Mesh | None, state: PyTree, rules: tuple[tuple[str, tuple[str | None, ...]], ...]) -> PyTree:
    """One sharding a leaf of ``state`` (arrays or ShapeDtypeStructs); unmatched leaves are replicated."""
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: single, state)
    owners = select(state, [pattern for pattern, _ in rules], argument="sharding").tree
    specs = [PartitionSpec(*axes) for _, axes in rules]
    names = jax.tree.unflatten(jax.tree.structure(state), leaf_paths(state))

    def sharding(leaf, owner, name):
        spec = PartitionSpec() if owner < 0 else specs[owner]
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f"state leaf {name!r} has {size} rows along the {axis!r} axis of {mesh.shape[axis]} devices. "
                    f"Choose a multiple of {mesh.shape[axis]} or a smaller mesh axis."
                )
        return NamedSharding(mesh, PartitionSpec(*spec[: len(leaf.shape)]))

    return jax.tree.map(sharding, state, owners, names)


def batch_sharding(mesh: Mesh | None, batch_size: int) -> jax.sharding.Sharding | None:
    """The sharding of a batch: its leading axis over ``data``.

    Raises:
      ValueError: the batch does not divide by the data axis.
    """
    if mesh is None:
        return None
    if batch_size % mesh.shape["data"]:
        raise ValueError(
            f"batch_size={batch_size} is not divisible by the {mesh.shape['data']} devices of the data axis. "
            f"Use a multiple of {mesh.shape['data']} or fewer devices."
        )
    return NamedSharding(mesh, PartitionSpec("data"))
