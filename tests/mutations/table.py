"""Mistakes that the tests must find: a text of the package, what it becomes, and where a test should fail.

A text stands in exactly one place of ``effjax``, whichever module that is, so that code may move. Where it was
rewritten, put the new words here: ``python tests/mutations/run.py --check`` lists what is no longer found.
"""

from typing import NamedTuple


class Mutation(NamedTuple):
    """A mistake.

    Attributes:
      name: short and unique.
      kind: what sort of mistake it is.
      old: words that occur once in the package.
      new: what they become.
      tests: files or folders below ``tests`` that run on it, the likeliest first.
    """

    name: str
    kind: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    # samuel
    Mutation(
        "samuel-bias-correction",
        "off by one",
        "(count.astype(spread.dtype) + 1.0)",
        "(count.astype(spread.dtype) + 2.0)",
        ("optim/test_samuel.py", "optim/test_one_gradient.py"),
    ),
    Mutation(
        "samuel-sync-keeps-moments",
        "dropped reset",
        "else experts.init(target)",
        "else inner",
        ("optim/test_samuel.py", "common/test_optimizers.py"),
    ),
    Mutation(
        "samuel-last-step",
        "off by one",
        "state.count == total_steps - 1",
        "state.count == total_steps",
        ("optim/test_samuel.py",),
    ),
    Mutation(
        "one-gradient-displacement",
        "dropped reset",
        "jnp.where(due, d, b + d)",
        "(b + d)",
        ("optim/test_one_gradient.py",),
    ),
    # dcl
    Mutation(
        "dcl-at-least",
        "sign",
        'return level - value if self.op == ">=" else value - level',
        "return value - level",
        ("optim/test_dcl.py",),
    ),
    Mutation(
        "dcl-descends",
        "sign",
        "jax.vmap(config.dual.update)(-slope.reshape(-1)",
        "jax.vmap(config.dual.update)(slope.reshape(-1)",
        ("optim/test_dcl.py",),
    ),
    Mutation(
        "dcl-absent-class",
        "dropped mask",
        "jnp.asarray(measured[name]) & due",
        "jnp.broadcast_to(due, lam.shape)",
        ("optim/test_dcl.py",),
    ),
    Mutation(
        "marginal-per-device",
        "dropped reduction",
        "mean = mean_prediction(logits, mask, axis=axis)",
        "mean = mean_prediction(logits, mask)",
        ("optim/test_constraints.py",),
    ),
    # disk
    Mutation(
        "disk-label-twice",
        "double count",
        "extra = (labels[:, None] >= 0) & ~(top.indices == own).any(1, keepdims=True)",
        "extra = labels[:, None] >= 0",
        ("hardness/test_disk_losses.py",),
    ),
    Mutation(
        "disk-no-row-wrong",
        "division by zero",
        "return total / jnp.maximum(rows.sum(), 1).astype(total.dtype)",
        "return total / rows.sum().astype(total.dtype)",
        ("hardness/test_disk_losses.py",),
    ),
    Mutation(
        "disk-guide-after-update",
        "order",
        "state, found = run.guide(state, logits)",
        "state, found = run.guide(state, None)",
        ("hardness/test_disk.py", "common/test_public_calls.py"),
    ),
    # cola
    Mutation(
        "cola-link-key",
        "wrong fold of the key",
        "jax.random.fold_in(jax.random.wrap_key_data(key), link)",
        "jax.random.fold_in(jax.random.wrap_key_data(key), 0 * link)",
        ("finetune/test_cola.py",),
    ),
    Mutation(
        "cola-schedule",
        "stale schedule",
        'set() if schedule == "per_link" else',
        'set() if schedule == "global" else',
        ("finetune/test_cola.py",),
    ),
    Mutation(
        "lora-dropout-scale",
        "forgotten division",
        "jnp.where(keep, x / (1.0 - dropout), jnp.zeros_like(x))",
        "jnp.where(keep, x, jnp.zeros_like(x))",
        ("finetune/test_lora.py", "finetune/test_cola.py"),
    ),
    # bucket_sampler
    Mutation(
        "buckets-same-order-every-epoch",
        "wrong fold of the key",
        "rng = np.random.default_rng((seed, epoch, 0))\n    members",
        "rng = np.random.default_rng((seed, 0, 0))\n    members",
        ("data/test_bucket_sampler.py",),
    ),
    Mutation(
        "buckets-weigh-dummy-rows",
        "skipped mask",
        '"weight": np.ones(len(rows), np.float32)}\n',
        '"weight": np.ones(share, np.float32)}\n',
        ("data/test_bucket_sampler.py", "data/test_length_grouping.py"),
    ),
    # token_drop
    Mutation(
        "drops-same-in-every-epoch",
        "wrong fold of the key",
        "np.random.SeedSequence((seed, epoch))",
        "np.random.SeedSequence((seed, 0))",
        ("transformers/test_token_drop.py",),
    ),
    Mutation(
        "drops-at-an-edge",
        "off by one",
        'np.searchsorted(edges, lengths, side="right") - 1',
        'np.searchsorted(edges, lengths, side="left") - 1',
        ("transformers/test_token_drop.py",),
    ),
    # fptt
    Mutation(
        "fptt-epoch-keeps-lambda",
        "dropped reset",
        "node._replace(lam=jax.tree.map(jnp.zeros_like, node.lam)) if _ours(node)",
        "node if _ours(node)",
        ("recurrent/test_fptt.py",),
    ),
    Mutation(
        "fptt-last-full-part",
        "off by one",
        "jnp.where(part.index < part.whole - 1, early, hot)",
        "jnp.where(part.index < part.whole, early, hot)",
        ("recurrent/test_fptt.py",),
    ),
    Mutation(
        "parts-equally-weighted",
        "forgotten division",
        "steps = np.asarray([self.length] * self.whole + [self.rest] * bool(self.rest))",
        "steps = np.asarray([1] * self.whole + [1] * bool(self.rest))",
        ("recurrent/test_fptt.py",),
    ),
    # irnn, tarnn
    Mutation(
        "irnn-cell-step-size",
        "stale schedule",
        "activation=self.activation, dtype=self.dtype)\n        return (h, time + 1), y",
        "activation=self.activation, dtype=self.dtype)\n        return (h, time), y",
        ("recurrent/test_irnn.py", "models/test_sequence.py"),
    ),
    Mutation("irnn-decay", "sign", "+ pre) - alpha * y)", "+ pre) + alpha * y)", ("recurrent/test_irnn.py",)),
    Mutation(
        "tarnn-cell-input-before",
        "stale carry",
        "return (h, jnp.asarray(x, before.dtype), time + 1), y",
        "return (h, jnp.asarray(first, before.dtype), time + 1), y",
        ("recurrent/test_tarnn.py",),
    ),
    Mutation(
        "tarnn-gate",
        "sign",
        "z = (1 - gate) * h + gate * z",
        "z = gate * h + (1 - gate) * z",
        ("recurrent/test_tarnn.py",),
    ),
    # fastrain
    Mutation(
        "labels-set-twice",
        "skipped mask",
        "new = (confidence > threshold) & ~mask",
        "new = confidence > threshold",
        ("graph/test_stages.py", "graph/test_pseudolabels.py", "graph/test_fastrain.py"),
    ),
    Mutation(
        "same-edges-in-every-step",
        "wrong fold of the key",
        "first=state.epochs[state.stage],",
        "first=0 * state.epochs[state.stage],",
        ("graph/test_fastrain.py",),
    ),
    Mutation(
        "optimizer-outlives-a-stage",
        "dropped reset",
        "opt=tuple(config.tx.init(each) for each in row))",
        "opt=state.opt or tuple(config.tx.init(each) for each in row))",
        ("graph/test_fastrain.py", "graph/test_fastrain_study.py"),
    ),
    Mutation(
        "accuracy-on-given-labels",
        "skipped mask",
        "hidden = (added != 0) & (truth >= 0)",
        "hidden = truth >= 0",
        ("graph/test_stages.py", "graph/test_fastrain.py", "graph/test_fastrain_study.py"),
    ),
    # geeni
    Mutation(
        "detector-judged-by-what-it-saw",
        "skipped mask",
        "held_out_correctness(scores, seen, folds, **options)\n",
        "jnp.stack([learned_correctness(scores, seen, folds, **options)] * config.folds)\n",
        ("graph/test_geeni_study.py", "graph/test_geeni.py", "graph/test_error_nodes.py"),
    ),
    Mutation(
        "dropout-same-in-every-step",
        "wrong fold of the key",
        "first=state.epoch,",
        "first=0 * state.epoch,",
        ("graph/test_geeni.py", "graph/test_geeni_study.py"),
    ),
    Mutation(
        "students-learn-no-labels",
        "skipped mask",
        "return jnp.where(problem.train[:, None], hot, found)",
        "return found",
        ("graph/test_geeni.py", "graph/test_geeni_study.py"),
    ),
    # selective
    Mutation(
        "ties-by-order",
        "skipped mask",
        "differs = jnp.concatenate([minus[1:] != minus[:-1], jnp.ones(min(size, 1), bool)])",
        "differs = jnp.ones(size, bool)",
        ("hardness/test_risk_coverage.py",),
    ),
    Mutation(
        "risk-for-joint-error",
        "forgotten division",
        "joint_error=real(found) / real(n) * of,",
        "joint_error=real(found) / real(accepted) * of,",
        ("hardness/test_risk_coverage.py",),
    ),
    Mutation(
        "ltt-goes-on-after-a-failure",
        "dropped check",
        "best = max(best, begin + _before_first(p_values[begin:] > level) - 1)",
        "best = max(best, int(np.flatnonzero(p_values <= level)[-1]))",
        ("hardness/test_thresholds.py",),
    ),
    Mutation(
        "sgr-bounds-one-probe",
        "forgotten division",
        "binomial_upper_bound(steps.errors[at], steps.accepted[at], delta / probes)",
        "binomial_upper_bound(steps.errors[at], steps.accepted[at], delta)",
        ("hardness/test_thresholds.py",),
    ),
    Mutation(
        "osp-counts-of-one-device",
        "dropped reduction",
        "jnp.sum(x, 0) if axis_name is None else jax.lax.psum(jnp.sum(x, 0), axis_name)",
        "jnp.sum(x, 0)",
        ("hardness/test_osp.py",),
    ),
    Mutation(
        "osp-multipliers-look-back",
        "stale state",
        "values = terms(params).exclude - levels if alternating else",
        "values = terms(state.params).exclude - levels if alternating else",
        ("hardness/test_osp.py",),
    ),
    Mutation(
        "sat-table-stays",
        "stale state",
        "moved = wide(momentum) * wide(rows) + (1 - wide(momentum)) * predicted",
        "moved = wide(rows) + 0 * predicted",
        ("hardness/test_abstention_losses.py",),
    ),
    Mutation(
        "vue-reads-every-label",
        "skipped mask",
        'told = (acted.coin if config.feedback == "coin" else acted.action < 0) & (label >= 0)',
        "told = label >= 0",
        ("hardness/test_online.py",),
    ),
    # core
    Mutation(
        "chunks-forget-the-tail",
        "off by one",
        "carry, tail = run(carry, jax.tree.map(lambda leaf: leaf[whole:], xs))",
        "carry, tail = run(carry, jax.tree.map(lambda leaf: leaf[whole - 1 : -1], xs))",
        ("core/test_time_scan.py",),
    ),
    Mutation(
        "ladder-next-rung",
        "off by one",
        "bisect.bisect_left(rungs, size)",
        "bisect.bisect_right(rungs, size)",
        ("core/test_shapes.py",),
    ),
    # train
    Mutation(
        "accumulation-unweighted",
        "forgotten division",
        "_scaled(x, 1 / jnp.maximum(whole, 1e-9))",
        "_scaled(x, 1 / jnp.float32(micro_batches))",
        ("train",),
    ),
    Mutation(
        "dropout-same-in-every-update",
        "wrong fold of the key",
        "jax.random.fold_in(self.key, self.step)",
        "jax.random.fold_in(self.key, 0 * self.step)",
        ("train", "tasks"),
    ),
    Mutation(
        "resume-starts-the-data-again",
        "dropped state",
        'source.set_state(extra["iterator"])',
        "pass",
        ("train",),
    ),
    Mutation(
        "skipped-update-counts",
        "skipped mask",
        "optax.tree.where(sound, new, state)",
        "optax.tree.where(sound, new, new)",
        ("train",),
    ),
    Mutation(
        "epoch-order",
        "wrong fold of the key",
        "np.random.default_rng((self._seed, epoch, 0)).permutation(self._rows)",
        "np.random.default_rng((self._seed, 0, 0)).permutation(self._rows)",
        ("data/test_pipeline.py",),
    ),
    Mutation(
        "checkpoint-believes-its-json",
        "dropped check",
        "if meta != _sealed(meta):",
        "if False:",
        ("train/test_checkpoint.py",),
    ),
    Mutation(
        "signal-after-the-last-step-swallowed",
        "dropped check",
        "if stop.requested:  # after the last step; what follows a run would not notice",
        "if False:",
        ("train/test_signals.py",),
    ),
    # data
    Mutation(
        "read-ahead-counts",
        "stale state",
        'handed out so far."""\n        return self._state',
        'handed out so far."""\n        return self._iterator.get_state()',
        ("data/test_pipeline.py",),
    ),
    Mutation(
        "packed-positions",
        "dropped reset",
        '"position_ids": tokens(ids.positions),',
        '"position_ids": tokens(at % plan.length),',
        ("data/test_packing.py",),
    ),
    Mutation(
        "pretrained-thresholds-from-seen-images",
        "leak",
        'split = "test" if network else "train"',
        'split = "train"',
        ("hardness/test_selective_study.py",),
    ),
    Mutation(
        "accuracy-counts-unknown-labels",
        "skipped mask",
        "accuracy = 1 - (errors & where).sum() / where.sum()",
        "accuracy = 1 - errors.sum() / errors.size",
        ("hardness/test_selective_study.py",),
    ),
    Mutation(
        "stream-plays-unknown-labels",
        "skipped mask",
        "known = np.flatnonzero(np.asarray(labels) >= 0)",
        "known = np.arange(len(labels))",
        ("hardness/test_selective_study.py",),
    ),
    # curves of studies
    Mutation(
        "curve-of-the-first-seed",
        "dropped mean",
        '"mean": [statistics.fmean(column) for column in columns],',
        '"mean": [column[0] for column in columns],',
        ("study/test_curves.py",),
    ),
    Mutation(
        "grids-of-seeds-unchecked",
        "dropped check",
        'if len(curves) < len(runs) or any(curve["x"] != x for curve in curves):',
        "if len(curves) < len(runs):",
        ("study/test_curves.py",),
    ),
    Mutation(
        "finished-arm-forgets-its-curves",
        "dropped state",
        'run["curves"] = {found: curve_json(name, found, curve) for found, curve in curves.items()}',
        "pass",
        ("study/test_curves.py",),
    ),
    Mutation(
        "router-for-nothing",
        "dropped term",
        "return HybridCost(base / expert, 1.0, router / expert)",
        "return HybridCost(base / expert, 1.0)",
        ("hardness/test_hybrid_study.py",),
    ),
    # hybrid
    Mutation(
        "hybrid-base-trained-again-not-asked-again",
        "stale values",
        'if "base" in stages:',
        "if not stages:",
        ("hardness/test_hybrid_study.py",),
    ),
    Mutation(
        "hybrid-router-of-texts-reads-logits-twice",
        "wrong variable",
        "return wide(logits), wide(read[-1])",
        "return wide(logits), wide(logits)",
        ("hardness/test_hybrid_study.py",),
    ),
    Mutation(
        "hybrid-oracle-asks-where-both-are-wrong",
        "dropped condition",
        "return ~self.base_correct & self.expert_correct & self.known",
        "return ~self.base_correct & self.known",
        ("hardness/test_hybrid.py",),
    ),
    Mutation(
        "hybrid-weights-swapped",
        "sign",
        "return 2 - r, 1 + r",
        "return 1 + r, 2 - r",
        ("hardness/test_hybrid.py",),
    ),
    Mutation(
        "hybrid-threshold-one-row-off",
        "off by one",
        "value = np.sort(values)[place - 1]",
        "value = np.sort(values)[min(place, len(values) - 1)]",
        ("hardness/test_query_rules.py",),
    ),
    Mutation(
        "dispatch-padding-asks",
        "wrong row",
        "taken = jnp.where(real, slots, jnp.argmin(request))",
        "taken = jnp.where(real, slots, jnp.argmax(request))",
        ("hardness/test_cascades.py",),
    ),
    Mutation(
        "dispatch-mesh-takes-its-own-branch",
        "dropped reduction",
        "most = count if manual is None else jax.lax.pmax(count, manual)",
        "most = count if manual is None else jax.lax.pmin(count, manual)",
        ("hardness/test_dispatch.py",),
    ),
    Mutation(
        "dispatch-nan-served",
        "dropped check",
        "good = jnp.where(bad, rows, slots)",
        "good = slots",
        ("hardness/test_dispatch.py",),
    ),
    Mutation(
        "remote-late-answer-used",
        "dropped check",
        'if not call.done.is_set():\n            return "late"',
        'if False:\n            return "late"',
        ("hardness/test_remote.py",),
    ),
    Mutation(
        "queue-out-of-order",
        "order",
        "while self._batches and not self._batches[0].open:",
        "while self._batches and not self._batches[-1].open:",
        ("hardness/test_remote.py",),
    ),
    # axformer
    Mutation(
        "axformer-agreement",
        "strictness",
        "unhurt.sum() <= np.floor(config.agreement * counted.sum())",
        "unhurt.sum() < np.floor(config.agreement * counted.sum())",
        ("transformers/test_axformer.py",),
    ),
    Mutation(
        "axformer-base-updated",
        "stale value",
        "unhurt = (losses <= base.losses + config.tolerance) & counted",
        "unhurt = (losses <= state.losses + config.tolerance) & counted",
        ("transformers/test_axformer.py",),
    ),
    Mutation(
        "axformer-order-of-layers",
        "order",
        "for layer in reversed(layers) for kind in kinds",
        "for layer in layers for kind in kinds",
        ("transformers/test_axformer.py",),
    ),
    Mutation(
        "axformer-stored-states",
        "off by one",
        "return layer\n    return depth - 1",
        "return layer + 1\n    return depth - 1",
        ("transformers/test_axformer.py",),
    ),
    Mutation(
        "hard-attention-strict",
        "strictness",
        "jnp.where(p >= edge, p, jnp.zeros_like(p))",
        "jnp.where(p > edge, p, jnp.zeros_like(p))",
        ("transformers/test_gated.py",),
    ),
    Mutation(
        "slicing-drops-norm",
        "dropped part",
        "if not spec.shape.norm_first:\n                blocks[name]",
        "if False:\n                blocks[name]",
        ("transformers/test_slicing.py",),
    ),
    Mutation(
        "repair-without-stream",
        "forgotten term",
        "((wanted - inputs) @ first + stream)",
        "((wanted - inputs) @ first)",
        ("transformers/test_prune_rivals.py",),
    ),
    # study
    Mutation(
        "arm-of-another-config-taken-over",
        "dropped check",
        'difference = describe_difference(run.pop("identity"), self._arm_identity(name, seed))',
        'difference = describe_difference(run.pop("identity"), {}) and ""',
        ("study/test_compare.py",),
    ),
    Mutation(
        "claim-margin",
        "sign",
        "plus=claim.plus if larger else -claim.plus)",
        "plus=claim.plus)",
        ("study/test_claims.py",),
    ),
    Mutation(
        "claim-standard-error",
        "forgotten division",
        "statistics.stdev(differences) / math.sqrt(len(differences))",
        "statistics.stdev(differences)",
        ("study/test_claims.py",),
    ),
    Mutation(
        "claim-best-cost",
        "sign",
        'most = self.of not in COST_WORDS and self.metric["goal"] == "max"',
        'most = self.metric["goal"] == "max"',
        ("study/test_claims.py",),
    ),
)
