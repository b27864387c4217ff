"""Adapters as folders in the format of Hugging Face PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import collections
import json
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
from effjax.core.tree import leaves_at, path_name, with_leaves
from effjax.finetune.lora import Lora, Scales, lora_scales, only_adapters, scale_of
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.finetune.lora_layout import is_kernel, is_table, matrix, out_first
from effjax.finetune.peft_folder import CONFIG, TENSORS, Whole, pattern_value, read_adapter, read_adapter_config
from effjax.finetune.peft_names import (
    Names,
    Piece,
    at,
    name_of,
    part_of,
    saved_names,
    side_by_side,
    whole_leaves,
    whole_places,
    whole_tensors,
)

__all__ = ["load_lora", "load_lora_modules", "save_lora"]

PyTree = Any
_HEADED = ("SEQ_CLS", "TOKEN_CLS")  # tasks whose models have a new head, which PEFT expects in the folder
_LISTED = 5


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
        such as ``module_name`` of ``load_pretrained``'s result. ``h.0.attn.c_attn[2/3]`` is the last of three equal
        parts of a module's outputs; adapters of its parts become one, of the summed rank unless all share ``a``.
      base_model: where PEFT finds the base model: a name on the hub or a folder.
      task_type: as in PEFT, such as ``"SEQ_CLS"`` or ``"CAUSAL_LM"``.
      modules: what was trained whole beside those of ``LoraConfig(whole=...)``, as a subtree of the parameters:
        ``{"head": params["head"]}``; dense layers, norms and tables of embeddings. They become PEFT's
        ``modules_to_save``. A classifier's adapters need its head.

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
    whole = {path: entry["whole"] for path, entry in lora.items() if "whole" in entry}
    whole |= {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(modules or {})}
    if task_type in _HEADED and not whole:
        raise ValueError(
            f"task_type={task_type!r} without modules: the classifier's trained head would be lost, and PEFT would put "
            "a random one in its place. Give it: modules={'head': params['head']}."
        )
    tensors = whole_tensors(whole, names)
    saved = saved_names(tensors)
    sizes: dict[str, tuple[int, float]] = {}
    rooted = isinstance(config, LoraConfig) and config.rslora
    scales = lora_scales(lora, config) if isinstance(config, LoraConfig) else config
    for module, (count, parts) in _modules(only_adapters(lora), scales, names).items():
        a, b, scale = side_by_side(parts, count)
        window, rank = a.ndim - 2, a.shape[-1]
        alpha = float(f"{scale * (rank**0.5 if rooted else rank):.12g}")  # 16, not 16.000000000000004
        sizes[module] = rank, int(alpha) if alpha == int(alpha) else alpha
        # HWIO -> OIHW; the second factor is then a 1x1 convolution.
        own_a, own_b = np.moveaxis(a, (-1, -2), (0, 1)), b.T.reshape(*b.T.shape, *[1] * window)
        # safetensors writes the buffer as it lies in memory, whatever the strides say.
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(own_a)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(own_b)
    dropout = config.dropout if isinstance(config, LoraConfig) else 0.0
    fields = _config_fields(sizes, rooted, dropout, base_model, task_type) | {"modules_to_save": saved or None}
    folder.mkdir(exist_ok=True)
    # Without its config a folder is no adapter, so old tensors never meet a new config or the other way round.
    (folder / CONFIG).unlink(missing_ok=True)
    _replace(folder / TENSORS, lambda path: path.write_bytes(save(tensors, metadata={"format": "pt"})))
    _replace(folder / CONFIG, lambda path: path.write_text(json.dumps(fields, indent=2) + "\n"))


def _modules(lora: Lora, scales: Scales, names: Names) -> dict[str, tuple[int, dict[int, Piece]]]:
    """Module name -> the number of its parts, and the adapters of those that have one, layer by layer."""
    found: dict[str, tuple[int, dict[int, Piece]]] = {}
    for path, adapter in lora.items():
        for layer, piece in _layers(path, adapter, float(scale_of(scales, path))):
            name = name_of(names, path, layer)
            if name is None:
                raise ValueError(f"names: {path!r} has no name{at(layer)}. Add it to the table.")
            module, index, count = part_of(name)
            known, parts = found.setdefault(module, (count, {}))
            if index in parts or known != count:
                raise ValueError(f"names: two kernels are named {name!r}, one of them {path!r}. Each needs its own.")
            parts[index] = piece
    return found


def _layers(path: str, adapter: Mapping[str, Any], scale: float) -> list[tuple[int | None, Piece]]:
    """The adapter of every layer of a stack, or the one that there is."""
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
    if not lead:
        return [(None, Piece(a, b, scale))]
    return [(layer, Piece(a[layer], b[layer], scale)) for layer in range(len(b))]


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    folder: str | os.PathLike[str],
    params: PyTree,
    names: Names,
    *,
    dtype: DTypeLike = jnp.float32,
    whole: bool = False,
) -> tuple[Lora, LoraConfig]:
    """Read a PEFT folder as adapters of a model.

    A file that was saved by hand, whose names have the adapter's in them (``.default.``), is read too.

    Args:
      folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
      params: the base's parameters (arrays or ``jax.ShapeDtypeStruct``), the tree that the adapters are for.
      names: as for ``save_lora``. Kernels without a name (None, or a ``ValueError`` of the function) take no adapter.
      dtype: of the adapters.
      whole: take the modules that the folder holds whole (``modules_to_save``), such as a classifier's head, among
        the adapters, as parts that are trained whole (``LoraConfig(whole=...)``).

    Returns:
      The adapters, and a config of which ``lora_scales(lora, config)`` gives their scales. Without ``whole`` modules
      that the folder holds whole are read by ``load_lora_modules``; a warning names them.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: damaged files; tensors of integers, NaN or infinity; an adapter of another model; settings that this
        library has not; several adapters; pickled weights.

    Example:
      See ``save_lora``.
    """
    folder = Path(folder)
    fields = read_adapter_config(folder)
    factors, held = read_adapter(folder / TENSORS, fields.get("modules_to_save") or ())
    if held and not whole:
        warnings.warn(
            f"folder={str(folder)!r} also holds {', '.join(held)}, trained whole. Put it into the parameters: "
            "params = load_lora_modules(folder, params, names), or take it with load_lora(..., whole=True).",
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
        rank = pattern_value(fields, "rank_pattern", "r", module)
        alpha = float(pattern_value(fields, "alpha_pattern", "lora_alpha", module))
        for place in places[module]:
            _check_shapes(folder, module, pair, shapes[place.path], place, rank)
            width = len(pair[1]) // place.count
            found[place.path][place.layer] = pair[0], pair[1][place.index * width : (place.index + 1) * width]
            alphas[place.path].add(alpha)
    rooted = bool(fields.get("use_rslora"))
    lora, rules = {}, []
    shared = {
        place.path for module, (_, b) in factors.items() for place in places[module] if place.count > 1 and b.any()
    }
    for path, layers in found.items():
        a, b = _stack(folder, path, layers, shapes[path], alphas[path])
        alpha, rank = alphas[path].pop(), a.shape[-1]
        if path in shared:
            a, b = _own_terms(a, b)
            if not a.shape[-1]:
                continue
            alpha *= (a.shape[-1] / rank) ** (0.5 if rooted else 1.0)
        lora[path] = {"a": jnp.asarray(a, dtype), "b": jnp.asarray(b, dtype)}
        rules.append((a.shape[-1], alpha, path))
    parts = _whole_parts(folder, params, names, held) if whole else {}
    config = LoraConfig(
        _rules(rules),
        dropout=float(fields.get("lora_dropout") or 0.0),
        rslora=rooted,
        dtype=dtype,
        whole=[f"^{re.escape(path)}$" for path in parts],
    )
    return lora | {path: {"whole": jnp.asarray(leaf, dtype)} for path, leaf in parts.items()}, config


def _own_terms(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without the terms of a shared adapter whose ``b`` is zero for this part: those of the parts beside it."""
    used = np.any(b != 0, axis=tuple(axis for axis in range(b.ndim) if axis != b.ndim - 2))
    return a[..., used], b[..., used, :]


def load_lora_modules(folder: str | os.PathLike[str], params: PyTree, names: Names) -> PyTree:
    """Parameters with the modules that a PEFT folder holds whole, such as a classifier's head.

    Args:
      folder: as for ``load_lora``.
      params: nested dictionaries, the tree that the adapters are for.
      names: as for ``save_lora``.

    Returns:
      A tree like ``params``; other leaves are the same objects.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: as for ``load_lora``; the folder holds no such module, or one that this model has not, or in another
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
    _, held = read_adapter(folder / TENSORS, read_adapter_config(folder).get("modules_to_save") or ())
    if not held:
        raise ValueError(f"folder={str(folder)!r} holds adapters alone: modules_to_save of its config is empty.")
    return with_leaves(params, _whole_parts(folder, params, names, held))


def _whole_parts(folder: Path, params: PyTree, names: Names, held: Whole) -> dict[str, jax.Array]:
    """The leaves that a folder holds whole, by path, in the dtype of ``params``."""
    places = whole_places(params, names)
    if strangers := sorted(set(held) - set(places)):
        raise ValueError(
            f"folder={str(folder)!r} holds {strangers[0]!r} whole, which this model has not."
            f"{near(strangers[0], places)} Build the model with that layer, and let names name it."
        )
    found, leaves = whole_leaves(held, places), {}
    own = leaves_at(params, found)
    if absent := sorted(set(found) - set(own)):
        raise ValueError(f"folder={str(folder)!r} holds {', '.join(absent)}, which this model has not.")
    for path, layers in found.items():
        shape = np.shape(own[path])
        if None not in layers and len(layers) < shape[0]:
            raise ValueError(
                f"folder={str(folder)!r} holds {len(layers)} of the {shape[0]} layers of {path} whole, which a stack "
                "of layers cannot hold. Load it into the model with scan_layers=False."
            )
        tensor = layers[None] if None in layers else np.stack([layers[layer] for layer in range(shape[0])])
        if tensor.shape != shape:
            raise ValueError(
                f"folder={str(folder)!r}: {path} has shape {tensor.shape} in our layout, but the model has {shape}. "
                "Build it with the classes, or the vocab_size, of the folder."
            )
        leaves[path] = jnp.asarray(tensor, jnp.result_type(own[path]))
    return leaves


class _Place(NamedTuple):
    """The kernel that a module's adapter, or a part of its outputs, belongs to."""

    path: str
    layer: int | None
    index: int
    count: int


def _places(params: PyTree, names: Names) -> tuple[dict[str, list[_Place]], dict[str, tuple[int, ...]]]:
    """Module name -> kernels (and layers), and the kernels' shapes."""
    leaves = [(path_name(path), np.shape(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    shapes = {path: shape for path, shape in leaves if is_kernel(path, shape) and not is_table(path)}
    places: dict[str, list[_Place]] = collections.defaultdict(list)
    for path, shape in shapes.items():
        several = not callable(names) and isinstance(names.get(path), str)  # axes of one layer, not a stack
        for layer in range(shape[0]) if len(shape) in (3, 5) and not several else [None]:
            try:
                name = name_of(names, path, layer)
            except ValueError:
                name = None
            if name is not None:
                module, index, count = part_of(name)
                places[module].append(_Place(path, layer, index, count))
    return dict(places), shapes


def _check_shapes(
    folder: Path,
    module: str,
    pair: tuple[np.ndarray, np.ndarray],
    kernel: tuple[int, ...],
    place: _Place,
    rank: int,
) -> None:
    *window, fan_in, fan_out = kernel if place.layer is None else kernel[1:]
    fan_in, fan_out = (fan_out, fan_in) if out_first(place.path) else (fan_in, fan_out)
    sides = matrix("kernel", kernel, pair[1].shape[::-1]) if place.layer is None and pair[1].ndim == 2 else None
    if sides and len(kernel) > 2:  # several axes of inputs or outputs
        window, (_, fan_in, fan_out) = [], sides
    want = (rank, fan_in, *window), (fan_out * place.count, rank, *[1] * len(window))
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


def _rules(targets: Sequence[tuple[int, float, str]]) -> list[LoraRule]:
    groups: dict[tuple[int, float], list[str]] = collections.defaultdict(list)
    for rank, alpha, path in targets:
        groups[rank, alpha].append(re.escape(path))
    return [LoraRule(f"^({'|'.join(paths)})$", rank, alpha) for (rank, alpha), paths in groups.items()]
