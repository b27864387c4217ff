"""Pretrained transformers from Hugging Face folders, and back into them."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from effjax.core.errors import check_choice, check_number
from effjax.core.folders import model_folder
from effjax.core.tree import path_name
from effjax.models.bert import Bert, BertClassifier
from effjax.models.convert import (
    Rule,
    export_weights,
    find_weights,
    import_weights,
    module_name,
    read_tensors,
    write_tensors,
)
from effjax.models.decoder import Decoder

__all__ = ["Pretrained", "load_pretrained", "save_pretrained"]

PyTree = Any
_log = logging.getLogger("effjax")
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


class Pretrained(NamedTuple):
    """A model with its weights.

    Attributes:
      module: the Flax module.
      params: its parameters; ``module.apply({"params": params}, input_ids)``.
      config: the folder's ``config.json``.
      rules: the layout table between ``params`` and the folder's tensors.
      folder: where it was read.
      initialised: paths that the folder lacks and that were drawn at random: new heads.
    """

    module: nn.Module
    params: PyTree
    config: dict[str, Any]
    rules: tuple[Rule, ...]
    folder: Path
    initialised: tuple[str, ...] = ()

    def module_name(self, path: str, layer: int | None = None) -> str:
        """The folder's name of the module that holds a kernel: the ``names`` of ``save_lora`` and ``load_lora``.

        Args:
          path: the kernel's path in ``params``.
          layer: index on the leading axis of a kernel that stacks layers; else None.

        Returns:
          The name without ``.weight``.

        Raises:
          ValueError: no such kernel, or ``layer`` is missing or superfluous.

        Example:
          >>> load_pretrained("stories260k", scan_layers=True).module_name("layers/attention/query/kernel", layer=3)
          'layers.3.attention.wq'
        """
        return module_name(path, self.rules, layer)


class _Family(NamedTuple):
    """How one ``model_type`` is read.

    ``build(config)`` gives the module's class and fields, ``rules(prefix, config)`` its layout,
    ``prefix`` the name of the base model that stands before its tensors, or does not; ``head`` and
    ``pooler`` the names of a classifier's layers.
    """

    build: Callable[[Mapping[str, Any]], tuple[type[nn.Module], dict[str, Any]]]
    rules: Callable[[str, Mapping[str, Any]], tuple[Rule, ...]]
    prefix: str
    head: str = ""
    pooler: str = ""
    classifier: str = ""


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    classes: int | None = None,
    pool: str = "mean",
    key: jax.Array | None = None,
    scan_layers: bool = False,
    remat: bool = False,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    **fields: Any,
) -> Pretrained:
    """A pretrained transformer from a folder in Hugging Face layout.

    Reads ``config.json`` (``model_type`` bert, roberta, electra, opt, llama) and ``model.safetensors``
    or its shards. Tensor names may or may not begin with the base model's prefix; heads that the
    module lacks (masked-language-model heads, poolers) are passed over.

    Args:
      source: a folder, or a name: ``"minilm"`` (all-MiniLM-L6-v2 from ``effjax[minilm]``),
        ``"stories260k"`` (travels with the package), or a folder inside ``EFFJAX_MODELS``.
      classes: put a ``BertClassifier`` with that many outputs on an encoder. Its head is read where
        the folder has one, else drawn at random, logged, and listed in ``initialised``.
      pool: of that classifier, ``"mean"`` or ``"cls"``.
      key: for layers drawn at random; by default ``jax.random.key(0)``.
      scan_layers: layers stacked on a leading axis and scanned.
      remat: recompute each layer in the backward pass.
      dtype: compute dtype.
      param_dtype: dtype of the parameters; bfloat16 halves a frozen base.
      **fields: further fields of the module that leave its parameters as they are: ``dropout``,
        ``attention_dropout``.

    Returns:
      A ``Pretrained``.

    Raises:
      FileNotFoundError: the folder, or a file of it, is not there.
      ValueError: a damaged or foreign file by its name, an architecture that is not supported, or
        tensors missing, unexpected or of other shapes, all listed.

    Example:
      >>> model = load_pretrained("stories260k", scan_layers=True)
      >>> model.params["layers"]["attention"]["query"]["kernel"].shape
      (5, 64, 64)
      >>> model.module.apply({"params": model.params}, jnp.array([[1, 403]])).shape
      (1, 2, 512)
    """
    folder = model_folder(source, holds="model.safetensors*")
    config = _read_config(folder / "config.json")
    family = _family(config, folder)
    path = find_weights(folder)
    tensors = read_tensors(path)
    prefix = family.prefix if any(name.startswith(family.prefix) for name in tensors) else ""
    module, rules = _build(family, config, prefix, folder, classes, pool, scan_layers, fields, remat=remat, dtype=dtype)
    dummy = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    target = jax.eval_shape(module.init, jax.random.key(0), dummy)["params"]
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, param_dtype), target)
    heads = [path for path in _paths(target) if re.match("(head|pooler)/", path)] if classes else []
    params = import_weights(tensors, target, rules, origin=str(path), optional=heads)
    initialised = tuple(name for name, leaf in _paths(params).items() if isinstance(leaf, jax.ShapeDtypeStruct))
    if initialised:
        _log.warning("%s has no %s: drawn at random.", path, ", ".join(initialised))
        params = _draw(module, params, jax.random.key(0) if key is None else key)
    if classes:  # a file with a head names its base model, as Hugging Face's classifiers want it
        _, rules = _build(family, config, family.prefix, folder, classes, pool, scan_layers, fields)
        config = _classifier_config(config, family, classes, pool)
    return Pretrained(module, params, config, rules, folder, initialised)


def save_pretrained(
    folder: str | os.PathLike[str],
    pretrained: Pretrained,
    params: PyTree | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> None:
    """Write a model as a folder in Hugging Face layout: the inverse of ``load_pretrained``.

    ``model.safetensors``, ``config.json``, and the tokenizer files of the folder that the model came
    from. Each file is written whole or not at all, the weights last. A pooler that the module does
    not use is carried over from there.

    Args:
      folder: made if it is not there.
      pretrained: what ``load_pretrained`` gave.
      params: parameters to write instead of ``pretrained.params``, with the same paths; merge
        adapters first.
      dtype: of the floating tensors in the file; None keeps the parameters'.

    Raises:
      ValueError: ``params`` with leaves of other names or shapes.

    Example:
      >>> import tempfile
      >>> model = load_pretrained("stories260k")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_pretrained(folder, model, dtype=jnp.bfloat16)
      ...     load_pretrained(folder).params["norm"]["scale"].dtype
      dtype('float32')
    """
    params = pretrained.params if params is None else params
    _check_same_shapes(params, pretrained.params)
    tensors = _carried(pretrained) | export_weights(params, pretrained.rules)
    if dtype is not None:
        tensors = {name: np.asarray(tensor, dtype) for name, tensor in tensors.items()}
    # Hugging Face loads in the dtype that the configuration names, whatever the file holds.
    named = {key: jax.tree.leaves(params)[0].dtype if dtype is None else dtype for key in ("dtype", "torch_dtype")}
    config = {key: jnp.dtype(named[key]).name if key in named else value for key, value in pretrained.config.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in _BESIDE:
        origin = pretrained.folder / name
        if origin.is_file() and not (folder / name).exists():
            shutil.copyfile(origin, folder / name)
    temporary = folder / f".config.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(temporary, folder / "config.json")
    write_tensors(folder / "model.safetensors", tensors)


def _build(
    family: _Family,
    config: Mapping[str, Any],
    prefix: str,
    folder: Path,
    classes: int | None,
    pool: str,
    scan_layers: bool,
    fields: Mapping[str, Any],
    **more: Any,
) -> tuple[nn.Module, tuple[Rule, ...]]:
    try:
        kind, sizes = family.build(config)
        rules = family.rules(prefix, config)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks {error} of model_type={config['model_type']!r}.") from None
    if scan_layers:
        rules = tuple(
            rule._replace(target=rule.target.replace("layer_{layer}/", "layers/")) if rule.target else rule
            for rule in rules
        )
    module = kind(**{**sizes, **fields, "scan_layers": scan_layers, **more})
    if classes is None:
        return module, rules
    check_number("classes", classes, low=1, integer=True)
    check_choice("pool", pool, ("mean", "cls"))
    if not family.head:
        raise ValueError(f"classes={classes}: {folder} holds a {config['model_type']!r} decoder; encoders classify.")
    activation = "gelu" if config["model_type"] == "electra" else "tanh"
    rules = tuple(rule._replace(target=f"encoder/{rule.target}") if rule.target else rule for rule in rules)
    pooler = family.pooler.format(prefix=prefix)
    heads = (*_dense(family.head, "head"), *(_dense(pooler, "pooler") if pool == "cls" else ()))
    return BertClassifier(module, classes, pool=pool, pool_activation=activation), (*heads, *rules)


def _draw(module: nn.Module, params: PyTree, key: jax.Array) -> PyTree:
    """Fill the leaves that are shapes only; the others are not computed."""
    absent = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    names = [name for name, leaf in _paths(params).items() if absent(leaf)]
    init = lambda key: _paths(module.init(key, jnp.zeros((1, 2), jnp.int32))["params"])
    drawn = jax.jit(lambda key: {name: init(key)[name] for name in names})(key)
    fill = lambda path, leaf: drawn[path_name(path)].astype(leaf.dtype) if absent(leaf) else leaf
    return jax.tree_util.tree_map_with_path(fill, params)


def _paths(tree: PyTree) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _check_same_shapes(params: PyTree, expected: PyTree) -> None:
    given, wanted = _paths(params), _paths(expected)
    shape = lambda tree, path: np.shape(tree[path]) if path in tree else None
    wrong = sorted(path for path in {*given, *wanted} if shape(given, path) != shape(wanted, path))
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"params: {', '.join(wrong[:5])}{more} are not as in the model that was loaded. "
            "Give all of its parameters, with adapters merged."
        )


def _carried(pretrained: Pretrained) -> dict[str, np.ndarray]:
    """The pooler of the origin, where this model does without."""
    names = [rule.source for rule in pretrained.rules if rule.target is None and ".pooler." in f".{rule.source}"]
    if not names or isinstance(pretrained.module, BertClassifier) or not pretrained.folder.is_dir():
        return {}
    return {name: tensor for name, tensor in read_tensors(find_weights(pretrained.folder)).items() if name in names}


def is_decoder(source: str | os.PathLike[str]) -> bool:
    """Whether a pretrained model, a name or a folder of ``model_folder``, predicts the next token.

    Example:
      >>> is_decoder("stories260k")
      True
    """
    folder = model_folder(source, holds="model.safetensors*")
    return _read_config(folder / "config.json")["model_type"] in ("opt", "llama")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no model's config.json ({error!r}).") from None
    return config


def _family(config: Mapping[str, Any], folder: Path) -> _Family:
    kind = config["model_type"]
    if kind not in _FAMILIES:
        raise ValueError(f"{folder}: model_type={kind!r} is not one of {', '.join(sorted(_FAMILIES))}.")
    return _META if kind == "llama" and "dim" in config else _FAMILIES[kind]


def _classifier_config(config: Mapping[str, Any], family: _Family, classes: int, pool: str) -> dict[str, Any]:
    labels = {str(i): f"LABEL_{i}" for i in range(classes)}
    if len(config.get("id2label", {})) == classes:
        labels = config["id2label"]
    named = {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
    # Hugging Face's classifiers pool the first token; a mean-pooled one is ours alone.
    return {**config, **named, **({"architectures": [family.classifier]} if pool == "cls" else {"pool": pool})}


def _refuse(config: Mapping[str, Any], **legal: Any) -> None:
    """Refuse settings that the modules do not have; an absent one is the legal one."""
    for name, value in legal.items():
        if config.get(name, value) != value:
            kind = config["model_type"]
            raise ValueError(f"config.json: {name}={config[name]!r} of {kind!r} is not supported, only {value!r} is.")


def _dense(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(f"{source}.weight", f"{target}/kernel", "dense"), Rule(f"{source}.bias", f"{target}/bias")


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    # The last two are the names of checkpoints that came from TensorFlow.
    return (
        Rule(f"{source}.weight", f"{target}/scale"),
        Rule(f"{source}.bias", f"{target}/bias"),
        Rule(f"{source}.gamma", f"{target}/scale"),
        Rule(f"{source}.beta", f"{target}/bias"),
    )


def _ignored(*sources: str) -> tuple[Rule, ...]:
    return tuple(Rule(source, None) for source in sources)


def _bert(config: Mapping[str, Any]) -> tuple[type[Bert], dict[str, Any]]:
    _refuse(config, position_embedding_type="absolute", is_decoder=False)
    offset = config["pad_token_id"] + 1 if config["model_type"] == "roberta" else 0
    return Bert, {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"],
        "max_positions": config["max_position_embeddings"] - offset,
        "position_offset": offset,
        "type_vocab_size": config["type_vocab_size"],
        "embedding_size": config.get("embedding_size"),
        "layer_norm_eps": config["layer_norm_eps"],
        "activation": config["hidden_act"],
        "dropout": config.get("hidden_dropout_prob", 0.1),
        "attention_dropout": config.get("attention_probs_dropout_prob", 0.1),
    }


def _bert_rules(prefix: str, config: Mapping[str, Any]) -> tuple[Rule, ...]:
    source, target = f"{prefix}encoder.layer.{{layer}}", "layer_{layer}"
    return (
        Rule(f"{prefix}embeddings.word_embeddings.weight", "embeddings/word/embedding"),
        Rule(f"{prefix}embeddings.position_embeddings.weight", "embeddings/position/embedding"),
        Rule(f"{prefix}embeddings.token_type_embeddings.weight", "embeddings/token_type/embedding"),
        *_norm(f"{prefix}embeddings.LayerNorm", "embeddings/norm"),
        *_dense(f"{prefix}embeddings_project", "embeddings/projection"),
        *_dense(f"{source}.attention.self.query", f"{target}/attention/query"),
        *_dense(f"{source}.attention.self.key", f"{target}/attention/key"),
        *_dense(f"{source}.attention.self.value", f"{target}/attention/value"),
        *_dense(f"{source}.attention.output.dense", f"{target}/attention/output"),
        *_norm(f"{source}.attention.output.LayerNorm", f"{target}/attention/norm"),
        *_dense(f"{source}.intermediate.dense", f"{target}/mlp/up"),
        *_dense(f"{source}.output.dense", f"{target}/mlp/down"),
        *_norm(f"{source}.output.LayerNorm", f"{target}/mlp/norm"),
        *_ignored(
            f"{prefix}embeddings.position_ids",
            f"{prefix}embeddings.token_type_ids",
            f"{prefix}pooler.dense.weight",
            f"{prefix}pooler.dense.bias",
            "classifier.{part}",
            "classifier.dense.{part}",
            "classifier.out_proj.{part}",
            "cls.predictions.bias",
            "cls.predictions.decoder.{part}",
            "cls.predictions.transform.dense.{part}",
            "cls.predictions.transform.LayerNorm.{part}",
            "cls.seq_relationship.{part}",
            "lm_head.bias",
            "lm_head.dense.{part}",
            "lm_head.decoder.{part}",
            "lm_head.layer_norm.{part}",
            "discriminator_predictions.dense.{part}",
            "discriminator_predictions.dense_prediction.{part}",
            "generator_predictions.dense.{part}",
            "generator_predictions.LayerNorm.{part}",
            "generator_lm_head.{part}",
        ),
    )


def _opt(config: Mapping[str, Any]) -> tuple[type[Decoder], dict[str, Any]]:
    _refuse(
        config,
        do_layer_norm_before=True,
        word_embed_proj_dim=config["hidden_size"],
        activation_function="relu",
        enable_bias=True,
        layer_norm_elementwise_affine=True,
        _remove_final_layer_norm=False,
    )
    return Decoder, {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "intermediate_size": config["ffn_dim"],
        "max_positions": config["max_position_embeddings"],
        "position_offset": 2,
        "norm": "layer",
        "mlp": "relu",
        "positions": "learned",
        "use_bias": True,
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "dropout": config.get("dropout", 0.1),
        "attention_dropout": config.get("attention_dropout", 0.0),
    }


def _opt_rules(prefix: str, config: Mapping[str, Any]) -> tuple[Rule, ...]:
    base = f"{prefix}decoder"
    source, target = f"{base}.layers.{{layer}}", "layer_{layer}"
    return (
        Rule(f"{base}.embed_tokens.weight", "embeddings/word/embedding"),
        Rule(f"{base}.embed_positions.weight", "embeddings/position/embedding"),
        *_dense(f"{source}.self_attn.q_proj", f"{target}/attention/query"),
        *_dense(f"{source}.self_attn.k_proj", f"{target}/attention/key"),
        *_dense(f"{source}.self_attn.v_proj", f"{target}/attention/value"),
        *_dense(f"{source}.self_attn.out_proj", f"{target}/attention/output"),
        *_norm(f"{source}.self_attn_layer_norm", f"{target}/attention/norm"),
        *_dense(f"{source}.fc1", f"{target}/mlp/up"),
        *_dense(f"{source}.fc2", f"{target}/mlp/down"),
        *_norm(f"{source}.final_layer_norm", f"{target}/mlp/norm"),
        *_norm(f"{base}.final_layer_norm", "norm"),
        *_output(config.get("tie_word_embeddings", True), "lm_head"),
    )


def _output(tied: bool, source: str) -> tuple[Rule, ...]:
    """The output layer; a tied one may be stored again."""
    return _ignored(f"{source}.weight") if tied else (Rule(f"{source}.weight", "head/kernel", "dense"),)


def _llama(config: Mapping[str, Any]) -> tuple[type[Decoder], dict[str, Any]]:
    _refuse(
        config,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        head_dim=config["hidden_size"] // config["num_attention_heads"],
    )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"config.json: scaled rotary positions ({rope}) are not supported; only the default type is.")
    return Decoder, {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads"),
        "intermediate_size": config["intermediate_size"],
        "max_positions": config["max_position_embeddings"],
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "attention_dropout": config.get("attention_dropout", 0.0),
    }


def _llama_rules(prefix: str, config: Mapping[str, Any]) -> tuple[Rule, ...]:
    source = f"{prefix}layers.{{layer}}"
    names = {
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/output": "self_attn.o_proj",
        "mlp/gate": "mlp.gate_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/down": "mlp.down_proj",
    }
    return (
        Rule(f"{prefix}embed_tokens.weight", "embeddings/word/embedding"),
        *(rule for ours, theirs in names.items() for rule in _dense(f"{source}.{theirs}", f"layer_{{layer}}/{ours}")),
        Rule(f"{source}.input_layernorm.weight", "layer_{layer}/attention/norm/scale"),
        Rule(f"{source}.post_attention_layernorm.weight", "layer_{layer}/mlp/norm/scale"),
        Rule(f"{prefix}norm.weight", "norm/scale"),
        *_output(config.get("tie_word_embeddings", False), "lm_head"),
        *_ignored(f"{source}.self_attn.rotary_emb.inv_freq"),
    )


def _meta(config: Mapping[str, Any]) -> tuple[type[Decoder], dict[str, Any]]:
    return Decoder, {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["dim"],
        "num_layers": config["n_layers"],
        "num_heads": config["n_heads"],
        "num_kv_heads": config["n_kv_heads"],
        "intermediate_size": config["hidden_dim"],
        "max_positions": config["max_seq_len"],
        "rope_style": "interleaved",
        "rope_theta": config["rope_theta"],
        "norm_eps": config["norm_eps"],
        "tie_embeddings": config["tied_embeddings"],
    }


def _meta_rules(prefix: str, config: Mapping[str, Any]) -> tuple[Rule, ...]:
    source = "layers.{layer}"
    names = {
        "attention/query": "attention.wq",
        "attention/key": "attention.wk",
        "attention/value": "attention.wv",
        "attention/output": "attention.wo",
        "mlp/gate": "feed_forward.w1",
        "mlp/down": "feed_forward.w2",
        "mlp/up": "feed_forward.w3",
    }
    return (
        Rule("tok_embeddings.weight", "embeddings/word/embedding"),
        *(rule for ours, theirs in names.items() for rule in _dense(f"{source}.{theirs}", f"layer_{{layer}}/{ours}")),
        Rule(f"{source}.attention_norm.weight", "layer_{layer}/attention/norm/scale"),
        Rule(f"{source}.ffn_norm.weight", "layer_{layer}/mlp/norm/scale"),
        Rule("norm.weight", "norm/scale"),
        *_output(config["tied_embeddings"], "output"),
        *_ignored("rope.freqs"),
    )


_BERT = _Family(_bert, _bert_rules, "bert.", "classifier", "{prefix}pooler.dense", "BertForSequenceClassification")
_FAMILIES = {
    "bert": _BERT,
    "roberta": _Family(
        _bert, _bert_rules, "roberta.", "classifier.out_proj", "classifier.dense", "RobertaForSequenceClassification"
    ),
    "electra": _Family(
        _bert, _bert_rules, "electra.", "classifier.out_proj", "classifier.dense", "ElectraForSequenceClassification"
    ),
    "opt": _Family(_opt, _opt_rules, "model."),
    "llama": _Family(_llama, _llama_rules, "model."),
}
# Llama in Meta's own names, as the small models of llama2.c come.
_META = _Family(_meta, _meta_rules, "model.")
