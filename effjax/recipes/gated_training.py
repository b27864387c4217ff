"""How the networks of the study of dynamic inference are trained, judged and timed."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.macs import count_macs
from effjax.core.shapes import pad_to
from effjax.core.timing import paired_ratio, time_interleaved
from effjax.core.tree import path_name, wide
from effjax.models.resnet import ResNet
from effjax.recipes.gated_networks import EVAL_BATCH, Loaded, drawn_gates, random_rate, static_pattern
from effjax.recipes.images import cross_entropies
from effjax.tasks.image import standardised, unit_images
from effjax.train.grad import all_finite
from effjax.train.loaders import column_loader
from effjax.train.program import Phase, Program
from effjax.train.trainer import TrainState, check_options
from effjax.vision.gate_networks import PolicyNet, given_gates
from effjax.vision.gated_blocks import recorded_gates
from effjax.vision.gated_executors import Executor
from effjax.vision.gates import ste_gate
from effjax.vision.mac_target import (
    BlockGates,
    example_macs,
    gate_statistics,
    gate_target,
    mac_target_loss,
    open_rate_loss,
    static_macs,
)
from effjax.vision.policies import block_drop_curriculum, block_drop_loss, block_drop_reward

PyTree = Any


class Variant(NamedTuple):
    """One arm.

    Attributes:
      label: the words of the report.
      role: as in ``Arm``.
      layer: factory of the layer gates; None for none.
      channel: factory of the channel gates; None for none.
      given: who decides outside the network: nobody, one pattern for all images, chance, or a one-shot policy.
      loss: what is added to the cross-entropy.
    """

    label: str
    role: Literal["baseline", "method", "control", "alternative"]
    layer: Callable[..., Any] | None = None
    channel: Callable[..., Any] | None = None
    given: Literal["static", "random", "one-shot", "block-drop"] | None = None
    loss: Literal["mac", "rate", "none"] = "none"


class Arms:
    """The programs of a group, one for each variant."""

    def __init__(self, config: Any, variant: Variant, loaded: Loaded):
        self.config, self.variant, self.loaded = config, variant, loaded
        self.task = loaded.task
        self.names = [loaded.names[place] for place in loaded.gated]
        everywhere = variant.channel is not None  # channels are gated in every block
        counted = loaded.macs if everywhere else [loaded.macs[place] for place in loaded.gated]
        self.rest = loaded.static - float(static_macs([BlockGates(None, None, macs) for macs in counted]))
        self.policy = PolicyNet(len(self.names)) if variant.given in ("one-shot", "block-drop") else None
        self.pattern = jnp.asarray(static_pattern(loaded, config.mac_target), jnp.float32)
        self.rate = random_rate(loaded, config.mac_target)
        self.extra = 0.0
        if self.policy is not None:
            shapes = jax.eval_shape(self.policy.init, jax.random.key(0), self._example())
            self.extra = float(count_macs(self.policy.apply, shapes, self._example()).most or 0) / loaded.static

    def _example(self) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(unit_images, self.task.example_inputs[:1])

    def module(self, executor: Executor | str = "masked") -> ResNet:
        """The network, run by an executor in evaluation."""
        variant = self.variant
        return self.loaded.make(
            layer=variant.layer, channel=variant.channel, group=self.config.gate_channels, executor=executor
        )

    def init(self, key: jax.Array) -> dict[str, PyTree]:
        """Variables, from trained ones where there are any."""
        x = jnp.zeros((1, *self.task.example_inputs.shape[1:]), jnp.float32)
        fresh = jax.tree.map(lambda leaf: leaf, dict(self.module().init(key, x, train=False)))
        if self.loaded.start is not None:
            fresh = _overlaid(fresh, self.loaded.start)
        if self.policy is not None:
            own = self.policy.init(jax.random.fold_in(key, 1), x)["params"]
            fresh["params"] = {**fresh["params"], "policy": own}
        return fresh

    def decide(self, variables: PyTree, images: Any, x: jax.Array) -> jax.Array | None:
        """Gates that are decided outside the network, [rows, blocks]; None where there are none."""
        given = self.variant.given
        if given == "static":
            return jnp.broadcast_to(self.pattern[None], (x.shape[0], len(self.pattern)))
        if given == "random":
            return drawn_gates(jnp.asarray(images), len(self.names), self.rate)
        if self.policy is not None:
            return ste_gate(self._logits(variables, x)).value
        return None

    def _logits(self, variables: PyTree, x: jax.Array) -> jax.Array:
        """Of the policy."""
        assert self.policy is not None
        return jnp.asarray(self.policy.apply({"params": variables["params"]["policy"]}, x))

    def run(
        self,
        variables: PyTree,
        images: Any,
        *,
        key: jax.Array | None = None,
        executor: Executor | str = "masked",
        gates: jax.Array | None = None,
    ) -> tuple[jax.Array, Mapping[str, PyTree], list[BlockGates]]:
        """Logits, changed collections and gates; trained with a key."""
        x = standardised(unit_images(images), self.task.details)
        gates = self.decide(variables, images, x) if gates is None else gates
        held = {**variables} | ({} if gates is None else {"given": given_gates(gates, self.names)})
        mutable = ["intermediates", *(["batch_stats"] if key is not None else [])]
        rngs = None if key is None else {"dropout": key}
        logits, changed = self.module(executor).apply(held, x, train=key is not None, mutable=mutable, rngs=rngs)
        recorded = recorded_gates(changed) if "intermediates" in changed else []
        return wide(logits), {name: tree for name, tree in changed.items() if name == "batch_stats"}, recorded

    def penalty(self, gates: Sequence[BlockGates], step: jax.Array, steps: int) -> jax.Array:
        """What is added to the cross-entropy."""
        config = self.config
        if self.variant.loss == "none" or not gates:
            return jnp.float32(0)
        if self.variant.loss == "rate":
            return open_rate_loss(gates, self.rate)
        target = gate_target(step, steps, config.mac_target, warm_up=config.warm_up, anneal=config.anneal)
        return mac_target_loss(gates, target - self.extra, weight=config.penalty_weight, rest=self.rest)

    def objective(
        self, params: PyTree, state: TrainState, batch: Any, steps: int
    ) -> tuple[jax.Array, tuple[Mapping[str, PyTree], dict[str, jax.Array]]]:
        """Loss of a batch, the statistics afterwards, and metrics."""
        variables, key = {**state.variables, "params": params}, state.step_key
        if self.variant.given == "block-drop":
            return self._reinforced(variables, batch, key, state.step, steps)
        logits, changed, gates = self.run(variables, batch["image"], key=key)
        value = cross_entropies(logits, batch["label"]).mean()
        total = value + self.penalty(gates, state.step, steps)
        return total, (changed, {"cross_entropy": value})

    def _reinforced(self, variables: PyTree, batch: Any, key: jax.Array, step: jax.Array, steps: int) -> Any:
        """BlockDrop: a draw of the policy is rewarded against its likeliest pattern; both networks share weights.

        During the curriculum a trained network stays as it is, as the authors' does, and the policy decides about more
        and more blocks; a fresh one is trained from the first step.
        """
        images, labels = batch["image"], batch["label"]
        x = standardised(unit_images(images), self.task.details)
        logits, length = self._logits(variables, x), round(self.config.drop_curriculum * steps)
        free = block_drop_curriculum(step, length, len(self.names))
        # Probabilities within [0.1, 0.9], so that every pattern is tried.
        chance = 0.1 + 0.8 * jax.nn.sigmoid(jax.lax.stop_gradient(logits))
        decided = lambda bits: jnp.where(free[None], bits, True).astype(jnp.float32)
        actions = decided(jax.random.bernoulli(jax.random.fold_in(key, 1), chance))
        likeliest = decided(jax.lax.stop_gradient(logits) > 0)
        found, changed, _ = self.run(variables, images, key=key, gates=actions)
        greedy, _, _ = self.run(jax.lax.stop_gradient(variables), images, gates=likeliest)
        reward = lambda actions, logits: block_drop_reward(
            actions, logits.argmax(-1) == labels, penalty=self.config.drop_penalty
        )
        value = cross_entropies(found, labels).mean()
        learn = block_drop_loss(logits, actions, reward(actions, found), reward(likeliest, greedy), free=free)
        if self.loaded.start is not None:
            trains = step >= length
            changed = jax.tree.map(functools.partial(jnp.where, trains), changed, {n: variables[n] for n in changed})
            return jnp.where(trains, value, 0) + learn, (changed, {"cross_entropy": value})
        return value + learn, (changed, {"cross_entropy": value})

    def program(self) -> Program:
        """Training by Adam, gates at a rate of their own."""
        config, task = self.config, self.task
        check_options(config.train, task, accumulate=False)
        loader = column_loader(task.train, config.batch_size)
        steps = config.budget.steps(config.batch_size, loader.epoch_steps)
        adam = lambda rate: optax.adam(optax.linear_schedule(rate, 0.0, steps))
        tx = optax.partition({"network": adam(config.learning_rate), "gates": adam(config.gate_rate)}, gate_labels)

        def step(state: TrainState, batch: Any, aux: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            objective = functools.partial(self.objective, steps=steps)
            (value, (changed, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(state.params, state, batch)
            updates, opt = tx.update(grads, state.opt, state.params)
            metrics = {**metrics, "loss": value}
            if config.train.nonfinite == "skip":
                metrics["sound"] = all_finite(grads)
            return state.after(optax.apply_updates(state.params, updates), changed, opt), metrics

        infer = lambda variables, images: self.run(variables, images)[0]
        return Program(
            task=task._replace(init=self.init, infer=infer, example_inputs=task.test["image"][:64]),
            init=lambda key: TrainState.start(self.init(key), tx.init, key),
            phases=(Phase(step, steps),),
            params=lambda state: state.variables,
            loader=loader,
            evaluate=lambda state: self.judged(state.variables),
            train_metrics=lambda means: {"train_loss": means["loss"]},
        )

    # Judging

    def judged(self, variables: PyTree) -> dict[str, float]:
        """Accuracy, work, and whether the gates depend on the image, on the test images."""
        images, labels = self.task.test["image"], np.asarray(self.task.test["label"])
        size = min(EVAL_BATCH, len(labels))

        @jax.jit
        def scores(variables: PyTree, images: Any) -> Any:
            logits, _, gates = self.run(variables, images)
            rows = logits.shape[0]
            work = jnp.full(rows, self.loaded.static) if not gates else example_macs(gates) + self.rest
            layers = [one.layer.open for one in gates if one.layer is not None]
            return logits, work, jnp.stack(layers, 1) if layers else jnp.ones((rows, 1))

        starts = range(0, len(labels), size)
        parts = [jax.device_get(scores(variables, pad_to(images[start : start + size], size))) for start in starts]
        logits, work, layers = (np.concatenate(part)[: len(labels)] for part in zip(*parts, strict=True))
        logits = logits.astype(np.float64)
        log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        fractions = work / self.loaded.static + self.extra
        found = {
            "accuracy": float((logits.argmax(1) == labels).mean()),
            "nll": float(-log_p[np.arange(len(labels)), labels].mean()),
            "mac_fraction": float(fractions.mean()),
            "mac_fraction_p99": float(np.quantile(fractions, 0.99)),
        }
        if self.variant.layer is not None:
            about = gate_statistics(layers)
            found |= {"layers_open": about["open"], "patterns": about["patterns"], "gate_variance": about["variance"]}
            for batch in self.config.clock_batches:
                found |= self.clocked(variables, batch)
        return found

    def clocked(self, variables: PyTree, batch: int) -> dict[str, float]:
        """Time of the ladder over that of the network without gates, on the first test images; and how they differ."""
        images = jnp.asarray(self.task.test["image"][:batch])
        rungs = tuple(sorted({max(1, round(batch * part / self.config.rungs)) for part in range(1, self.config.rungs)}))
        ladder = jax.jit(lambda v, images: self.run(v, images, executor=Executor("ladder", rungs=(*rungs, batch)))[0])
        masked = jax.jit(lambda v, images: self.run(v, images)[0])
        plain = self.loaded.make(layer=None)
        network = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
        dense = jax.jit(lambda v, images: plain.apply(v, standardised(unit_images(images), self.task.details)))
        gap = float(jnp.abs(ladder(variables, images) - masked(variables, images)).max())
        times = time_interleaved(
            {"ladder": lambda: ladder(variables, images), "dense": lambda: dense(network, images)}, rounds=10, warmup=1
        )
        return {
            f"time_ratio_{batch}": paired_ratio(times["ladder"], times["dense"]),
            f"dense_ms_{batch}": times["dense"].median_ms,
            f"ladder_ms_{batch}": times["ladder"].median_ms,
            f"executor_gap_{batch}": gap,
        }


def gate_labels(params: PyTree) -> PyTree:
    """``"gates"`` for parameters of gates and policies, ``"network"`` for the rest."""
    label = lambda path, leaf: "gates" if re.search("_gate/|^policy/", path_name(path)) else "network"
    return jax.tree_util.tree_map_with_path(label, params)


def _overlaid(fresh: PyTree, trained: PyTree) -> PyTree:
    """Fresh variables with the trained ones in their places."""
    if not isinstance(trained, Mapping):
        return jnp.asarray(trained)
    return {name: _overlaid(leaf, trained[name]) if name in trained else leaf for name, leaf in fresh.items()}
