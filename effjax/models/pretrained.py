"""Pretrained transformers from Hugging Face folders, and back into them."""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from effjax.core.errors import check_choice, check_number, near
from effjax.core.files import first_line
from effjax.core.folders import model_folder
from effjax.core.partition import Rules
from effjax.core.together import together
from effjax.core.tree import path_name
from effjax.models.bert import Bert, BertClassifier
from effjax.models.convert import Rule, exported_in_turn, import_weights, module_name
from effjax.models.families import FAMILIES
from effjax.models.family_parts import Family, dense, settings
from effjax.models.mapped import Entry, MappedTensors, write_in_turn
from effjax.models.mesh_rules import Layout, mesh_shardings
from effjax.models.pretrained_folder import (
    PRUNED,
    advice,
    classifier_config,
    depth,
    family_of,
    own_output,
    read_config,
    unwrapped,
    with_vocabulary,
    without_other_head,
)
from effjax.models.pruned import check_layer_shapes, shape_of
from effjax.models.weight_files import find_weights, map_tensors, read_unwrapped

__all__ = ["Pretrained", "grow_vocabulary", "load_pretrained", "save_pretrained"]

PyTree = Any
_log = logging.getLogger("effjax")
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
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
          The name without ``.weight``; ``c_attn[0/3]`` for the first of three kernels that lie in one module there.

        Raises:
          ValueError: no such kernel, or ``layer`` is missing or superfluous.

        Example:
          >>> load_pretrained("stories260k", scan_layers=True).module_name("layers/attention/query/kernel", layer=3)
          'layers.3.attention.wq'
        """
        return module_name(path, self.rules, layer)

    def target_kernels(self, *names: str) -> str:
        r"""A pattern for ``LoraRule`` from names of the folder's modules, as ``target_modules`` of PEFT has them.

        Args:
          names: ends of modules' names, such as ``"q_proj"`` or ``"self_attn.q_proj"``; without any query and value, of
            GPT-2 query, key and value, as PEFT takes them.

        Returns:
          A regular expression on the kernels' paths.

        Raises:
          ValueError: a name that no module ends with.

        Example:
          >>> load_pretrained("stories260k").target_kernels("wq", "wo")
          '^(layer_\\d+/attention/query|layer_\\d+/attention/output)/kernel$'
        """
        modules: dict[str, list[str]] = {}
        for rule in self.rules:
            if rule.target is not None and rule.target.endswith("/kernel"):
                target = re.sub(r"\\{\w+\\}", r"\\d+", re.escape(rule.target.removesuffix("/kernel")))
                modules.setdefault(rule.source.removesuffix(".weight"), []).append(target.replace("\\-", "-"))
        found: list[str] = []
        for name in names or family_of(self.config, self.folder).targets:
            own = [paths for module, paths in modules.items() if f".{module}".endswith(f".{name}")]
            if not own:
                ends = sorted({module.rpartition(".")[2] for module in modules})
                raise ValueError(f"names: no module ends with {name!r}.{near(name, ends)} They end with {ends}.")
            found += [path for paths in own for path in paths]
        return f"^({'|'.join(dict.fromkeys(found))})/kernel$"


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
    mesh: Mesh | None = None,
    rules: Layout | Rules | None = None,
    **fields: Any,
) -> Pretrained:
    """A pretrained transformer from a folder in Hugging Face layout.

    Reads ``config.json`` (``model_type`` bert, roberta, electra, distilbert, opt, gpt2, llama, mistral, qwen2, qwen3,
    or one of them pruned, as ``slice_pretrained`` makes it) and ``model.safetensors`` or its shards. What the config
    leaves out has the default of Hugging Face's class. Tensor names may or may not begin with the base model's prefix,
    or with that of a module around the model; heads that the module lacks (masked-language-model heads, poolers) are
    passed over.

    Args:
      source: a folder, or a name: ``"minilm"`` (all-MiniLM-L6-v2 from ``effjax[minilm]``),
        ``"stories260k"`` (travels with the package), or a folder inside ``EFFJAX_MODELS``.
      classes: put a ``BertClassifier`` with that many outputs on an encoder. Its head is read where
        the folder has one of that size, else drawn at random, logged, and listed in ``initialised``.
      pool: of that classifier, ``"mean"`` or ``"cls"``.
      key: for layers drawn at random; by default ``jax.random.key(0)``.
      scan_layers: layers stacked on a leading axis and scanned.
      remat: recompute each layer in the backward pass.
      dtype: compute dtype.
      param_dtype: dtype of the parameters; bfloat16 halves a frozen base.
      mesh: of Auto axes, for a model that one device cannot hold: the parameters become global arrays, and each
        process reads from the files what its devices hold, of one leaf at a time (a table that ``vocab_size`` extends
        is made whole). All processes call this alike.
      rules: how the parameters lie on it, see ``effjax.train.shardings``; by default ``"fsdp"``.
      **fields: further fields of the module that leave its parameters as they are: ``dropout``,
        ``attention_dropout``; or ``vocab_size``, above that of the file, for tokens of one's own: the
        rows that are added are the mean of the others (``grow_vocabulary`` does it later).

    Returns:
      A ``Pretrained``.

    Raises:
      FileNotFoundError: the folder, or a file of it, is not there.
      ValueError: a damaged or foreign file by its name, an architecture that is not supported, tensors missing,
        unexpected or of other shapes, all listed, or an axis that does not divide. Where one process of several is
        refused all are.

    Example:
      >>> model = load_pretrained("stories260k", scan_layers=True)
      >>> model.params["layers"]["attention"]["query"]["kernel"].shape
      (5, 64, 64)
      >>> model.module.apply({"params": model.params}, jnp.array([[1, 403]])).shape
      (1, 2, 512)
    """
    if mesh is None and rules is not None:
        raise ValueError(f"rules={rules!r} without mesh. Give mesh=jax.make_mesh(...) too, or leave both out.")
    load = lambda: _load(
        source, classes, pool, key, scan_layers, fields, mesh, rules or "fsdp", param_dtype, remat=remat, dtype=dtype
    )
    return load() if mesh is None else together(load)


def _write_beside(folder: Path, origin: Path, config: Mapping[str, Any]) -> None:
    """All files of a model but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _BESIDE:
        if (origin / name).is_file() and not (folder / name).exists():
            shutil.copyfile(origin / name, folder / name)
    temporary = folder / f".config.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(temporary, folder / "config.json")


def _load(
    source: str | os.PathLike[str],
    classes: int | None,
    pool: str,
    key: jax.Array | None,
    scan_layers: bool,
    fields: dict[str, Any],
    mesh: Mesh | None,
    layout: Layout | Rules,
    param_dtype: DTypeLike,
    **more: Any,
) -> Pretrained:
    folder = model_folder(source, holds="model.safetensors*")
    config = read_config(folder / "config.json")
    family = family_of(config, folder)
    path = find_weights(folder)
    tensors = read_unwrapped(path) if mesh is None else map_tensors(path)
    maps = tensors.maps if isinstance(tensors, MappedTensors) else None
    tensors = unwrapped(path, family, tensors)
    config = own_output(path, config, family, tensors)
    config, tensors = with_vocabulary(path, config, family, tensors, fields.pop("vocab_size", None))
    prefix = family.prefix if any(name.startswith(family.prefix) for name in tensors) else ""
    module, rules = _build(family, config, prefix, folder, classes, pool, scan_layers, fields, **more)
    target = _shapes(module, folder / "config.json", config, len(tensors))
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, param_dtype), target)
    if classes:
        tensors = without_other_head(path, family, classes, tensors)
    heads = [path for path in _paths(target) if re.match("(head|pooler)/", path)] if classes else []
    places = None if mesh is None else mesh_shardings(target, layout, mesh)
    tensors = tensors if maps is None else MappedTensors(tensors, maps)
    way_out = lambda problems: advice(problems, config, family, tensors)
    params = import_weights(tensors, target, rules, origin=str(path), optional=heads, shardings=places, way_out=way_out)
    initialised = tuple(name for name, leaf in _paths(params).items() if isinstance(leaf, jax.ShapeDtypeStruct))
    if initialised:
        _log.warning("%s has no %s: drawn at random.", path, ", ".join(initialised))
        params = _draw(module, params, jax.random.key(0) if key is None else key)
        params = params if places is None else jax.device_put(params, places)
    if classes or family.output:  # a file with a head names its base model, as Hugging Face's classes want it
        _, rules = _build(family, config, family.prefix, folder, classes, pool, scan_layers, fields)
    if classes:
        config = classifier_config(config, family, classes, pool)
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
    not use is carried over from there. Parameters on a mesh are gathered one tensor at a time; in several processes
    all of them call this, and process 0 writes.

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
    carried = _carried(pretrained)
    entries = [Entry(name, x.shape, x.dtype, lambda x=x: x) for name, x in carried.items()]
    entries += exported_in_turn(params, pretrained.rules)
    # Hugging Face loads in the dtype that the configuration names, whatever the file holds.
    named = {key: jax.tree.leaves(params)[0].dtype if dtype is None else dtype for key in ("dtype", "torch_dtype")}
    config = {key: jnp.dtype(named[key]).name if key in named else value for key, value in pretrained.config.items()}
    if config.get("pruned_layers"):
        config["model_type"] = f"{PRUNED}{config['model_type']}"
    folder = Path(folder)
    if jax.process_index() == 0:
        _write_beside(folder, pretrained.folder, config)
    write_in_turn(folder / "model.safetensors", entries, dtype)


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
    known = settings(family, config)
    try:
        kind, sizes = family.build(known)
        rules = family.rules(prefix, known)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks {error} of model_type={config['model_type']!r}.") from None
    if scan_layers:
        rules = tuple(
            rule._replace(target=rule.target.replace("layer_{layer}/", "layers/")) if rule.target else rule
            for rule in rules
        )
    shapes = _layer_shapes(config, folder, scan_layers)
    module: Any = kind(**{**sizes, **fields, **shapes, "scan_layers": scan_layers, **more})
    if classes is None:
        return module, rules
    check_number("classes", classes, low=1, integer=True)
    check_choice("pool", pool, ("mean", "cls"))
    if not family.head:
        raise ValueError(f"classes={classes}: {folder} holds a {config['model_type']!r} decoder; encoders classify.")
    rules = tuple(rule._replace(target=f"encoder/{rule.target}") if rule.target else rule for rule in rules)
    pooler = family.pooler.format(prefix=prefix)
    heads = (*dense(family.head, "head"), *(dense(pooler, "pooler") if pool == "cls" else ()))
    return BertClassifier(module, classes, pool=pool, pool_activation=family.pool_activation), (*heads, *rules)


def _layer_shapes(config: Mapping[str, Any], folder: Path, scan_layers: bool) -> dict[str, Any]:
    """The module's field ``layer_shapes``, of a pruned model."""
    found = config.get("pruned_layers")
    if found is None:
        return {}
    if scan_layers:
        raise ValueError(
            f"scan_layers=True needs layers of one shape, but {folder} holds a pruned model. Leave it False."
        )
    try:
        shapes = tuple(shape_of(entry) for entry in found)
        check_layer_shapes(shapes, depth(config))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder / 'config.json'}: pruned_layers: {first_line(error)} Write the folder again."
        ) from None
    return {"layer_shapes": shapes}


def _shapes(module: nn.Module, path: Path, config: Mapping[str, Any], tensors: int) -> PyTree:
    """The shapes of the module's parameters; sizes that cannot be are laid to the file that says them."""
    layers = depth(config)
    if layers > tensors:  # before they are traced one by one
        raise ValueError(f"{path} says {layers} layers, but the weights are {tensors} tensors. Fetch the file again.")
    try:
        return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))["params"]
    except (ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"{path} describes no model that can be built: {first_line(error)}") from error


def grow_vocabulary(pretrained: Pretrained, vocab_size: int, params: PyTree | None = None) -> Pretrained:
    """A model with rows for more tokens, of which each is the mean of the others.

    Args:
      pretrained: of ``load_pretrained``.
      vocab_size: rows of the new table, at least those of the old one.
      params: parameters in place of ``pretrained.params``: fine-tuned ones.

    Returns:
      A ``Pretrained``; parameters beside the table and an output layer of its own are the same objects.

    Raises:
      ValueError: fewer rows than there are.

    Example:
      >>> model = grow_vocabulary(load_pretrained("stories260k"), 520)
      >>> model.module.vocab_size, model.params["embeddings"]["word"]["embedding"].shape
      (520, (520, 64))

    Hewitt 2021, "Initializing new word embeddings for pretrained language models": of rows drawn at random one may have
    a probability of nearly 1.
    """
    body = pretrained.module.encoder if isinstance(pretrained.module, BertClassifier) else pretrained.module
    held = body.vocab_size
    check_number("vocab_size", vocab_size, low=held, integer=True, hint=f"The model has {held} ids; none can go.")
    axes = {_TABLE: 0} if isinstance(body, Bert) else {_TABLE: 0, "head/kernel": 1}

    def grown(key: Sequence[Any], leaf: jax.Array) -> jax.Array:
        axis = axes.get(path_name(key).removeprefix("encoder/"))
        if axis is None or vocab_size == held:
            return leaf
        mean = jnp.mean(leaf.astype(jnp.float32), axis, keepdims=True).astype(leaf.dtype)
        larger = jnp.concatenate([leaf, jnp.repeat(mean, vocab_size - held, axis)], axis)
        sharding = getattr(leaf, "sharding", None)
        return jax.device_put(larger, sharding) if isinstance(sharding, NamedSharding) else larger

    own = body.clone(vocab_size=vocab_size)
    module = pretrained.module.clone(encoder=own) if isinstance(pretrained.module, BertClassifier) else own
    params = jax.tree_util.tree_map_with_path(grown, pretrained.params if params is None else params)
    return pretrained._replace(module=module, params=params, config={**pretrained.config, "vocab_size": vocab_size})


_TABLE = "embeddings/word/embedding"


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
    path = find_weights(pretrained.folder)
    tensors = unwrapped(path, family_of(pretrained.config, pretrained.folder), read_unwrapped(path))
    return {name: tensor for name, tensor in tensors.items() if name in names}


def is_decoder(source: str | os.PathLike[str]) -> bool:
    """Whether a pretrained model, a name or a folder of ``model_folder``, predicts the next token.

    Example:
      >>> is_decoder("stories260k")
      True
    """
    folder = model_folder(source, holds="model.safetensors*")
    family = FAMILIES.get(read_config(folder / "config.json")["model_type"])
    return family is not None and bool(family.output)
