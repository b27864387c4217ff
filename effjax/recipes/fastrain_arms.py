"""The arms of the FASTRAIN study: staged runs as Programs whose state keeps its shapes while graph and depth change."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.data.pipeline import batches
from effjax.graph.fastrain import (
    Stage,
    compact_to_ladder,
    drop_count,
    drop_edges,
    drop_edges_exactly,
    edge_pool,
    fastrain_optimizer,
    nnz_ladder,
    pick_subset,
    prune_edges,
    select_pseudolabels,
    stage_plan,
    train_stage,
)
from effjax.graph.propagation import correct_and_smooth, label_propagation
from effjax.graph.self_training import (
    cluster_labels,
    guard_pseudolabels,
    most_confident,
    pseudolabel_weights,
)
from effjax.graph.sparse import SparseMatrix
from effjax.recipes import fastrain_network
from effjax.recipes.fastrain_forms import Form
from effjax.recipes.fastrain_network import Examined, inference, loopless, network, settings_of
from effjax.tasks.graph import NodeTask, draw_labelled
from effjax.train.program import Program

PyTree = Any


class Group(NamedTuple):
    """Arms that are compared with each other: one graph, one number of labels."""

    task: str
    per_class: int


def program(config: Any, group: Group, form: Form) -> Program:
    """One arm as a Program; a step is ``epochs_per_step`` epochs.

    Args:
      config: a ``FastrainStudy``.
      group: the graph and its labels.
      form: what the arm does.
    """
    task = fastrain_network.load_task(group.task)
    return _propagation(task, group) if form.layer == "lp" else _Run(config, group, form, task).program()


class _Run:
    """One self-trained arm; the functions of its Program."""

    def __init__(self, config: Any, group: Group, form: Form, task: NodeTask):
        self.config, self.group, self.form, self.task = config, group, form, task
        self.stages = form.stages or config.stages
        self.steps = _stage_steps(config)
        self.tx = fastrain_optimizer(config.learning_rate, config.weight_decay)
        known = np.asarray(task.labels)
        sizes = np.bincount(known[known >= 0], minlength=task.classes)
        if not sizes.all():
            raise ValueError(f"{task.name}: class {sizes.argmin()} has no node, so none of it can be labelled.")
        self.labelled = int(np.minimum(sizes, group.per_class).sum())
        self.settings = settings_of(config, group.task, form.layer)
        self.networks = {depth: network(self.settings, depth) for depth in form.depths}
        self.prepared = False

    def program(self) -> Program:
        task = self.task
        return Program(
            init=self.init,
            step=self.step,
            batches=_no_batches,
            evaluate=self.evaluate,
            infer=inference(self.settings),
            params=lambda state: self.network_params(state["params"], bool(state["deep"])),
            example_inputs=(np.arange(task.data.nodes, dtype=np.int32), task.features, task.adjacency),
            total_steps=self.stages * self.steps,
            batch_size=task.data.nodes * self.config.epochs_per_step,
            source=f"{task.name}: {task.source}",
            compiles=len(self.form.depths) * (len(nnz_ladder(task.adjacency.nnz)) if self.form.pruned else 1),
            between=self.between,
            derive=self.derive,
            train_metrics=lambda means: {"train_loss": means["loss"]},
        )

    # The state

    def init(self, key: jax.Array) -> PyTree:
        task = self.task
        nodes = task.data.nodes
        draw, start, rest = jax.random.split(key, 3)
        mask = draw_labelled(draw, task.labels, task.classes, self.group.per_class)
        plan = self.plan(self.labelled)
        params = self.fresh(start, plan.deep)
        return {
            "params": params,
            "opt": self.tx.init(params),
            # From here on no label outside the mask is in reach.
            "labels": jnp.where(mask, task.labels, -1).astype(jnp.int32),
            "weights": mask.astype(jnp.float32),
            "added": jnp.where(mask, 0, -1).astype(jnp.int32),
            "edges": jnp.ones(task.adjacency.nnz, bool),
            "predictions": jnp.zeros((self.stages, nodes), jnp.int32),
            "start": start,
            "key": rest,
            "stage": jnp.int32(0),
            "epoch": jnp.int32(0),
            "epochs": jnp.int32(0),
            **self.planned(plan),
        }

    def plan(self, labelled: int) -> Stage:
        """Depth and edges of a stage that begins with so many labels."""
        form, task = self.form, self.task
        found = stage_plan(task.data.nodes, task.classes, labelled, deep_below=self.config.deep_below)
        deep = found.deep if form.depth == "plan" else form.depth == "deep"
        return Stage(deep, found.keep if form.keep == "plan" else form.keep)

    def planned(self, plan: Stage) -> PyTree:
        """The part of the state that a new stage resets."""
        dropped = drop_count(self.task.adjacency.nnz, plan.keep)
        return {
            "deep": jnp.asarray(plan.deep),
            "keep": jnp.float32(plan.keep),
            "dropped": jnp.int32(dropped),
            "loss": jnp.float32(jnp.inf),
            "over": jnp.asarray(False),
        }

    def fresh(self, key: jax.Array, deep: bool) -> PyTree:
        """Parameters of a new network; with dynamic sizing those of the deep one, a shallow one's among them."""
        own = self.networks["deep" if deep else "shallow"].init(key)
        if deep or self.form.depth != "plan":
            return own
        hidden = jax.eval_shape(self.networks["deep"].init, key)["conv_1"]
        unused = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), hidden)
        return {"conv_0": own["conv_0"], "conv_1": unused, "conv_2": own["conv_1"]}

    def network_params(self, params: PyTree, deep: bool) -> PyTree:
        """The parameters that the network of this depth has."""
        if deep or self.form.depth != "plan":
            return params
        return {"conv_0": params["conv_0"], "conv_1": params["conv_2"]}

    # Steps

    def derive(self, state: PyTree) -> PyTree:
        """The graph of the stage; its key says the depth, so that each has an executable of its own."""
        if not self.prepared:
            self.prepare(state)
        matrix = self.task.adjacency
        if self.form.pruned:
            matrix = compact_to_ladder(matrix, np.asarray(state["edges"]))
        if self.form.pool:
            seed = np.asarray(jax.random.key_data(jax.random.fold_in(state["key"], state["stage"])))
            matrix = edge_pool(np.random.default_rng(seed), matrix, float(state["keep"]), self.config.pool)
        return {"deep" if state["deep"] else "shallow": (self.task.features, matrix)}

    def prepare(self, state: PyTree) -> None:
        """Compile what the host does between stages before the clock runs."""
        for depth, own in self.networks.items():
            params = self.network_params(self.fresh(state["start"], depth == "deep"), depth == "deep")
            own.predict(params, self.task.features, self.task.adjacency)
            if self.stages > 1:
                own.examine(self.form.filtered).compile(*self.examination(state, params))
        self.prepared = True

    def step(self, state: PyTree, batch: PyTree, aux: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
        del batch
        if not self.form.plateau:
            return self.train(state, aux)
        finished = lambda state: (state, {"loss": state["loss"]})
        return jax.lax.cond(state["stage"] < self.stages, lambda state: self.train(state, aux), finished, state)

    def train(self, state: PyTree, aux: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
        [(depth, (features, matrix))] = aux.items()
        epochs = self.config.epochs_per_step
        network = lambda params, *rest: self.networks[depth].train(self.network_params(params, depth == "deep"), *rest)
        params, opt, losses = train_stage(
            network,
            self.tx,
            state["params"],
            state["opt"],
            features,
            functools.partial(self.sample, state, matrix),
            state["labels"],
            state["weights"],
            jax.random.fold_in(state["key"], state["stage"]),
            epochs,
            first=state["epoch"],
        )
        loss = losses.mean()
        stuck = loss > (1 - self.config.plateau) * state["loss"]
        over = (state["epoch"] + epochs >= self.steps * epochs) | (stuck if self.form.plateau else False)
        counts = {name: state[name] + epochs for name in ("epoch", "epochs")}
        return {**state, "params": params, "opt": opt, "loss": loss, "over": over, **counts}, {"loss": loss}

    def sample(self, state: PyTree, matrix: SparseMatrix, key: jax.Array) -> SparseMatrix:
        """The graph of an epoch."""
        if self.form.pool:
            return pick_subset(key, matrix)
        if self.form.keep == 1.0:
            return matrix
        if self.config.exact_drop:
            # Of a pruned graph as large a share as of the whole one.
            dropped = state["dropped"] * matrix.pattern.size // self.task.adjacency.nnz
            return drop_edges_exactly(key, matrix, dropped)
        return drop_edges(key, matrix, state["keep"])

    # Between stages

    def between(self, state: PyTree, done: int) -> PyTree:
        if self.form.plateau:
            over = bool(state["over"]) and int(state["stage"]) < self.stages
        else:
            over = done % self.steps == 0
        if not over:
            return state
        stage = int(state["stage"])
        deep = bool(state["deep"])
        params = self.network_params(state["params"], deep)
        if stage == self.stages - 1:
            return self.finish(state, params, stage)
        examined = self.networks["deep" if deep else "shallow"].examine(self.form.filtered)(
            *self.examination(state, params)
        )
        new = self.select(state, examined)
        state = {**state, **self.label(state, examined, new, stage)}
        plan = self.plan(int(jnp.sum(state["weights"] > 0)))
        params = state["params"]
        if self.config.start != "warm" or deep != plan.deep:
            start = state["start"]
            params = self.fresh(start if self.config.start == "same" else jax.random.fold_in(start, stage), plan.deep)
        return {
            **state,
            "params": params,
            "opt": self.tx.init(params),
            "stage": jnp.int32(stage + 1),
            "epoch": jnp.int32(0),
            **self.planned(plan),
        }

    def examination(self, state: PyTree, params: PyTree) -> tuple[Any, ...]:
        """Arguments of ``Network.examine``."""
        key = jax.random.fold_in(jax.random.fold_in(state["key"], state["stage"]), self.steps)
        graph = (self.task.features, self.task.adjacency)
        return key, params, graph, state["labels"], state["weights"], state["edges"]

    def select(self, state: PyTree, found: Examined) -> jax.Array:
        """The nodes that get a pseudolabel."""
        config, mask, classes = self.config, state["weights"] > 0, self.task.classes
        if self.form.select != "threshold":
            new = most_confident(~mask, found.confidence, found.predictions, classes, config.top_k)
            if self.form.select == "m3s":
                key = jax.random.fold_in(state["key"], state["stage"])
                clusters = min(config.clusters, len(mask))
                checked = cluster_labels(key, found.logits, state["labels"], mask, classes, clusters=clusters)
                new = new & (checked == found.predictions)
            return new
        new = select_pseudolabels(found.confidence, mask, config.threshold, found.samples)
        if self.form.guarded:
            confident = select_pseudolabels(found.confidence, mask, config.threshold)
            new = guard_pseudolabels(
                new,
                confident,
                found.confidence,
                found.predictions,
                mask,
                classes,
                found.samples,
                agreement=config.guard_agreement,
                growth=config.guard_growth,
            )
        return new

    def label(self, state: PyTree, found: Examined, new: jax.Array, stage: int) -> PyTree:
        """The state's labels, weights and edges with the new nodes."""
        weights = 1.0
        if self.form.weighted:
            weights = pseudolabel_weights(found.confidence, found.predictions, found.samples)
        weights = jnp.where(new, weights, state["weights"]).astype(jnp.float32)
        changed = {
            "labels": jnp.where(new, found.predictions, state["labels"]).astype(jnp.int32),
            "weights": weights,
            "added": jnp.where(new, stage + 1, state["added"]).astype(jnp.int32),
            "predictions": state["predictions"].at[stage].set(found.predictions.astype(jnp.int32)),
        }
        if self.form.pruned:
            pattern = self.task.adjacency.pattern
            changed["edges"] = prune_edges(pattern, state["edges"], found.predictions, weights > 0)
        return changed

    def finish(self, state: PyTree, params: PyTree, stage: int) -> PyTree:
        """The last stage's predictions; to calibrate and label once more, as the authors do, would change nothing."""
        network = self.networks["deep" if state["deep"] else "shallow"]
        matrix = self.task.adjacency
        matrix = matrix._replace(values=jnp.where(state["edges"], matrix.values, 0))
        scores = network.predict(params, self.task.features, matrix)
        if self.form.smoothed:
            mask = state["added"] == 0
            labels = jnp.where(mask, state["labels"], 0)
            scores = correct_and_smooth(loopless(self.group.task), jax.nn.softmax(scores), labels, mask)
        predictions = state["predictions"].at[stage].set(scores.argmax(-1).astype(jnp.int32))
        return {**state, "predictions": predictions, "stage": jnp.int32(stage + 1)}

    def evaluate(self, state: PyTree) -> dict[str, float]:
        stage = int(state["stage"])
        if stage < self.stages:  # in the middle of a run
            state = self.finish(state, self.network_params(state["params"], bool(state["deep"])), stage)
        found = evaluate_stages(self.task.labels, state, min(stage + 1, self.stages))
        if self.form.pruned:
            found["edges_kept"] = float(jnp.mean(state["edges"]))
        return found | ({"epochs": float(state["epochs"])} if self.form.plateau else {})


def evaluate_stages(truth: jax.Array, state: PyTree, stages: int) -> dict[str, float]:
    """Accuracy after every stage on the nodes that had no label at the start; precision and number of pseudolabels.

    Args:
      truth: all labels, -1 where unknown.
      state: with ``predictions``, ``labels`` and ``added``.
      stages: finished ones.

    Returns:
      ``accuracy`` after the last stage; with several, ``accuracy_s`` after stage s, ``precision_s`` (1 where there are
      none) and the share of all nodes ``added_s`` of the pseudolabels that it left.
    """
    truth, added = np.asarray(truth), np.asarray(state["added"])
    labels, predictions = np.asarray(state["labels"]), np.asarray(state["predictions"])
    hidden = (added != 0) & (truth >= 0)
    right = (predictions == truth)[:, hidden].mean(1)
    found = {"accuracy": float(right[stages - 1])}
    for stage in range(1, stages):
        new = hidden & (added == stage)
        found[f"accuracy_{stage}"] = float(right[stage - 1])
        found[f"precision_{stage}"] = float((labels == truth)[new].mean()) if new.any() else 1.0
        found[f"added_{stage}"] = float(new.mean())
    return found


def _propagation(task: NodeTask, group: Group) -> Program:
    """Label propagation: one step, nothing trained."""
    matrix = loopless(group.task)

    def init(key: jax.Array) -> PyTree:
        mask = draw_labelled(jax.random.split(key, 3)[0], task.labels, task.classes, group.per_class)
        scores = jnp.zeros((task.data.nodes, task.classes))
        return {"scores": scores, "labels": jnp.where(mask, task.labels, 0), "mask": mask}

    def step(state: PyTree, batch: PyTree, aux: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
        scores = label_propagation(aux, state["labels"], state["mask"], task.classes)
        return {**state, "scores": scores}, {"loss": jnp.float32(0)}

    def evaluate(state: PyTree) -> dict[str, float]:
        hidden = ~np.asarray(state["mask"]) & (np.asarray(task.labels) >= 0)
        right = np.asarray(state["scores"].argmax(-1)) == np.asarray(task.labels)
        return {"accuracy": float(right[hidden].mean())}

    return Program(
        init=init,
        step=step,
        batches=_no_batches,
        evaluate=evaluate,
        infer=_look_up,
        params=lambda state: {"scores": state["scores"]},
        example_inputs=np.arange(task.data.nodes, dtype=np.int32),
        total_steps=1,
        batch_size=task.data.nodes,
        source=f"{task.name}: {task.source}",
        derive=lambda state: matrix,
        train_metrics=lambda means: {},
    )


def _look_up(params: PyTree, nodes: jax.Array) -> jax.Array:
    return params["scores"][nodes]


def _no_batches(seed: int) -> Any:
    """All data are in the state and beside it."""
    return batches({"row": np.zeros(1, np.int32)}, 1, seed=seed, shuffle=False)


def _stage_steps(config: Any) -> int:
    """Steps of a stage."""
    steps = config.budget.amount / (config.epochs_per_step if config.budget.unit == "epochs" else 1)
    return max(1, round(steps / config.stages))
