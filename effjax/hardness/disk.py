"""DiSK: selective distillation, a student scaffolded by a guide (Kag, Acar, Gangrade, Saligrama 2023, ICLR)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from effjax.core.errors import check_choice
from effjax.core.rows import row_labels, row_mask, row_mean
from effjax.core.tree import copied, wide
from effjax.hardness.disk_config import DiskConfig, Pass, disk_passes
from effjax.hardness.disk_losses import TopLogits, best_guide, disk_help, disk_loss, disk_normaliser, top_logits
from effjax.optim.dcl import DclState, dcl_init, dcl_lagrangian, dcl_update

__all__ = ["DiskProblem", "disk", "disk_init", "disk_next", "disk_step"]

PyTree = Any
Variables = Mapping[str, PyTree]


class DiskProblem(NamedTuple):
    """What ``disk`` trains on: three functions and the batches' labels.

    Attributes:
      student: ``(variables, batch, train, key) -> (logits, changed collections)``; the latter is empty where nothing
        like running means changes.
      teacher: ``batch -> (logits or TopLogits, features)``, frozen. It may look both up in columns of the batch that
        were made once, which saves its forward pass in every pass over the data.
      guide: ``(variables, features, train) -> (guide's logits [rows], changed collections)``.
      labels: ``batch -> int [rows]``, -1 for unknown: such rows are distilled, and count in nothing that needs labels.
      mask: ``batch -> bool [rows]``, rows that take part; None for all.
    """

    student: Callable[[Variables, PyTree, bool, jax.Array], tuple[jax.Array, Variables]]
    teacher: Callable[[PyTree], tuple[TopLogits | jax.Array, PyTree]]
    guide: Callable[[Variables, PyTree, bool], tuple[jax.Array, Variables]]
    labels: Callable[[PyTree], jax.Array] = lambda batch: batch["label"]
    mask: Callable[[PyTree], jax.Array] | None = None


class DiskState(NamedTuple):
    """State of a run.

    Attributes:
      params: of the student.
      model: its other collections, such as ``batch_stats``.
      opt: its optimizer's state.
      guide: variables of the guide.
      guide_opt: the state of the guide's optimizer.
      dual: DCL's multiplier.
      key: of dropout, folded with ``count``.
      count: int32, steps done.
      epoch: int32, rounds done.
    """

    params: PyTree
    model: Variables
    opt: PyTree
    guide: Variables
    guide_opt: PyTree
    dual: DclState
    key: jax.Array
    count: Int[Array, ""]
    epoch: Int[Array, ""]

    @property
    def variables(self) -> dict[str, PyTree]:
        """The student's, without the guide: what is kept."""
        return {"params": self.params, **self.model}


def disk(
    key: jax.Array,
    student: Variables,
    guide: Variables,
    problem: DiskProblem,
    batches: Callable[[int], Iterable[PyTree]],
    *,
    config: DiskConfig,
) -> DiskState:
    r"""Distil a frozen teacher into a small student, and help the student where it would fail, within a budget.

    .. math::
        \min_{\theta, g}\; -\frac1N \sum_i \sum_c u_c(x_i) \log\bigl(s_c(x_i) + g(x_i)\bigr)
        \quad \text{s.t.} \quad \frac1n \sum_i g(x_i)\,\mathrm{CE}_i \le \delta

    A guide g in (0, 1), a small network on the teacher's features, lifts the student's probabilities. Where it helps,
    the student has hardly a gradient, so that a small one spends its capacity on what it can learn; the budget keeps it
    from helping everywhere. The guide is thrown away at the end: ``state.variables`` is the student.

    It saves nothing at inference beyond what a smaller student does, and training costs the teacher's outputs and the
    guide: keep the former in columns (``top_logits``) where the data are not augmented. ``config.order`` says how often
    the student runs: ``"pairs"`` takes one forward and backward pass per batch, the release's separate passes twice
    that, and more with its three passes each.

    Args:
      key: of dropout.
      student: variables of the student, ``{"params": ..., ...}``; the release starts from one that was trained on the
        labels.
      guide: variables of the guide, such as a ``FeatureGuide``'s.
      problem: the networks as functions, and the labels.
      batches: ``number of the pass -> batches``.
      config: settings.

    Returns:
      The state after the last round.

    Raises:
      ValueError: shapes that do not fit, or settings out of range.

    Example:
      >>> x, y = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
      >>> linear = lambda variables, inputs: inputs @ variables["params"]
      >>> problem = DiskProblem(
      ...     student=lambda v, batch, train, key: (linear(v, batch["x"]), {}),
      ...     teacher=lambda batch: (5.0 * batch["x"], batch["x"]),
      ...     guide=lambda v, features, train: (linear(v, features)[:, 0], {}),
      ... )
      >>> zeros = lambda width: {"params": jnp.zeros((2, width))}
      >>> state = disk(
      ...     jax.random.key(0), zeros(2), zeros(1), problem, lambda number: [{"x": x, "label": y}] * 5,
      ...     config=DiskConfig(tx=optax.sgd(0.1), epochs=2, k=1),
      ... )
      >>> linear(state.variables, x).argmax(1).tolist(), int(state.epoch)
      ([0, 1], 2)

    Kag, Acar, Gangrade, Saligrama 2023 (ICLR, OpenReview N4K5ck-BTT), after the authors' poster and programs. Ours by
    default: the multiplier is found by signed dual ascent (the release computes one and then uses a cosine), the
    normaliser has its full weight, the passes are not separate, the number of wrong rows is at least 1 where it
    divides.
    """
    step = jax.jit(disk_step, static_argnames=("problem", "config", "step"), donate_argnums=0)
    state = copied(disk_init(key, student, guide, config))
    number = 0
    for epoch in range(config.epochs):
        for name in disk_passes(config, epoch):
            for batch in batches(number):
                state, _ = step(state, batch, problem=problem, config=config, step=name)
            number += 1
        state = disk_next(state)
    return state


def disk_init(key: jax.Array, student: Variables, guide: Variables, config: DiskConfig) -> DiskState:
    """The state before the first step; traceable.

    Args:
      key: of dropout.
      student: variables of the student.
      guide: variables of the guide; empty parameters where ``config.order`` is ``"best"``.
      config: settings.

    Returns:
      A ``DiskState``.

    Raises:
      ValueError: variables without the entry ``'params'``.

    Example:
      >>> ones = {"params": jnp.ones(2)}
      >>> float(disk_init(jax.random.key(0), ones, ones, DiskConfig(tx=optax.sgd(0.1))).dual.multipliers["help"])
      5.0
    """
    for argument, variables in (("student", student), ("guide", guide)):
        if not isinstance(variables, Mapping) or "params" not in variables:
            raise ValueError(f"{argument} must be variables with the entry 'params', such as module.init returns.")
    model = {name: tree for name, tree in student.items() if name != "params"}
    return DiskState(
        params=student["params"],
        model=model,
        opt=config.tx.init(student["params"]),
        guide=dict(guide),
        guide_opt=_guide_tx(config).init(guide["params"]),
        dual=dcl_init(config.constraint),
        key=key,
        count=jnp.zeros((), jnp.int32),
        epoch=jnp.zeros((), jnp.int32),
    )


def disk_step(
    state: DiskState, batch: PyTree, problem: DiskProblem, config: DiskConfig, *, step: Pass = "pairs"
) -> tuple[DiskState, dict[str, Float[Array, ""]]]:
    """One step; traceable, with all but ``state`` and ``batch`` static.

    Args:
      state: of ``disk_init``, ``disk_step`` or ``disk_next``.
      batch: what ``problem`` reads.
      problem: the networks as functions, and the labels.
      config: settings.
      step: ``"student"``: the student alone, the guide in evaluation mode. ``"guide"``: the guide alone, the student in
        evaluation mode. ``"pairs"``: both, each as above, but the guide's step uses the logits of the student's, from
        before its update. ``"joint"``: both by the gradient of one loss. ``"best"``: the student, with ``best_guide``.

    Returns:
      The new state, and ``loss`` (the student's, or of a guide's step the guide's), ``help``, ``guide`` (its mean) and
      ``multiplier``, that of DCL, of the best guide, or the scheduled price.

    Raises:
      ValueError: shapes that do not fit, or an unknown step.
    """
    check_choice("step", step, ("student", "guide", "pairs", "joint", "best"))
    run = _Step(state, batch, problem, config)
    if step == "joint":
        state, metrics = run.joint()
    else:
        metrics, logits = {}, None
        if step != "guide":
            state, logits, metrics = run.student(state, best=step == "best")
        if step in ("guide", "pairs"):
            state, found = run.guide(state, logits)
            metrics = {**found, **({name: metrics[name] for name in ("loss", "guide")} if metrics else {})}
    return state._replace(count=state.count + 1), metrics


def disk_next(state: DiskState) -> DiskState:
    """From the end of a round to the next, which moves the schedules on. Runs on the host, or traced.

    Args:
      state: after the last step of a round.

    Returns:
      The new state.
    """
    return state._replace(epoch=state.epoch + 1)


def _guide_tx(config: DiskConfig) -> optax.GradientTransformation:
    return config.tx if config.guide_tx is None else config.guide_tx


class _Step:
    """One batch with the teacher's outputs, and the updates of both networks on it."""

    def __init__(self, state: DiskState, batch: PyTree, problem: DiskProblem, config: DiskConfig):
        self.state, self.batch, self.problem, self.config = state, batch, problem, config
        teacher, features = jax.lax.stop_gradient(problem.teacher(batch))
        self.features = features
        rows = teacher.least.shape[0] if isinstance(teacher, TopLogits) else jnp.shape(teacher)[0]
        self.labels = row_labels(problem.labels(batch), rows)
        self.mask = row_mask(None if problem.mask is None else problem.mask(batch), rows)
        if not isinstance(teacher, TopLogits):
            k = jnp.shape(teacher)[1] if config.k is None else config.k
            teacher = top_logits(teacher, self.labels, k)
        self.top: TopLogits = teacher
        self.budget = config.at(config.budget, state.epoch)

    def student(self, state: DiskState, *, best: bool) -> tuple[DiskState, Array, dict[str, Array]]:
        """A step of the student; its logits before the update come back, for the guide."""
        helped = None if best else self.problem.guide(state.guide, self.features, False)[0]

        def loss(params: PyTree) -> tuple[Array, Any]:
            logits, model = self._logits(params, state, True)
            h, price = self._best(logits) if helped is None else (helped, self._price())
            return self._student_loss(logits, jax.lax.stop_gradient(h)), (logits, model, h, price)

        (value, (logits, model, h, price)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt = self.config.tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = self._metrics(value, self._spent(logits, h), h) | {"multiplier": price}
        return state._replace(params=params, model={**state.model, **model}, opt=opt), logits, metrics

    def guide(self, state: DiskState, logits: Array | None) -> tuple[DiskState, dict[str, Array]]:
        """A step of the guide and of DCL's multiplier."""
        if logits is None:
            logits, _ = self._logits(state.params, state, False)
        logits = jax.lax.stop_gradient(logits)

        def loss(params: PyTree) -> tuple[Array, Any]:
            h, changed = self.problem.guide({**state.guide, "params": params}, self.features, True)
            value, spent = self._guide_loss(logits, h)
            return value + self.config.distil_weight * self._distilled(logits, h), (spent, h, changed)

        (value, (spent, h, changed)), grads = jax.value_and_grad(loss, has_aux=True)(state.guide["params"])
        return self._after_guide(state, grads, spent, {**state.guide, **changed}), self._metrics(value, spent, h)

    def joint(self) -> tuple[DiskState, dict[str, Array]]:
        """A step of both by the gradients of one loss."""
        state = self.state

        def loss(both: tuple[PyTree, PyTree]) -> tuple[Array, Any]:
            logits, model = self._logits(both[0], state, True)
            h, changed = self.problem.guide({**state.guide, "params": both[1]}, self.features, True)
            value, spent = self._guide_loss(logits, h)
            return value + self._student_loss(logits, h), (spent, h, changed, model)

        both = (state.params, state.guide["params"])
        (value, (spent, h, changed, model)), grads = jax.value_and_grad(loss, has_aux=True)(both)
        updates, opt = self.config.tx.update(grads[0], state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state._replace(params=params, model={**state.model, **model}, opt=opt)
        return self._after_guide(state, grads[1], spent, {**state.guide, **changed}), self._metrics(value, spent, h)

    def _logits(self, params: PyTree, state: DiskState, train: bool) -> tuple[Array, Variables]:
        key = jax.random.fold_in(state.key, state.count)
        return self.problem.student({**state.model, "params": params}, self.batch, train, key)

    def _distilled(self, logits: Array, h: Array) -> Array:
        return disk_loss(
            logits,
            self.top,
            self.labels,
            h,
            student_temperature=self.config.student_temperature,
            teacher_temperature=self.config.teacher_temperature,
            mask=self.mask,
        )

    def _student_loss(self, logits: Array, h: Array) -> Array:
        known = self.mask & (self.labels >= 0)
        each = optax.softmax_cross_entropy_with_integer_labels(wide(logits), jnp.maximum(self.labels, 0))
        return self.config.label_weight * row_mean(each, known) + self.config.distil_weight * self._distilled(logits, h)

    def _best(self, logits: Array) -> tuple[Array, Array]:
        return best_guide(
            jax.lax.stop_gradient(logits),
            self.top,
            self.labels,
            self.budget,
            student_temperature=self.config.student_temperature,
            teacher_temperature=self.config.teacher_temperature,
            clamp=self.config.clamp,
            mask=self.mask,
        )

    def _spent(self, logits: Array, h: Array) -> Array:
        config = self.config
        price = {"target": config.target, "over": config.over, "clamp": config.clamp}
        return disk_help(logits, self.top, self.labels, h, mask=self.mask, **price)

    def _price(self) -> Array:
        """Of help beyond the budget."""
        if self.config.price is None:
            return self.state.dual.multipliers["help"]
        return self.config.at(self.config.price, self.state.epoch)

    def _guide_loss(self, logits: Array, h: Array) -> tuple[Array, Array]:
        """What help costs, and how much of it is spent."""
        config, spent = self.config, self._spent(logits, h)
        if config.price is None:
            value = dcl_lagrangian(self.state.dual, 0.0, {"help": spent - self.budget}, config.constraint)
        else:
            value = self._price() * jax.nn.relu(spent - self.budget)
        if config.normaliser == "none":
            return value, spent
        k = self.top.indices.shape[1]
        scale = config.distil_weight
        if config.normaliser == "scaled":
            scale *= config.student_temperature * config.teacher_temperature
        return value + scale * disk_normaliser(h, k, self.mask), spent

    def _after_guide(self, state: DiskState, grads: PyTree, spent: Array, guide: Variables) -> DiskState:
        updates, guide_opt = _guide_tx(self.config).update(grads, state.guide_opt, state.guide["params"])
        params = optax.apply_updates(state.guide["params"], updates)
        dual = dcl_update(state.dual, {"help": spent - self.budget}, self.config.constraint)
        return state._replace(guide={**guide, "params": params}, guide_opt=guide_opt, dual=dual)

    def _metrics(self, value: Array, spent: Array, h: Array) -> dict[str, Array]:
        guide = row_mean(jax.nn.sigmoid(wide(h)), self.mask)
        return {"loss": value, "help": spent, "guide": guide, "multiplier": self._price()}
