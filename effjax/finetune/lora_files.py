"""Adapters as folders in the format of Hugging Face PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import collections
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from effjax.core.errors import near
from effjax.core.files import not_finite, read_json, read_safetensors
from effjax.core.tree import path_name
from effjax.finetune.lora import Lora, Scales, lora_scales, scale_of
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.finetune.lora_layout import is_kernel, is_table, matrix, out_first

__all__ = ["load_lora", "load_lora_modules", "save_lora"]

PyTree = Any
Names = Callable[[str, int | None], str | None] | Mapping[str, str | Sequence[str]]

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_WHOLE = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>weight|bias)")
_HEADED = ("SEQ_CLS", "TOKEN_CLS")  # tasks whose models have a new head, which PEFT expects in the folder
_LISTED = 5

# Fields of adapter_config.json that change what an adapter computes or what else a folder holds, with the values that
# ask for nothing.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The others (PiSSA, OLoRA, CorDA, LoftQ, ...) also replace the base's weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(
        (
            *("use_dora", "fan_in_fan_out", "lora_bias", "trainable_token_indices"),
            *("target_parameters", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
            *("arrow_config", "kasa_config", "megatron_config", "velora_config", "monteclora_config"),
        ),
        (None, False, [], {}),
    ),
}


class _Place(NamedTuple):
    """The kernel that a module's adapter belongs to."""

    path: str
    layer: int | None


def save_lora(
    folder: str | os.PathLike[str],
    lora: Lora,
    config: LoraConfig | Scales,
    names: Names,
    *,
    base_model: str = "",
    task_type: str | None = None,
    modules: PyTree | None = None,
) -> None:
    """Write adapters as a folder that PEFT, and what reads its format, loads onto the base model.

    Stacked adapters are written layer by layer. A folder that was there before is replaced; one whose writing was
    interrupted is refused by ``load_lora``.

    Args:
      folder: made if need be, but not its parents.
      lora: adapters of dense kernels and two-dimensional convolutions, stacked or not.
      config: the config that made them; or their scales (a number, or one per kernel path), such as 1 for a chain that
        was concatenated.
      names: kernel path -> name of the module in the base model (``encoder.layer.0.attention.self.query``): a table,
        with one name per layer for a stack, or a function of the path and the layer (None where there is no stack),
        such as ``module_name`` of ``load_pretrained``'s result.
      base_model: where PEFT finds the base model: a name on the hub or a folder.
      task_type: as in PEFT, such as ``"SEQ_CLS"`` or ``"CAUSAL_LM"``.
      modules: dense layers that were trained whole, as a subtree of the parameters: ``{"head": params["head"]}``. They
        become PEFT's ``modules_to_save``; ``load_lora_modules`` reads them. A classifier's adapters need its head.

    Raises:
      FileNotFoundError: the folder's parent does not exist.
      ValueError: a kernel without a name, a name used twice, an adapter of another kind of kernel, or the adapters of a
        classifier without ``modules``.

    Example:
      >>> import tempfile
      >>> params = {"query": {"kernel": jnp.ones((16, 8))}}
      >>> from effjax.finetune.lora import lora_init
      >>> config = LoraConfig(LoraRule("query/kernel", rank=4))
      >>> lora, names = lora_init(jax.random.key(0), params, config), {"query/kernel": "self.query"}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_lora(folder, lora, config, names)
      ...     again, _ = load_lora(folder, params, names)
      >>> bool((again["query/kernel"]["a"] == lora["query/kernel"]["a"]).all())
      True
    """
    from safetensors.numpy import save

    folder = Path(folder)
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"folder={str(folder)!r}: {folder.parent} does not exist. Create it first.")
    if task_type in _HEADED and not modules:
        raise ValueError(
            f"task_type={task_type!r} without modules: the classifier's trained head would be lost, and PEFT would put "
            "a random one in its place. Give it: modules={'head': params['head']}."
        )
    tensors: dict[str, np.ndarray] = _whole_tensors(modules or {}, names)
    saved = _saved_names(tensors)
    sizes: dict[str, tuple[int, float]] = {}
    rooted = isinstance(config, LoraConfig) and config.rslora
    scales = lora_scales(lora, config) if isinstance(config, LoraConfig) else config
    for path, adapter in lora.items():
        rank, scale = adapter["a"].shape[-1], float(scale_of(scales, path))
        alpha = float(f"{scale * (rank**0.5 if rooted else rank):.12g}")  # 16, not 16.000000000000004
        for module, a, b in _modules(path, adapter, names):
            if module in sizes:
                raise ValueError(f"names: two kernels are named {module!r}, one of them {path!r}. Each needs its own.")
            sizes[module] = rank, int(alpha) if alpha == int(alpha) else alpha
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
    dropout = config.dropout if isinstance(config, LoraConfig) else 0.0
    fields = _config_fields(sizes, rooted, dropout, base_model, task_type) | {"modules_to_save": saved or None}
    folder.mkdir(exist_ok=True)
    # Without its config a folder is no adapter, so old tensors never meet a new config or the other way round.
    (folder / _CONFIG).unlink(missing_ok=True)
    _replace(folder / _TENSORS, lambda path: path.write_bytes(save(tensors, metadata={"format": "pt"})))
    _replace(folder / _CONFIG, lambda path: path.write_text(json.dumps(fields, indent=2) + "\n"))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _whole_tensors(modules: PyTree, names: Names) -> dict[str, np.ndarray]:
    """Dense layers in PyTorch's names and layout."""
    leaves = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(modules)}
    tensors = {}
    for path, leaf in leaves.items():
        layer, _, part = path.rpartition("/")
        kernel = f"{layer}/kernel".lstrip("/")
        if part not in ("kernel", "bias") or kernel not in leaves or leaves[kernel].ndim != 2:
            raise ValueError(
                f"modules: {path} of shape {leaf.shape} is no part of a dense layer; only those are saved."
            )
        module = _name(names, kernel, None)
        if module is None:
            raise ValueError(f"names: {kernel!r} of modules has no name. Add it to the table.")
        name = f"base_model.model.{module}.{'weight' if part == 'kernel' else 'bias'}"
        tensors[name] = np.ascontiguousarray(leaf.T if part == "kernel" else leaf)
    return tensors


def _saved_names(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """PEFT's names of modules that are saved whole: of the parts of a classifier its own."""
    found = (match["module"] for name in tensors if (match := _WHOLE.fullmatch(name)))
    return list(dict.fromkeys(re.sub(r"^(classifier|score)\..*", r"\1", module) for module in found))


def _modules(path: str, adapter: Mapping[str, Any], names: Names) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Module name, lora_A and lora_B in PyTorch's layout, for every layer of one adapter."""
    a, b = np.asarray(adapter["a"]), np.asarray(adapter["b"])
    if is_table(path):
        raise ValueError(
            f"lora: {path} is a table of embeddings, whose adapter PEFT keeps under other names. Save the others, or "
            "lora_merge(params, lora, scales) and save_pretrained the whole model."
        )
    window, lead = a.ndim - b.ndim, b.ndim - 2
    if window not in (0, 2) or lead > 1:
        raise ValueError(
            f"lora: {path} has a {a.shape} and b {b.shape}, but only adapters of dense kernels and two-dimensional "
            "convolutions, with at most one stacked axis, have a place in a PEFT folder."
        )
    layers = range(b.shape[0]) if lead else [None]
    found = []
    for layer in layers:
        module = _name(names, path, layer)
        if module is None:
            raise ValueError(f"names: {path!r} has no name{_at(layer)}. Add it to the table.")
        own_a, own_b = (a, b) if layer is None else (a[layer], b[layer])
        # HWIO -> OIHW; the second factor is then a 1x1 convolution.
        own_a, own_b = np.moveaxis(own_a, (-1, -2), (0, 1)), own_b.T.reshape(*own_b.T.shape, *[1] * window)
        # safetensors writes the buffer as it lies in memory, whatever the strides say.
        found.append((module, np.ascontiguousarray(own_a), np.ascontiguousarray(own_b)))
    return found


def _name(names: Names, path: str, layer: int | None) -> str | None:
    if callable(names):
        return names(path, layer)
    entry = names.get(path)
    if entry is None or isinstance(entry, str) != (layer is None):
        return None
    if isinstance(entry, str):
        return entry
    return entry[layer] if layer is not None and layer < len(entry) else None


def _at(layer: int | None) -> str:
    return "" if layer is None else f" for layer {layer}"


def _config_fields(
    sizes: Mapping[str, tuple[int, float]], rslora: bool, dropout: float, base_model: str, task_type: str | None
) -> dict[str, Any]:
    rank, alpha = collections.Counter(sizes.values()).most_common(1)[0][0]
    # PEFT searches these keys as regular expressions at the end of a module's name; "^" keeps others out.
    exact = lambda module: f"^{re.escape(module)}"
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "target_modules": sorted(sizes),
        "rank_pattern": {exact(module): r for module, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {exact(module): value for module, (_, value) in sizes.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
    }


def load_lora(
    folder: str | os.PathLike[str], params: PyTree, names: Names, *, dtype: DTypeLike = jnp.float32
) -> tuple[Lora, LoraConfig]:
    """Read a PEFT folder as adapters of a model.

    Args:
      folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
      params: the base's parameters (arrays or ``jax.ShapeDtypeStruct``), the tree that the adapters are for.
      names: as for ``save_lora``. Kernels without a name (None, or a ``ValueError`` of the function) take no adapter.
      dtype: of the adapters.

    Returns:
      The adapters, and a config of which ``lora_scales(lora, config)`` gives their scales. Modules that the folder
      holds whole, such as a classifier's head, are read by ``load_lora_modules``; a warning names them.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: damaged files; tensors of integers, NaN or infinity; an adapter of another model; settings that this
        library has not; pickled weights.

    Example:
      See ``save_lora``.
    """
    folder = Path(folder)
    fields = _read_config(folder)
    factors, whole = _read_tensors(folder / _TENSORS, fields.get("modules_to_save") or ())
    if whole:
        warnings.warn(
            f"folder={str(folder)!r} also holds {', '.join(whole)}, trained whole. Put it into the parameters: "
            "params = load_lora_modules(folder, params, names).",
            stacklevel=2,
        )
    places, shapes = _places(params, names)
    strangers = sorted(set(factors) - set(places))
    if strangers:
        raise ValueError(
            f"folder={str(folder)!r} is an adapter of another model (of {fields.get('base_model_name_or_path')!r}): "
            f"{len(strangers)} of its {len(factors)} modules are not in this one, e.g. "
            f"{', '.join(map(repr, strangers[:_LISTED]))}.{near(strangers[0], places)} "
            "If only a prefix differs, let names add it."
        )
    found: dict[str, dict[int | None, tuple[np.ndarray, np.ndarray]]] = collections.defaultdict(dict)
    alphas: dict[str, set[float]] = collections.defaultdict(set)
    for module, pair in factors.items():
        path, layer = places[module]
        rank = _pattern_value(fields, "rank_pattern", "r", module)
        _check_shapes(folder, module, pair, shapes[path], layer, rank, out_first(path))
        found[path][layer] = pair
        alphas[path].add(float(_pattern_value(fields, "alpha_pattern", "lora_alpha", module)))
    lora, rules = {}, []
    for path, layers in found.items():
        a, b = _stack(folder, path, layers, shapes[path], alphas[path])
        lora[path] = {"a": jnp.asarray(a, dtype), "b": jnp.asarray(b, dtype)}
        rules.append((a.shape[-1], alphas[path].pop(), path))
    return lora, LoraConfig(
        _rules(rules),
        dropout=float(fields.get("lora_dropout") or 0.0),
        rslora=bool(fields.get("use_rslora")),
        dtype=dtype,
    )


def load_lora_modules(folder: str | os.PathLike[str], params: PyTree, names: Names) -> PyTree:
    """Parameters with the dense layers that a PEFT folder holds whole, such as a classifier's head.

    Args:
      folder: as for ``load_lora``.
      params: nested dictionaries, the tree that the adapters are for.
      names: as for ``save_lora``.

    Returns:
      A tree like ``params``; other leaves are the same objects.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: as for ``load_lora``; the folder holds no such layer, or one that this model has not, or in another
        shape.

    Example:
      >>> import tempfile
      >>> from effjax.finetune.lora import lora_init
      >>> params = {"query": {"kernel": jnp.ones((16, 8))}, "head": {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(2)}}
      >>> config = LoraConfig(LoraRule("query/kernel", rank=4))
      >>> names = {"query/kernel": "self.query", "head/kernel": "classifier"}
      >>> lora = lora_init(jax.random.key(0), params, config)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_lora(folder, lora, config, names, task_type="SEQ_CLS", modules={"head": params["head"]})
      ...     fresh = {**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}
      ...     again = load_lora_modules(folder, fresh, names)
      >>> again["head"]["bias"].tolist()
      [1.0, 1.0]
    """
    folder = Path(folder)
    fields = _read_config(folder)
    _, whole = _read_tensors(folder / _TENSORS, fields.get("modules_to_save") or ())
    if not whole:
        raise ValueError(f"folder={str(folder)!r} holds adapters alone: modules_to_save of its config is empty.")
    places, _ = _places(params, names)
    if strangers := sorted(set(whole) - set(places)):
        raise ValueError(
            f"folder={str(folder)!r} holds {strangers[0]!r} whole, which this model has not."
            f"{near(strangers[0], places)} Build the model with that layer, and let names name it."
        )
    found: dict[str, np.ndarray] = {}
    for module, parts in whole.items():
        layer = places[module].path.rpartition("/")[0]
        for part, tensor in parts.items():
            path = f"{layer}/{'kernel' if part == 'weight' else 'bias'}".lstrip("/")
            found[path] = tensor.T if part == "weight" else tensor

    def replaced(key: Sequence[Any], leaf: Any) -> Any:
        path = path_name(key)
        if path not in found:
            return leaf
        tensor = found.pop(path)
        if tensor.shape != np.shape(leaf):
            raise ValueError(
                f"folder={str(folder)!r}: {path} has shape {tensor.shape} in our layout, but the model has "
                f"{np.shape(leaf)}. Build it with the classes of the folder."
            )
        return jnp.asarray(tensor, jnp.result_type(leaf))

    filled = jax.tree_util.tree_map_with_path(replaced, params)
    if found:
        raise ValueError(f"folder={str(folder)!r} holds {', '.join(found)}, which this model has not.")
    return filled


def _rules(targets: Sequence[tuple[int, float, str]]) -> list[LoraRule]:
    groups: dict[tuple[int, float], list[str]] = collections.defaultdict(list)
    for rank, alpha, path in targets:
        groups[rank, alpha].append(re.escape(path))
    return [LoraRule(f"^({'|'.join(paths)})$", rank, alpha) for (rank, alpha), paths in groups.items()]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no {_CONFIG}: it is no PEFT folder, or its writing was interrupted."
        )
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, not the fields of an adapter. Fetch it again.")
    _check_types(path, fields)
    refused = [
        f"{name}={fields[name]!r:.60}"
        for name, legal in _SUPPORTED.items()
        if not _among(fields.get(name, legal[0]), legal)
    ]
    if refused:
        raise ValueError(
            f"{path}: {', '.join(refused)} cannot be loaded here: only plain LoRA on weights can. In PEFT, merge this "
            "adapter into the base (merge_and_unload) and load the result as a model."
        )
    return fields


def _among(value: Any, legal: Sequence[Any]) -> bool:
    """Whether a value is one of some, of the same type: 0 is not False here."""
    return any(type(value) is type(other) and value == other for other in legal)


def _check_types(path: Path, fields: Mapping[str, Any]) -> None:
    whole = lambda value: isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
    real = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    texts = lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)
    table = lambda value, legal: isinstance(value, Mapping) and all(map(legal, value.values()))
    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        "r": (whole, "an integer from 1 on"),
        "lora_alpha": (lambda value: real(value) and value > 0, "a number above 0"),
        "lora_dropout": (lambda value: real(value) and 0 <= value < 1, "a number from 0 on, below 1"),
        "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
        "rank_pattern": (lambda value: table(value, whole), "an object of integers from 1 on"),
        "alpha_pattern": (
            lambda value: table(value, lambda one: real(one) and one > 0),
            "an object of numbers above 0",
        ),
        "modules_to_save": (texts, "a list of names"),
    }
    for name, (legal, expected) in kinds.items():
        if fields.get(name) is not None and not legal(fields[name]):
            raise ValueError(f"{path}: {name}={fields[name]!r:.60} must be {expected}. Fetch the file again.")


_Factors = dict[str, tuple[np.ndarray, np.ndarray]]
_Whole = dict[str, dict[str, np.ndarray]]


def _read_tensors(path: Path, saved: Sequence[str]) -> tuple[_Factors, _Whole]:
    """Module name -> (lora_A, lora_B), and of the modules saved whole -> their tensors by ``weight`` and ``bias``."""
    if not path.is_file():
        if path.with_name("adapter_model.bin").exists():
            raise ValueError(
                f"{path.parent} holds adapter_model.bin, a pickle, which may run any code when it is read. Save it "
                "with PEFT's save_pretrained(safe_serialization=True)."
            )
        raise FileNotFoundError(f"{path} does not exist. Fetch the whole adapter folder.")
    tensors = read_safetensors(path)
    factors: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    whole: _Whole = collections.defaultdict(dict)
    foreign = []
    for name, tensor in tensors.items():
        plain = name.replace("._orig_mod", "")
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or not_finite(tensor):
            what = "NaN or infinity" if jnp.issubdtype(tensor.dtype, jnp.floating) else f"{tensor.dtype}, not floats"
            raise ValueError(f"{path}: the tensor {name!r} holds {what}. Fetch it again, or train the adapter again.")
        if match := _TENSOR.fullmatch(plain):
            factors[match["module"]][match["factor"]] = tensor
        elif (match := _WHOLE.fullmatch(plain)) and _is_saved(match["module"], saved):
            whole[match["module"]][match["part"]] = tensor
        else:
            foreign.append(name)
    if saved and not whole:
        raise ValueError(
            f"{path} holds none of {list(saved)}, which modules_to_save of {_CONFIG} names: what was trained beside "
            "the adapters is lost. Save it again with PEFT's save_pretrained."
        )
    halves = [module for module, pair in factors.items() if len(pair) < 2]
    if foreign or halves or not factors:
        raise ValueError(
            f"{path} is no plain LoRA adapter: {len(foreign)} tensors are not named "
            f"base_model.model.<module>.lora_A.weight or lora_B.weight {foreign[:_LISTED]}, and {len(halves)} modules "
            f"have one of the two only {halves[:_LISTED]}."
        )
    return {module: (pair["A"], pair["B"]) for module, pair in factors.items()}, dict(whole)


def _is_saved(module: str, saved: Sequence[str]) -> bool:
    """PEFT's rule: a module whose name ends with one of the names, or lies inside such a one."""
    return any(re.search(rf"(^|\.){re.escape(name)}(\.|$)", module) for name in saved)


def _places(params: PyTree, names: Names) -> tuple[dict[str, _Place], dict[str, tuple[int, ...]]]:
    """Module name -> kernel (and layer), and the kernels' shapes."""
    leaves = [(path_name(path), np.shape(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    shapes = {path: shape for path, shape in leaves if is_kernel(path, shape) and not is_table(path)}
    places = {}
    for path, shape in shapes.items():
        several = not callable(names) and isinstance(names.get(path), str)  # axes of one layer, not a stack
        for layer in range(shape[0]) if len(shape) in (3, 5) and not several else [None]:
            try:
                module = _name(names, path, layer)
            except ValueError:
                module = None
            if module is not None:
                places[module] = _Place(path, layer)
    return places, shapes


def _pattern_value(fields: Mapping[str, Any], pattern: str, default: str, module: str) -> Any:
    """PEFT's rule: the first key that, as a regular expression, ends the module's name."""
    for key, value in (fields.get(pattern) or {}).items():
        try:
            found = re.match(rf"(.*\.)?({key})$", module)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{_CONFIG}: the key {key!r} of {pattern} is no regular expression: {error}.") from None
        if found:
            return value
    return 8 if fields.get(default) is None else fields[default]  # PEFT's default of both


def _check_shapes(
    folder: Path,
    module: str,
    pair: tuple[np.ndarray, np.ndarray],
    kernel: tuple[int, ...],
    layer: int | None,
    rank: int,
    turned: bool,
) -> None:
    *window, fan_in, fan_out = kernel if layer is None else kernel[1:]
    fan_in, fan_out = (fan_out, fan_in) if turned else (fan_in, fan_out)
    sides = matrix("kernel", kernel, pair[1].shape[::-1]) if layer is None and pair[1].ndim == 2 else None
    if sides and len(kernel) > 2:  # several axes of inputs or outputs
        window, (_, fan_in, fan_out) = [], sides
    want = (rank, fan_in, *window), (fan_out, rank, *[1] * len(window))
    if (pair[0].shape, pair[1].shape) != want:
        raise ValueError(
            f"folder={str(folder)!r}: {module} has lora_A {pair[0].shape} and lora_B {pair[1].shape}, but this model "
            f"and the config's rank {rank} want {want[0]} and {want[1]}. It is an adapter of a model of another size."
        )


def _stack(
    folder: Path,
    path: str,
    layers: Mapping[int | None, tuple[np.ndarray, np.ndarray]],
    shape: tuple[int, ...],
    alphas: set[float],
) -> tuple[np.ndarray, np.ndarray]:
    turned = {layer: _flax_layout(*pair) for layer, pair in layers.items()}
    if None in turned:
        return turned[None]
    if len(turned) < shape[0] or len(alphas) > 1 or len({a.shape for a, _ in turned.values()}) > 1:
        raise ValueError(
            f"folder={str(folder)!r} adapts {len(turned)} of the {shape[0]} layers of {path}, or not all of them with "
            "one rank and alpha, which a stack of layers cannot hold. Load it into the model with scan_layers=False."
        )
    a, b = (np.stack([turned[layer][factor] for layer in range(shape[0])]) for factor in (0, 1))
    return a, b


def _flax_layout(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.moveaxis(a, (0, 1), (-1, -2)), b.reshape(b.shape[:2]).T
