"""The arms of the GEENI study: members trained as one program, then what may still send, chosen on validation nodes."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.shapes import smallest_fit
from effjax.data.pipeline import batches
from effjax.graph.adjacency import gcn_normalize
from effjax.graph.error_nodes import (
    ErrorScores,
    error_auc,
    error_scores,
    error_set,
    held_out_trust,
    learned_trust,
    neighbour_agreement,
    spread_errors,
)
from effjax.graph.fastrain import nnz_ladder
from effjax.graph.geeni import (
    GcnMembers,
    ensemble_logits,
    ensemble_probabilities,
    fastest_members_form,
    fold_members,
    init_members,
    mask_features,
    member_probabilities,
    members_loss,
)
from effjax.graph.isolation import edge_jaccard, isolated_values, random_edges
from effjax.graph.propagation import correct_and_smooth
from effjax.graph.sparse import SparseMatrix, compact
from effjax.tasks.graph import NodeTask, draw_split, masked_accuracy, node_task
from effjax.train.program import Program

PyTree = Any
_SUBSETS = 16  # edge subsets averaged over at test time
_MASK = GcnMembers(True, False, False, False)  # what the weight decay is for


class Form(NamedTuple):
    """One arm.

    Attributes:
      label: the name shown in the report.
      role: as in ``Arm``.
      narrow: members of width hidden / members instead of hidden.
      single: one member that sees everything, of the width of all members together where ``narrow`` is False and
        ``wide`` True.
      wide: see ``single``.
      isolate: by what the error nodes are found; None isolates none.
      soft: multiply messages by a probability instead of stopping them.
      after: what is done with the probabilities.
      distil: who is trained on the ensemble's probabilities and served in its place: one network of width hidden, or
        narrow members.
      denoised: share of the members that see only edges between alike nodes, and are served so.
      folded: the mean of the members' logits, as one network (``fold_members``), instead of their probabilities'.
    """

    label: str
    role: Literal["baseline", "method", "control", "alternative"]
    narrow: bool = False
    single: bool = False
    wide: bool = False
    isolate: Literal["score", "agreement", "mutual", "learned", "oracle"] | None = None
    soft: bool = False
    after: Literal["drop-edges", "correct-smooth"] | None = None
    distil: Literal["one", "members"] | None = None
    denoised: float = 0.0
    folded: bool = False


FORMS: dict[str, Form] = {
    "single": Form("one GCN", "baseline", single=True),
    "single-wide": Form("one GCN, as wide as the ensemble", "alternative", single=True, wide=True),
    "single-drop-edges": Form("one GCN, mean over edge subsets", "alternative", single=True, after="drop-edges"),
    "correct-smooth": Form("one GCN, Correct & Smooth", "alternative", single=True, after="correct-smooth"),
    "ensemble": Form("ensemble", "baseline"),
    "narrow": Form("ensemble, narrow", "baseline", narrow=True),
    "narrow-folded": Form("ensemble, narrow, folded to one GCN", "baseline", narrow=True, folded=True),
    "narrow-correct-smooth": Form(
        "ensemble, narrow, Correct & Smooth", "alternative", narrow=True, after="correct-smooth"
    ),
    "distilled": Form("one GCN, distilled from the ensemble", "alternative", distil="one"),
    "narrow-distilled": Form(
        "ensemble, narrow, distilled from the wide one, folded to one GCN", "method", distil="members", folded=True
    ),
    "geeni-score": Form("GEENI, score", "method", narrow=True, isolate="score"),
    "geeni-agreement": Form("GEENI, score and agreement", "method", narrow=True, isolate="agreement"),
    "geeni-mutual": Form("GEENI, mutual information", "method", narrow=True, isolate="mutual"),
    "geeni-learned": Form("GEENI, learned detector", "method", narrow=True, isolate="learned"),
    "geeni-folded": Form(
        "GEENI, learned detector, folded to one GCN", "method", narrow=True, isolate="learned", folded=True
    ),
    "geeni-distilled": Form(
        "GEENI, learned detector, distilled from the wide ensemble, folded to one GCN",
        "method",
        isolate="learned",
        distil="members",
        folded=True,
    ),
    "geeni-soft": Form("GEENI, learned detector, soft", "method", narrow=True, isolate="learned", soft=True),
    "geeni-correct-smooth": Form(
        "GEENI, learned detector, then Correct & Smooth",
        "method",
        narrow=True,
        isolate="learned",
        after="correct-smooth",
    ),
    "oracle": Form("ORACLE detector (reads test labels)", "control", narrow=True, isolate="oracle"),
    "jaccard": Form("one GCN on denoised edges", "alternative", single=True, denoised=1.0),
    "geeni-denoised": Form(
        "GEENI, learned detector, half of the members denoised",
        "method",
        narrow=True,
        isolate="learned",
        denoised=0.5,
    ),
}


@functools.lru_cache(maxsize=4)
def _task(name: str, raw: bool) -> NodeTask:
    data, _, attack = name.partition("/")
    return node_task(data, row_normalize=not raw, attack=attack or None)


@functools.lru_cache(maxsize=4)
def _alike(name: str, threshold: float) -> jax.Array:
    """bool [nnz], the edges that denoising keeps."""
    task = _task(name, False)
    features = task.features.todense() if isinstance(task.features, SparseMatrix) else task.features
    return jnp.asarray(edge_jaccard(task.adjacency.pattern, np.asarray(features) != 0) >= threshold)


def program(config: Any, task_name: str, name: str) -> Program:
    """The Program of one arm."""
    return _Run(config, task_name, FORMS[name]).program()


class _Run:
    """One arm on one graph."""

    def __init__(self, config: Any, task_name: str, form: Form):
        self.config, self.form = config, form
        self.task = task = _task(task_name, task_name.partition("/")[0] in config.raw_features)
        self.count = 1 if form.single else config.members
        self.hidden = config.hidden // config.members if form.narrow else config.hidden
        self.hidden *= config.members if form.wide else 1
        self.tx = optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=_MASK), optax.adam(config.learning_rate)
        )
        self.fixed_split = "/" in task_name
        pattern = task.adjacency.pattern
        everything = pattern.valid.astype(jnp.float32)
        self.weights = everything  # A with self-loops, of all members or [K, nnz]
        denoised = round(form.denoised * self.count)
        if denoised:
            alike = _alike(task_name, config.jaccard) * everything
            rows = [everything] * (self.count - denoised) + [alike] * denoised
            self.weights = jnp.stack(rows) if self.count > 1 else alike
        self.matrix = _normalized(pattern, self.weights)
        self.networks = config.form
        if self.networks == "auto":
            members = self._members(jax.random.key(0))
            self.networks = fastest_members_form(members, task.features, self._training_matrix(jax.random.key(0)))

    def program(self) -> Program:
        config, task = self.config, self.task
        epochs = config.budget.steps(1, lambda epoch: 1)
        steps = max(1, epochs // config.epochs_per_step) if config.budget.unit == "epochs" else epochs
        self.phase = steps
        self.steps = steps + (round(steps * config.student_share) if self.form.distil else 0)
        distil = bool(self.form.distil)
        parts = "members|opt/1/0/(mu|nu)" + "|student|student_opt/1/0/(mu|nu)" * (self.form.distil == "members")
        return Program(
            init=self.init,
            step=self.step,
            batches=lambda seed: batches({"row": np.zeros(1, np.int32)}, 1, seed=seed, shuffle=False),
            evaluate=self.evaluate,
            infer=lambda params, inputs: self._infer(params, *inputs),
            params=self._served,
            example_inputs=(np.arange(task.data.nodes, dtype=np.int32), task.features, task.adjacency),
            total_steps=self.steps,
            batch_size=task.data.nodes,
            source=f"{task.name}: {task.source}",
            derive=self.derive,
            between=self.between if self.form.isolate or distil else None,
            sharding=((f"^({parts})/", ("expert",)),) if self.count > 1 else (),
            branch_probabilities={"": (1 - steps / self.steps, steps / self.steps)} if distil else {},
        )

    # Training

    def init(self, key: jax.Array) -> PyTree:
        split, members, subsets, rest, after = (jax.random.fold_in(key, number) for number in range(5))
        params = self._members(members)
        train, val, test = self._split(split)
        state = {
            "members": params,
            "opt": self.tx.init(params),
            "key": rest,
            "subsets": subsets,
            "after": after,
            "epoch": jnp.zeros((), jnp.int32),
            "train": train,
            "val": val,
            "test": test,
        }
        if self.form.isolate:
            nodes = self.task.labels.shape
            state |= {"send": jnp.ones(nodes), "trust": jnp.zeros(nodes), "mode": jnp.zeros((), jnp.int32)}
        if self.form.distil:
            count = 1 if self.form.distil == "one" else self.config.members
            width = self.config.hidden // count
            student = init_members(rest, count, self.task.features.shape[1], width, self.task.classes)
            state |= {"student": student, "student_opt": self.tx.init(student)}
            state |= {"target": jnp.zeros((len(self.task.labels), self.task.classes))}
        return state

    def step(self, state: PyTree, batch: PyTree, aux: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
        if not self.form.distil:
            return self._train(state, aux)
        first = state["epoch"] < self.phase * self.config.epochs_per_step
        return jax.lax.cond(first, self._train, self._distil, state, aux)

    def _train(self, state: PyTree, aux: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
        def loss(members, key):
            logits = ensemble_logits(
                mask_features(members, aux["features_kept"]),
                aux["features"],
                aux["train_matrix"],
                dropout=self.config.dropout,
                key=key,
                form=self.networks,
            )
            return members_loss(logits, aux["labels"], state["train"])

        members, opt, value = self._epochs(loss, state["members"], state["opt"], state)
        state = state | {"members": members, "opt": opt, "epoch": state["epoch"] + self.config.epochs_per_step}
        return state, {"loss": value / self.count}

    def _distil(self, state: PyTree, aux: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
        def loss(student, key):
            options = {"dropout": self.config.student_dropout, "key": key, "form": self.networks}
            logits = ensemble_logits(student, aux["features"], aux["matrix"], **options)
            return -jnp.sum(jnp.mean(jnp.sum(state["target"] * jax.nn.log_softmax(logits), axis=2), axis=1))

        student, opt, value = self._epochs(loss, state["student"], state["student_opt"], state)
        state = state | {"student": student, "student_opt": opt, "epoch": state["epoch"] + self.config.epochs_per_step}
        return state, {"loss": value / student.count}

    def _epochs(self, loss: Callable, params: PyTree, opt: PyTree, state: PyTree) -> tuple[PyTree, PyTree, jax.Array]:
        def epoch(carry, number):
            params, opt = carry
            value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(state["key"], number))
            updates, opt = self.tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt), value

        numbers = state["epoch"] + jnp.arange(self.config.epochs_per_step)
        (params, opt), values = jax.lax.scan(epoch, (params, opt), numbers)
        return params, opt, jnp.mean(values)

    def derive(self, state: PyTree) -> PyTree:
        """The graph; and what each member sees of it, drawn anew from the same key."""
        return {
            "features": self.task.features,
            "labels": self.task.labels,
            "matrix": self.matrix,
            "weights": self.weights,
            "train_matrix": self._training_matrix(state["subsets"]),
            "features_kept": self._features_kept(state["subsets"]),
        }

    def _members(self, key: jax.Array) -> GcnMembers:
        return init_members(key, self.count, self.task.features.shape[1], self.hidden, self.task.classes)

    def _split(self, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        data, config = self.task.data, self.config
        if not self.fixed_split:
            return draw_split(key, self.task.labels, data.classes, config.train_per_class, config.val_per_class)
        masks = [np.zeros(data.nodes, bool) for _ in range(3)]
        for mask, nodes in zip(masks, (data.train, data.val, data.test), strict=True):
            mask[nodes] = True
        return tuple(jnp.asarray(mask) for mask in masks)

    def _training_matrix(self, key: jax.Array) -> SparseMatrix:
        pattern = self.task.adjacency.pattern
        if self.count == 1 or self.config.edge_keep == 1:
            return self.matrix
        draw = lambda key: random_edges(key, pattern, self.config.edge_keep)
        kept = jnp.stack([pattern.valid] + [draw(jax.random.fold_in(key, k)) for k in range(1, self.count)])
        return _normalized(pattern, self.weights * kept)

    def _features_kept(self, key: jax.Array) -> jax.Array:
        shape = (self.count, self.task.features.shape[1])
        kept = jax.random.bernoulli(jax.random.fold_in(key, 0), self.config.feature_keep, shape)
        return kept.at[0].set(True)

    def _seen(self, state: PyTree) -> GcnMembers:
        return mask_features(state["members"], self._features_kept(state["subsets"]))

    def _served(self, state: PyTree) -> GcnMembers:
        return state["student"] if self.form.distil else self._seen(state)

    # After training

    def between(self, state: PyTree, done: int) -> PyTree:
        """After the members' last step the targets of the students; after theirs which nodes may still send."""
        if self.form.distil and done == self.phase:
            return state | {"target": self._target(state, self.derive(state))}
        if self.form.isolate and done == self.steps:
            return state | self._choose(state, self.derive(state))
        return state

    @functools.partial(jax.jit, static_argnums=0)
    def _target(self, state: PyTree, aux: PyTree) -> jax.Array:
        hot = jax.nn.one_hot(aux["labels"], self.task.classes)
        return jnp.where(state["train"][:, None], hot, self._teacher(state, aux))

    def _teacher(self, state: PyTree, aux: PyTree) -> jax.Array:
        """Probabilities [N, C] of the ensemble that is imitated."""
        return ensemble_probabilities(ensemble_logits(self._seen(state), aux["features"], aux["matrix"]))

    @functools.partial(jax.jit, static_argnums=0)
    def _choose(self, state: PyTree, aux: PyTree) -> dict[str, jax.Array]:
        """The isolation that is best at the validation nodes; none if none is better than that."""
        scores = error_scores(member_probabilities(self._logits(state, aux, aux["matrix"])))
        order = jax.random.permutation(jax.random.fold_in(state["after"], 0), aux["labels"].shape[0])
        folds = order % self.config.folds
        trust, judges = self._trust(scores, state, aux, folds)
        sends = jax.vmap(lambda trust: self._sends(trust, state))(judges)  # [folds or 1, candidates, N]
        judged = state["val"] & ((folds == jnp.arange(self.config.folds)[:, None]) | (len(judges) == 1))
        judged = judged[: len(judges)]
        right = functools.partial(self._right, state, aux)
        counts = []
        for mode in self.config.modes:
            count = lambda one, mode=mode: jnp.sum(one[1] & right(self._isolated(aux, one[0], mode)))
            every = (sends.reshape(-1, sends.shape[-1]), jnp.repeat(judged, sends.shape[1], axis=0))
            counts.append(jnp.sum(jax.lax.map(count, every).reshape(sends.shape[:2]), axis=0))
        table = jnp.stack(counts, axis=1)  # candidates by mode: of equal ones the gentlest is first
        best = jnp.argmax(table)
        better = jnp.max(table) > jnp.sum(state["val"] & right(aux["matrix"]))
        send = jnp.where(better, self._sends(trust, state)[best // len(counts)], 1.0)
        return {"trust": trust, "send": send, "mode": (best % len(counts)).astype(jnp.int32)}

    def _trust(self, scores: ErrorScores, state: PyTree, aux: PyTree, folds: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[N], and [folds, N] that has not seen the fold it is judged by (or [1, N] if it sees no labels at all)."""
        kind = self.form.isolate
        if kind == "learned":
            data = (scores, aux["features"], self._shared(aux), aux["labels"], state["train"], state["val"], folds)
            options = {"fold_count": self.config.folds, "ridge": self.config.ridge}
            return learned_trust(*data, **options), held_out_trust(*data, **options)
        if kind == "oracle":
            trust = (scores.label == aux["labels"]).astype(jnp.float32)
        else:
            trust = self._scores(scores, self._shared(aux))[kind]
        return trust, trust[None]

    @staticmethod
    def _scores(scores: ErrorScores, matrix: SparseMatrix) -> dict[str, jax.Array]:
        """Those that see no labels."""
        agreement = neighbour_agreement(matrix, scores.label)
        return {
            "score": scores.score,
            "agreement": scores.score + agreement,
            "mutual": -scores.mutual_information,
        }

    def _sends(self, trust: jax.Array, state: PyTree) -> jax.Array:
        """[candidates, N]: by what the messages of every node are multiplied."""
        known = state["train"] | state["val"]
        if self.form.isolate == "oracle":
            return jnp.where(known, 1.0, trust)[None]
        if self.form.soft:
            return jnp.stack([jnp.where(known, 1.0, trust**power) for power in self.config.powers])
        return jnp.stack([1.0 - error_set(trust, fraction, known) for fraction in self.config.fractions])

    def _isolated(self, aux: PyTree, send: jax.Array, mode: str) -> SparseMatrix:
        values = isolated_values(aux["matrix"], send, mode=mode, weights=aux["weights"])
        return aux["matrix"]._replace(values=values)

    @staticmethod
    def _shared(aux: PyTree) -> SparseMatrix:
        """The graph of the first member, for views and neighbours."""
        matrix = aux["matrix"]
        return matrix if matrix.values.ndim == 1 else matrix._replace(values=matrix.values[0])

    def _logits(self, state: PyTree, aux: PyTree, matrix: SparseMatrix) -> jax.Array:
        """[K, N, C] of the members that are served."""
        return ensemble_logits(self._served(state), aux["features"], matrix)

    def _answer(self, state: PyTree, aux: PyTree, matrix: SparseMatrix) -> jax.Array:
        """Probabilities [N, C] of all of them together."""
        return self._infer(self._served(state), slice(None), aux["features"], matrix)

    def _right(self, state: PyTree, aux: PyTree, matrix: SparseMatrix) -> jax.Array:
        return jnp.argmax(self._answer(state, aux, matrix), axis=1) == aux["labels"]

    # Evaluation

    def evaluate(self, state: PyTree) -> dict[str, float]:
        aux = self.derive(state)
        metrics = self._measure(state, aux)
        if self.form.isolate:
            mode = self.config.modes[int(state["mode"])]
            served = _without_zeros(self._isolated(aux, state["send"], mode))
            metrics |= self._measure_isolated(state, aux, served)
            size = int(aux["matrix"].pattern.size)
            metrics["edges_removed"] = 1 - int(served.pattern.size) / size
            metrics["isolated"] = jnp.mean(state["send"] == 0)
        return {name: float(value) for name, value in metrics.items()}

    @functools.partial(jax.jit, static_argnums=0)
    def _measure(self, state: PyTree, aux: PyTree) -> dict[str, jax.Array]:
        score = lambda found: masked_accuracy(found, aux["labels"], state["test"])
        mean = self._answer(state, aux, aux["matrix"])
        metrics = {"accuracy": score(mean)}
        if self._served(state).count > 1:
            logits = self._logits(state, aux, aux["matrix"])
            metrics |= {"accuracy_member": jnp.mean(jax.vmap(score)(logits)), "accuracy_ensemble": score(mean)}
        if self.form.distil:
            metrics["accuracy_teacher"] = score(self._teacher(state, aux))
        if self.form.after == "drop-edges":
            metrics["accuracy"] = score(jnp.mean(self._over_subsets(state, aux), axis=0))
        return metrics | {"accuracy": score(self._smoothed(mean, state, aux))} if self._smooths else metrics

    @property
    def _smooths(self) -> bool:
        return self.form.after == "correct-smooth"

    def _smoothed(self, probabilities: jax.Array, state: PyTree, aux: PyTree) -> jax.Array:
        pattern = aux["matrix"].pattern
        bare = _normalized(pattern, jnp.where(pattern.rows == pattern.columns, 0, aux["weights"]))
        return correct_and_smooth(bare, probabilities, aux["labels"], state["train"] | state["val"])

    @functools.partial(jax.jit, static_argnums=0)
    def _measure_isolated(self, state: PyTree, aux: PyTree, served: SparseMatrix) -> dict[str, jax.Array]:
        scores = error_scores(member_probabilities(self._logits(state, aux, aux["matrix"])))
        wrong = scores.label != aux["labels"]
        trusts = self._scores(scores, self._shared(aux)) | {
            "nearby": spread_errors(self._shared(aux), wrong, state["val"]),
            "subsets": -jnp.sum(jnp.var(self._over_subsets(state, aux), axis=0), axis=1),
            self.form.isolate: state["trust"],
        }
        metrics = {f"auc_{name}": error_auc(trust, wrong, state["test"]) for name, trust in trusts.items()}
        found = self._answer(state, aux, served)
        found = self._smoothed(found, state, aux) if self._smooths else found
        return metrics | {"accuracy": masked_accuracy(found, aux["labels"], state["test"])}

    def _over_subsets(self, state: PyTree, aux: PyTree) -> jax.Array:
        """[subsets, N, C], the mean over the members on random subsets of the edges."""
        pattern = aux["matrix"].pattern

        def one(key):
            kept = random_edges(key, pattern, self.config.edge_keep)
            matrix = _normalized(pattern, aux["weights"] * kept)
            return self._answer(state, aux, matrix)

        return jax.lax.map(one, jax.random.split(jax.random.fold_in(state["after"], 1), _SUBSETS))

    def _infer(self, params: GcnMembers, nodes: jax.Array | slice, features: Any, matrix: SparseMatrix) -> jax.Array:
        members = fold_members(params) if self.form.folded else params
        return ensemble_probabilities(ensemble_logits(members, features, matrix))[nodes]


def _normalized(pattern: Any, weights: jax.Array) -> SparseMatrix:
    """``gcn_normalize`` of weights [nnz] or [K, nnz]."""
    if weights.ndim == 1:
        return gcn_normalize(SparseMatrix(pattern, weights))
    normal = lambda weights: gcn_normalize(SparseMatrix(pattern, weights)).values
    return SparseMatrix(pattern, jax.vmap(normal)(weights))


def _without_zeros(matrix: SparseMatrix) -> SparseMatrix:
    """The entries that are not zero for every member, compacted to one of a few sizes."""
    values = np.asarray(matrix.values)
    kept = np.any(values.reshape(-1, matrix.nnz) != 0, axis=0)
    rungs = nnz_ladder(int(matrix.pattern.size), shrink=0.9, least=0.05)
    capacity = smallest_fit(int(kept.sum()), rungs)
    found = compact(matrix._replace(values=values.reshape(-1, matrix.nnz)[0]), kept, capacity=capacity)
    if values.ndim == 1:
        return found
    return found._replace(values=jnp.pad(values[:, kept], ((0, 0), (0, capacity - kept.sum()))))
