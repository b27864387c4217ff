"""Device meshes with Auto axes, and how parameters, states and batches lie on them."""

import math
import os
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from effjax.core.files import first_line
from effjax.core.partition import Rules
from effjax.models.mesh_rules import Layout, mesh_shardings
from effjax.train.options import MeshOptions

__all__ = ["shard", "shardings"]

PyTree = Any


def start_distributed(required: bool = False) -> None:
    """Call ``jax.distributed.initialize`` where a launcher has announced several processes; else do nothing.

    Recognised: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, a SLURM step of
    several tasks, Open MPI, and a TPU pod slice (several worker host names).

    Args:
      required: whether the process must join others; JAX then looks for launchers that are not among these too.

    Raises:
      ValueError: nobody has announced them.
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
    elif required:
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"--distributed: no launcher has announced the other processes ({first_line(error)}) Set "
                "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave --distributed out."
            ) from None


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


def state_shardings(mesh: Mesh | None, state: PyTree, rules: Rules, layout: Layout = "data") -> PyTree:
    """One sharding per leaf of ``state`` (arrays or ShapeDtypeStructs).

    Args:
      mesh: None for one device.
      state: of a program.
      rules: of the program, which go first.
      layout: of the leaves that none of them matches.
    """
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: single, state)
    return mesh_shardings(state, layout, mesh, first=rules)


def shardings(tree: PyTree, rules: Layout | Rules, mesh: Mesh) -> PyTree:
    """How a tree lies on a mesh: a ``NamedSharding`` for every leaf, for ``jax.jit`` and ``jax.device_put``.

    Args:
      tree: parameters, adapters, or an optimizer's state; arrays, or shapes of ``jax.eval_shape``.
      rules: ``"data"`` (a copy on every device), ``"fsdp"`` (split over the mesh axis ``data``), ``"tensor"`` (heads,
        neurons and channels of a BERT, decoder, ViT, ResNet or graph network over ``model``), ``"fsdp+tensor"``; or
        ``((regex, axes), ...)`` of one's own: the regex over slash-joined paths, first match wins; ``axes`` a mesh axis
        or None for each axis of the array, for the last ones where it begins with ``...``.
      mesh: with Auto axes.

    Returns:
      A tree like ``tree``.

    Raises:
      ValueError: rules that match nothing, an axis that the mesh lacks or that does not divide, Explicit axes.

    Example:
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
      >>> params = {"layer_0": {"mlp": {"up": {"kernel": jax.numpy.ones((4, 8))}}}}
      >>> tuple(shardings(params, "fsdp+tensor", mesh)["layer_0"]["mlp"]["up"]["kernel"].spec)
      ('data', 'model')
    """
    return mesh_shardings(tree, rules, mesh)


def shard(params: PyTree, rules: Layout | Rules, mesh: Mesh) -> PyTree:
    """Put a tree of arrays on a mesh, for your own training loop.

    The optimizer's state is made from what this returns (``tx.init(params)``) and lies as it does, adapters after
    ``shard(lora, rules, mesh)``. A batch goes where ``NamedSharding(mesh, P("data"))`` says. Call the jitted step under
    ``jax.set_mesh(mesh)``: activations then keep their rows over ``data``, and XLA gathers kernels, not activations.

    Args:
      params: parameters, adapters, or an optimizer's state; in several processes each gives the whole arrays.
      rules: see ``shardings``.
      mesh: with Auto axes.

    Returns:
      Global arrays.

    Raises:
      ValueError: see ``shardings``.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
      >>> tuple(shard({"kernel": jax.numpy.ones((4, 8))}, "fsdp", mesh)["kernel"].sharding.spec)
      (None, 'data')
    """
    return jax.device_put(params, shardings(params, rules, mesh))


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
