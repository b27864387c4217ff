"""Pretrained transformers from Hugging Face folders, and back into them."""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
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
from effjax.models.bert import BertClassifier
from effjax.models.convert import (
    Rule,
    export_weights,
    find_weights,
    import_weights,
    module_name,
    read_tensors,
    write_tensors,
)
from effjax.models.families import FAMILIES, META, Family, dense

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
    family: Family,
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
    module: Any = kind(**{**sizes, **fields, "scan_layers": scan_layers, **more})
    if classes is None:
        return module, rules
    check_number("classes", classes, low=1, integer=True)
    check_choice("pool", pool, ("mean", "cls"))
    if not family.head:
        raise ValueError(f"classes={classes}: {folder} holds a {config['model_type']!r} decoder; encoders classify.")
    activation = "gelu" if config["model_type"] == "electra" else "tanh"
    rules = tuple(rule._replace(target=f"encoder/{rule.target}") if rule.target else rule for rule in rules)
    pooler = family.pooler.format(prefix=prefix)
    heads = (*dense(family.head, "head"), *(dense(pooler, "pooler") if pool == "cls" else ()))
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


def _family(config: Mapping[str, Any], folder: Path) -> Family:
    kind = config["model_type"]
    if kind not in FAMILIES:
        raise ValueError(f"{folder}: model_type={kind!r} is not one of {', '.join(sorted(FAMILIES))}.")
    return META if kind == "llama" and "dim" in config else FAMILIES[kind]


def _classifier_config(config: Mapping[str, Any], family: Family, classes: int, pool: str) -> dict[str, Any]:
    labels = {str(i): f"LABEL_{i}" for i in range(classes)}
    if len(config.get("id2label", {})) == classes:
        labels = config["id2label"]
    named = {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
    # Hugging Face's classifiers pool the first token; a mean-pooled one is ours alone.
    return {**config, **named, **({"architectures": [family.classifier]} if pool == "cls" else {"pool": pool})}
