"""Per stem: a loop of a user's own with the public functions, and the study's arm; both give parameters.

To join: a function ``() -> (parameters of the loop, parameters of the arm)`` in ``CASES``. It may use the recipe for
the arm alone; what the loop needs is written out.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_graph import write_small_cora

import effjax
from effjax.data.augment import random_crop_flip
from effjax.data.bucket_sampler import BucketSampler
from effjax.data.pipeline import batches
from effjax.data.sequences import sequence_data
from effjax.finetune.chain import cola_init, cola_merge, cola_next, cola_value_and_grad
from effjax.finetune.chain_config import ColaConfig
from effjax.finetune.lora_config import LoraRule
from effjax.finetune.lora_linen import lora_apply
from effjax.models.mlp import MLP
from effjax.models.residual_blocks import BasicBlock
from effjax.models.resnet import ResNet
from effjax.models.sequence import LSTMCell
from effjax.models.sequence_network import SequenceNetwork, step_network
from effjax.models.vit import ViT
from effjax.optim.batch_size import adamw_by_batch_size, scale_by_batch_size
from effjax.optim.constraints import consistency_kl
from effjax.optim.dcl import dcl, dcl_lagrangian
from effjax.optim.dual_ascent import Constraint, DclConfig
from effjax.optim.samuel import samuel, samuel_eval_params, samuel_init, samuel_sync, samuel_value_and_grad
from effjax.recurrent.fptt import fptt, fptt_eval_params, fptt_terminal_loss
from effjax.recurrent.irnn import IncrementalRNN
from effjax.recurrent.sequence_problem import SequenceProblem
from effjax.recurrent.tarnn import TARNN
from effjax.recurrent.through_time import fptt_step
from effjax.study.resolve import resolve
from effjax.tasks.image import image_task
from effjax.tasks.sequence import sequence_task
from effjax.tasks.text import text_task
from effjax.train.loaders import column_loader
from effjax.train.loop import fit
from effjax.train.trainer import supervised
from effjax.transformers.axformer_rules import AxformerConfig
from effjax.transformers.evaluator import GatedEvaluator
from effjax.transformers.icpc import MixedLevels
from effjax.transformers.prune_spec import prune_shape
from effjax.transformers.slicing import mask_params
from effjax.transformers.token_drop import token_drop_columns, vocabulary_stop_ids
from effjax.transformers.validation import prune_batches
from effjax.vision.gate_networks import SalienceGate
from effjax.vision.gated_blocks import GatedBasicBlock, recorded_gates
from effjax.vision.global_layer import GlobalLayer
from effjax.vision.mac_target import gate_target, mac_target_loss

KEY = jax.random.key(0)


def arm(study, name, *words):
    """The program of a smoke preset's arm, its final state, and its task."""
    program = resolve(f"{study}:smoke", [str(word) for word in words]).build(name)
    return program, fit(program, 0).state


def samuel_loop():
    program, state = arm("samuel", "digits-mlp-64-offline/samuel", "--settings", "offline", "--budget.amount", 20)

    task = image_task("digits", MLP((64,), classes=10))
    tx = samuel(lambda rate: optax.sgd(rate, 0.9), (1.0, 0.1, 0.01, 0.001, 0.0001), period=2, total_steps=20)
    losses_and_grads = samuel_value_and_grad(lambda params, batch: task.loss({"params": params}, batch)[0], loop="vmap")

    @jax.jit
    def step(params, opt, batch):
        losses, grads = losses_and_grads(params, batch)
        updates, opt = tx.update(grads, opt, params, value=losses)
        return samuel_sync(opt, optax.apply_updates(params, updates)), opt

    params = samuel_init(task.init(KEY)["params"], 5)
    opt, stream = tx.init(params), batches(task.train, 64, seed=0)
    for _ in range(20):
        params, opt = step(params, opt, next(stream))
    return samuel_eval_params(opt, params), program.params(state)["params"]


def dcl_loop():
    words = ("--tasks", "digits/mlp-16", "--noise-rows", 64, "--noise", 0.0, "--batch-size", 16, "--budget.amount", 6)
    _, state = arm("dcl", "digits-mlp-16-noise/dcl-0.1", *words)

    task = image_task("digits", MLP((16,), classes=10), train_rows=64)
    config = DclConfig({"consistency": Constraint("<=", 0.1)}, dual=optax.chain(optax.ema(0.9), optax.sgd(0.05)))
    tx = optax.chain(dcl(config), optax.adam(2e-3))
    mean, std = (task.details[name][None, None, None, :] for name in ("mean", "std"))

    def objective(params, opt, batch, key):
        draw, dropout = jax.random.split(key)
        images = batch["image"].astype(jnp.float32) / 255.0
        both = jnp.concatenate([images, images + 0.25 * jax.random.normal(draw, images.shape)])
        logits = task.module.apply({"params": params}, (both - mean) / std, train=True, rngs={"dropout": dropout})
        values = {"consistency": consistency_kl(logits[:16], logits[16:])}
        targets = jax.nn.one_hot(batch["label"], 10)
        return dcl_lagrangian(opt, optax.softmax_cross_entropy(logits[:16], targets).mean(), values, config), values

    @jax.jit
    def step(params, opt, batch, key):
        grads, values = jax.grad(objective, has_aux=True)(params, opt, batch, key)
        updates, opt = tx.update(grads, opt, params, values=values)
        return optax.apply_updates(params, updates), opt

    params, drawn = task.init(KEY)["params"], jax.random.split(KEY)[1]
    opt, stream = tx.init(params), batches(task.train, 16, seed=0)
    for t in range(6):
        params, opt = step(params, opt, next(stream), jax.random.fold_in(drawn, t))
    return (params, opt), (state.params, state.opt)


def cola_loop():
    words = ("--tasks", "digits/mlp-8", "--budget.amount", 12, "--batch-size", 8, "--links", 3)
    program, state = arm("cola", "digits-mlp-8/cola-3", *words)

    start, drawn = jax.random.split(KEY)
    config = ColaConfig(LoraRule("kernel$", rank=1, alpha=2.0), knots=(4, 8), keep_links=True)
    tx = optax.adamw(optax.linear_schedule(1e-2, 0.0, 12), weight_decay=0.0)
    pretrained = resolve("cola:smoke", ["--tasks", "digits/mlp-8"]).groups()[0].load()
    apply = lora_apply(pretrained.loss)
    value_and_grad = cola_value_and_grad(lambda params, batch: apply({"params": params}, batch)[0], config)

    @jax.jit
    def step(chain, opt, batch):
        _, grads = value_and_grad(chain, batch)
        updates, opt = tx.update(grads, opt, chain.lora)
        return chain._replace(lora=optax.apply_updates(chain.lora, updates)), opt

    chain = cola_init(drawn, jax.tree.map(jnp.copy, pretrained.init(start)["params"]), config)
    opt, knot, stream = tx.init(chain.lora), cola_next(tx, config), batches(pretrained.train, 8, seed=0)
    for t in range(12):
        if t in config.knots:
            chain, opt = knot(chain, opt)
        chain, opt = step(chain, opt, next(stream))
    merged = jax.jit(cola_merge, static_argnums=1)(chain, config)
    return (chain.lora, chain._replace(lora={}), merged), (
        state.params["lora"],
        state.model["frozen"],
        program.params(state)["params"],
    )


def _texts(columns, arm_name, study, shapes):
    words = ("--tasks", "sms_spam/encoder-1x8", "--train-rows", 100, "--test-rows", 20, "--max-length", 16)
    words += ("--budget.amount", 1, "--max-shapes", shapes, "--dropout", 0.0)
    program, state = arm(study, f"sms_spam-encoder-1x8/{arm_name}", *words)

    task = text_task("sms_spam", "encoder-1x8", max_length=16, train_rows=100, test_rows=20, dropout=0.0)
    sampler = BucketSampler(columns(task), seed=0, epochs=1, pad_id=task.tokenizer.pad_id, cap=32, max_shapes=shapes)
    tx = optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.0),
        scale_by_batch_size(reference=32),
        optax.scale_by_learning_rate(optax.linear_schedule(1e-3, 0.0, sampler.total_steps)),
    )

    @jax.jit
    def step(params, opt, batch):
        grads = jax.grad(lambda params: task.loss({"params": params}, batch)[0])(params)
        updates, opt = tx.update(grads, opt, params, batch_size=batch["weight"].sum())
        return optax.apply_updates(params, updates), opt

    params = task.init(jax.random.split(KEY)[0])["params"]
    opt = tx.init(params)
    for batch in sampler:
        params, opt = step(params, opt, batch)
    return params, program.params(state)["params"]


def bucket_sampler_loop():
    return _texts(lambda task: task.train, "buckets", "bucket_sampler", shapes=2)


def token_drop_loop():
    stops = lambda task: vocabulary_stop_ids(task.tokenizer)
    return _texts(
        lambda task: token_drop_columns(task.train, stops(task), seed=0, period=5), "token-drop", "token_drop", shapes=1
    )


def icpc_call():
    words = ("--tasks", "digits/vit-8-1", "--scales", "0.5", 1, "--shares", 1, 1, "--batch-size", 20)
    _, state = arm("icpc", "digits-vit-8-1/icpc", *words, "--train-rows", 100, "--test-rows", 20, "--budget.amount", 3)

    positions = effjax.transformers.position_selector("crop", table_grid=(2, 2))
    model = ViT(classes=10, patch=4, grid=(2, 2), hidden_size=8, num_layers=1, num_heads=1, positions=positions)
    task = image_task("digits", MixedLevels(model, ((4, 4), (8, 8))), train_rows=100, test_rows=20)
    mean, std = (task.details[name][None, None, None, :] for name in ("mean", "std"))
    mixed = effjax.icpc(lambda params, x: model.apply({"params": params}, x, train=True), ((4, 4), (8, 8)))
    rate = optax.warmup_cosine_decay_schedule(0.0, 4e-3, 1, 15)
    decayed = lambda path, leaf: "kernel" in jax.tree_util.keystr(path[-1:]) and leaf.ndim > 1
    tx = optax.adamw(rate, weight_decay=0.05, mask=functools.partial(jax.tree_util.tree_map_with_path, decayed))

    def loss(params, batch):
        images = (batch["image"].astype(jnp.float32) / 255.0 - mean) / std
        logits = mixed(params, images)
        return optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch["label"], 10)).mean()

    @jax.jit
    def step(params, opt, batch):
        updates, opt = tx.update(jax.grad(loss)(params, batch), opt, params)
        return optax.apply_updates(params, updates), opt

    params = jax.jit(task.init)(KEY)["params"]["module"]
    opt, stream = tx.init(params), batches(task.train, 20, seed=0)
    for _ in range(15):
        params, opt = step(params, opt, next(stream))
    return params, state.params["module"]


def axformer_loop():
    words = ("--tasks", "sms_spam/encoder-1x8", "--train-rows", 100, "--test-rows", 20, "--max-length", 16)
    words += ("--budget.amount", 1, "--max-shapes", 1, "--dropout", 0.0, "--group-size", 8, "--validation", 0.3)
    words += ("--learning-rates", 0.01)
    program, state = arm("axformer", "sms_spam-encoder-1x8/axformer-loose", *words)

    task = text_task("sms_spam", "encoder-1x8", max_length=16, train_rows=100, test_rows=20, dropout=0.0)
    order = np.random.default_rng(0).permutation(100)
    ids, labels = task.train["input_ids"], task.train["label"]
    rest, held = np.sort(order[30:]), np.sort(order[:30])
    columns = {"input_ids": ids.take(rest), "label": labels[rest]}
    sampler = BucketSampler(columns, seed=0, epochs=1, pad_id=task.tokenizer.pad_id, cap=32, max_shapes=1)
    tx = adamw_by_batch_size(optax.linear_schedule(0.01, 0.0, sampler.total_steps), weight_decay=0.0, reference=32)

    @jax.jit
    def step(params, opt, batch):
        grads = jax.grad(lambda params: task.loss({"params": params}, batch)[0])(params)
        updates, opt = tx.update(grads, opt, params, batch_size=batch["weight"].sum())
        return optax.apply_updates(params, updates), opt

    params = task.init(jax.random.split(KEY)[0])["params"]
    opt = tx.init(params)
    for batch in sampler:
        params, opt = step(params, opt, batch)
    lengths = ids.take(held).lengths
    inputs = {"mask": np.arange(lengths.max()) < lengths[:, None], "input_ids": ids.pad(held, int(lengths.max()))}
    assert task.tokenizer.pad_id == 0
    evaluator = GatedEvaluator(task.module, params, prune_batches(inputs, labels[held], batch_size=30))
    config = AxformerConfig(agreement=0.0, hard=False)
    found = effjax.axformer(evaluator, prune_shape(task.module, group_size=8), config=config)
    assert found.spec.removed_any
    return mask_params(task.module, params, found.spec.gates()), program.params(state)["params"]


def _layer(layer, study, name):
    words = ("--tasks", "noisy-digits-12", "--hidden", 4, "--batch-size", 8, "--train-rows", 32, "--budget.amount", 3)
    _, state = arm(study, f"noisy-digits-12/{name}", *words)

    data = sequence_data("noisy-digits-12", train_rows=32)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
    trained = fit(supervised(sequence_task(data, SequenceNetwork(layer, 10)), tx, steps=3, batch_size=8), 0).state
    return trained.params, state.params


def irnn_layer():
    return _layer(IncrementalRNN(4, length=12), "irnn", "irnn")


def tarnn_layer():
    return _layer(TARNN(4, variant="euler", length=12), "tarnn", "tarnn-euler")


def global_layer_net():
    words = ("--tasks", "digits", "--shrink", 1, "--widths", 3, "--batch-size", 8, "--train-rows", 64)
    words += ("--test-rows", 8, "--inference-batch", 8, "--budget.amount", 3, "--budget.unit", "steps")
    program, state = arm("global_layer", "digits/global", *words)

    block = functools.partial(BasicBlock, shortcut="project")
    model = ResNet(stages=((block, GlobalLayer),), widths=(3,), classes=10)
    task = image_task("digits", model, train_rows=64, test_rows=8)
    crop = lambda batch, index, rng: {**batch, "image": random_crop_flip(batch["image"], rng, padding=1)}
    rate = optax.warmup_cosine_decay_schedule(0.1 / 25, 0.1, 1, 3)
    tx = optax.chain(optax.identity(), optax.add_decayed_weights(6e-5), optax.sgd(rate, 0.9, nesterov=True))
    trained = fit(supervised(task, tx, steps=3, loader=column_loader(task.train, 8, transform=crop)), 0).state
    return trained.variables, program.params(state)


def fptt_loop():
    words = ("--tasks", "digits-permuted", "--cells", "lstm", "--hidden", 6, "--parts", 4, "--batch-size", 8)
    words += ("--train-rows", 32, "--test-rows", 16, "--budget.amount", 6, "--alphas", 0.02)
    program, state = arm("fptt", "digits-permuted-lstm-6/fptt-0.02", *words)

    data = sequence_data("digits-permuted", train_rows=32, test_rows=16)
    net = step_network(LSTMCell(6), outputs=10, inputs=1)
    loss = lambda w, h, labels, part: fptt_terminal_loss(net.read(w, h), labels, part, auxiliary="none")
    tx = fptt(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3)), alpha=0.02)
    problem = SequenceProblem(net.cell, loss, encode=net.encode, terminal=True, time_axis=1)
    train = jax.jit(fptt_step(problem, tx, parts=4), donate_argnums=(0, 1))
    w = jax.jit(net.init)(KEY)
    opt, stream = jax.jit(tx.init)(w), batches(data.train, 8, seed=0)
    for _ in range(6):
        batch = next(stream)
        opt, w, _, _ = train(opt, w, net.start(8), batch["inputs"], batch["targets"])
    return (w, opt, fptt_eval_params(opt, w)), (state.params, state.opt, program.params(state)["params"])


def fastrain_call(tmp_path):
    graph = write_small_cora(tmp_path / "small.npz")
    words = ("--tasks", graph, "--per-class", 3, "--hidden", 8, "--stages", 2, "--epochs-per-step", 5)
    words += ("--budget.amount", 20, "--budget.unit", "epochs", "--samples", 2, "--calibration-epochs", 3)
    words += ("--threshold", 0.3, "--arms", "fastrain")
    _, state = arm("fastrain", "small-3/fastrain", *words)

    data = effjax.node_data(graph)
    mask = effjax.tasks.draw_labelled(jax.random.split(KEY, 3)[0], data.labels, data.classes, 3)
    problem = effjax.graph.NodeProblem(data.features, data.adjacency, data.labels, mask, data.classes)
    network = functools.partial(
        effjax.models.NodeClassifier, data.classes, hidden=8, dropout=0.5, initializer="released"
    )
    depth = lambda params: len([name for name in params if name.startswith("conv_")])

    def init(key, deep):
        return network(depth=3 if deep else 2).init(key, data.features, data.adjacency)["params"]

    def apply(params, features, adjacency, *, key=None):
        rngs = None if key is None else {"dropout": key}
        module = network(depth=depth(params))
        return module.apply({"params": params}, features, adjacency, train=key is not None, rngs=rngs)

    config = effjax.graph.FastrainConfig(
        stages=2, epochs=10, epochs_per_step=5, samples=2, calibration_epochs=3, threshold=0.3
    )
    found = effjax.fastrain(KEY, init, apply, problem, config)
    return (found.params, found.labels, found.added), (effjax.graph.fastrain_params(state), state.labels, state.added)


def geeni_call():
    small = {"members": 2, "folds": 3, "modes": ("full",), "fractions": (0.1, 0.3), "epochs_per_step": 5}
    words = ("--hidden", 8, "--train-per-class", 6, "--val-per-class", 10, "--members", 2)
    words += ("--folds", 3, "--modes", "full", "--fractions", 0.1, 0.3, "--epochs-per-step", 5)
    words += ("--budget.amount", 30, "--budget.unit", "epochs", "--arms", "geeni-learned")
    _, state = arm("geeni", "cora/geeni-learned", *words)

    data = effjax.node_data("cora", row_normalize=True)
    train, val, _ = effjax.tasks.draw_split(jax.random.fold_in(KEY, 0), data.labels, data.classes, 6, 10)
    problem = effjax.graph.GeeniProblem(data.features, data.adjacency, data.labels, train, val, data.classes)
    config = effjax.graph.GeeniConfig(**small, width=4, epochs=30, isolate="learned", precompute=False)
    found = effjax.geeni(KEY, problem, config)
    served = effjax.graph.geeni_serve(state, problem, config=config)
    return found, served


def selective_loop():
    words = ("--tasks", "fashion_mnist/mlp-8", "--train-rows", 64, "--calibration-rows", 300, "--test-rows", 50)
    words += ("--batch-size", 16, "--budget.amount", 6, "--budget.unit", "steps", "--joint-errors", 0.2)
    program, state = arm("selective", "fashion_mnist-mlp-8/osp-30", *words)

    columns = program.task.train
    mean, std = (program.task.details[name][None, None, None, :] for name in ("mean", "std"))
    model = MLP((8,), classes=10)
    apply = lambda params, images: model.apply({"params": params}, (images - mean) / std)
    tx = optax.adamw(2e-3, weight_decay=1e-4)

    @jax.jit
    def step(params, opt, batch):
        loss = lambda params: effjax.hardness.osp_loss(apply(params, batch["image"]), batch["label"], 30.0)
        updates, opt = tx.update(jax.grad(loss)(params), opt, params)
        return optax.apply_updates(params, updates), opt

    params = model.init(KEY, jnp.zeros((1, 14, 14, 1)))["params"]
    opt, stream = tx.init(params), batches(columns, 16, seed=0)
    for _ in range(6):
        params, opt = step(params, opt, next(stream))
    return params, program.params(state)["params"]


def disk_call():
    words = ("--tasks", "digits/mlp-4", "--teacher", "mlp-16", "--teacher-epochs", 1, "--shrink", 1, "--rounds", 3)
    words += ("--train-rows", 100, "--test-rows", 40, "--batch-size", 20, "--budget.amount", 3, "--arms", "disk-cached")
    study = resolve("disk:smoke", [str(word) for word in words])
    group = study.groups()[0]
    task = group.load()
    state = fit(group.arms[0].build(task), 0).state

    data = image_task("digits", MLP((4,), classes=10), train_rows=100, test_rows=40)
    kept = {name: task.train[name] for name in ("teacher_logits", "teacher_features")}  # of the trained teacher
    top = effjax.hardness.top_logits(kept["teacher_logits"], data.train["label"], 3)
    columns = {
        **data.train,
        "features": kept["teacher_features"],
        **{k: np.asarray(v) for k, v in top._asdict().items()},
    }
    guide = effjax.hardness.FeatureGuide()
    mean, std = (data.details[name][None, None, None, :] for name in ("mean", "std"))

    def student(variables, batch, train, key):
        inputs = (batch["image"].astype(jnp.float32) / 255.0 - mean) / std
        return data.module.apply(variables, inputs, train=train, rngs={"dropout": key}), {}

    problem = effjax.hardness.DiskProblem(
        student=student,
        teacher=lambda batch: (type(top)(*(batch[name] for name in top._fields)), batch["features"]),
        guide=lambda variables, features, train: (guide.apply(variables, features), {}),
    )
    rest, draw = jax.random.split(KEY)
    variables = guide.init(draw, jnp.zeros((1, 16)))
    stream = batches(columns, 20, seed=0)
    config = effjax.hardness.DiskConfig(
        tx=optax.adam(3e-3), epochs=3, k=3, student_temperature=2.0, teacher_temperature=2.0, label_weight=1.0 - 0.9
    )
    found = effjax.disk(
        rest, data.init(KEY), variables, problem, lambda number: [next(stream) for _ in range(5)], config=config
    )
    return (found.params, found.guide, found.dual), (state.params, state.guide, state.dual)


def hybrid_call():
    words = ("--tasks", "digits/mlp-2/mlp-8", "--pair-steps", 5, "--batch-size", 128, "--budget.amount", 2)
    _, state = arm("hybrid", "digits-mlp-2-mlp-8/router", *words)

    data = effjax.load_data("digits")
    columns = data.splits["train"]
    rows = len(columns["label"])
    held, others = round(0.35 * rows), round(0.1 * rows)
    order = np.random.default_rng(0).permutation(rows)
    parts = np.split(order, [rows - held - others, rows - others])
    rest, learned, calibration = ({name: columns[name][np.sort(part)] for name in columns} for part in parts)
    small, large = MLP((2,), classes=10), MLP((8,), classes=10)
    found = image_task(dataclasses.replace(data, splits={**data.splits, "train": rest}), small).details
    mean, std = (found[name][None, None, None, :] for name in ("mean", "std"))

    def normalised(images):
        return (images.astype(jnp.float32) / 255 - mean) / std

    def base(variables, images, *, key=None):
        logits, layers = small.apply(variables, normalised(images), train=False, capture=True)
        return logits, layers["layer0"]

    def expert(variables, images, *, key=None):
        return large.apply(variables, normalised(images), train=False)

    networks = effjax.hardness.HybridNetworks(base, expert)
    config = effjax.hardness.HybridConfig(coverage=0.8, batch_size=128, epochs=2)
    pair = state.params.base, state.params.expert  # the study trains them before its arms
    images = lambda part: (part["image"], part["label"])
    found = effjax.hybrid(KEY, networks, pair, *images(learned), calibration=images(calibration), config=config)
    return (found.state.params.router, found.state.threshold), (state.params.router, state.threshold)


def si_cnn_loop():
    words = ("--tasks", "digits/resnet-4", "--shrink", 1, "--train-rows", 64, "--test-rows", 20, "--batch-size", 16)
    words += ("--budget.amount", 4, "--warmup", 0.5, "--arms", "si")
    program, state = arm("si_cnn", "digits-resnet-4/si", *words)

    block = functools.partial(effjax.models.BasicBlock, shortcut="project")
    dense = effjax.models.ResNet(stages=(1,), widths=(4,), block=block, classes=10)
    model = effjax.vision.interpolated(dense, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    task = image_task("digits", model, train_rows=64, test_rows=20)
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 4)
    kernels = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    tx = optax.chain(optax.add_decayed_weights(1e-4, kernels), optax.sgd(rate, 0.9, nesterov=True))

    @jax.jit
    def step(variables, opt, batch):
        loss = lambda params: task.loss({**variables, "params": params}, batch)
        grads, (stats, _) = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt = tx.update(grads, opt, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **stats}, opt

    variables = jax.jit(task.init)(KEY)
    opt, stream = jax.jit(tx.init)(variables["params"]), batches(task.train, 16, seed=0)
    for _ in range(4):
        variables, opt = step(variables, opt, next(stream))
    return variables["params"], program.params(state)["params"]


def dynamic_inference_loop():
    words = ("--tasks", "digits/resnet-4", "--depth", 1, "--batch-size", 16, "--train-rows", 64, "--test-rows", 16)
    _, state = arm("dynamic_inference", "digits-resnet-4/layers", *words, "--budget.amount", 6)

    gate = functools.partial(SalienceGate, kind="ste")
    block = functools.partial(GatedBasicBlock, layer=gate, group=4)
    model = ResNet(stages=(1,), widths=(4,), block=block)
    task = image_task("digits", model, train_rows=64, test_rows=16)
    mean, std = (task.details[name][None, None, None, :] for name in ("mean", "std"))
    rate = lambda start: optax.adam(optax.linear_schedule(start, 0.0, 6))
    part = lambda path, leaf: "gates" if "layer_gate" in jax.tree_util.keystr(path) else "network"
    tx = optax.partition(
        {"network": rate(1e-2), "gates": rate(3e-2)}, lambda params: jax.tree_util.tree_map_with_path(part, params)
    )

    def objective(params, stats, batch, t):
        images = (batch["image"].astype(jnp.float32) / 255.0 - mean) / std
        held = {"params": params, "batch_stats": stats}
        logits, changed = model.apply(held, images, train=True, mutable=["intermediates", "batch_stats"])
        loss = optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch["label"], 10)).mean()
        target = gate_target(t, 6, 0.7, warm_up=0.2, anneal=0.4)
        # Multiply-adds outside the block: the first convolution and the last layer.
        gates, rest = recorded_gates(changed), 9 * 4 * 64 + 4 * 10
        return loss + mac_target_loss(gates, target, weight=20.0, rest=rest), changed["batch_stats"]

    @jax.jit
    def step(params, stats, opt, batch, t):
        grads, stats = jax.grad(objective, has_aux=True)(params, stats, batch, t)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), stats, opt

    variables = task.init(KEY)
    params, stats = variables["params"], variables["batch_stats"]
    opt, stream = tx.init(params), batches(task.train, 16, seed=0)
    for t in range(6):
        params, stats, opt = step(params, stats, opt, next(stream), jnp.int32(t))
    return (params, stats), (state.params, state.model["batch_stats"])


CASES = {
    "samuel": samuel_loop,
    "dcl": dcl_loop,
    "cola": cola_loop,
    "bucket_sampler": bucket_sampler_loop,
    "token_drop": token_drop_loop,
    "icpc": icpc_call,
    "axformer": axformer_loop,
    "irnn": irnn_layer,
    "tarnn": tarnn_layer,
    "fptt": fptt_loop,
    "global_layer": global_layer_net,
    "fastrain": fastrain_call,
    "disk": disk_call,
    "geeni": geeni_call,
    "selective": selective_loop,
    "hybrid": hybrid_call,
    "si_cnn": si_cnn_loop,
    "dynamic_inference": dynamic_inference_loop,
}
