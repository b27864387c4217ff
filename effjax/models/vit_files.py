"""Vision transformers from folders of Hugging Face and of timm, and back into them."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from effjax.core.errors import check_choice, check_number
from effjax.core.files import first_line, read_json
from effjax.core.folders import model_folder
from effjax.core.tree import leaves_at, path_name, with_leaves
from effjax.models.convert import export_weights, find_weights, import_weights, read_unwrapped, write_tensors
from effjax.models.family_parts import check_types
from effjax.models.pretrained import Pretrained
from effjax.models.vit import ViT
from effjax.models.vit_layouts import (
    PREFIXES,
    huggingface_config,
    huggingface_model,
    huggingface_rules,
    joined_projections,
    saved_prefix,
    split_projections,
    timm_config,
    timm_model,
    timm_rules,
)

__all__ = ["load_vit", "save_vit"]

PyTree = Any
_log = logging.getLogger("effjax")
_HEADS = ("head", "distillation_head")


def load_vit(
    source: str | os.PathLike[str],
    *,
    classes: int | None = None,
    key: jax.Array | None = None,
    param_dtype: DTypeLike = jnp.float32,
    **fields: Any,
) -> Pretrained:
    """A pretrained ViT or DeiT from a folder of Hugging Face or of timm, told apart by its ``config.json``.

    Hugging Face: ``model_type`` vit or deit, with a classifier, two of them (DeiT's teacher), or none. timm:
    ``architecture`` of ``named_vit``, with the ``model_args`` that change its sizes; pooled by the class token or the
    mean. ``model.safetensors`` or its shards.

    Args:
      source: a folder, or one inside ``EFFJAX_MODELS``.
      classes: outputs of the head; None as in the folder. A head of another size, or one that the folder lacks, is
        drawn at random, logged, and listed in ``initialised``.
      key: for a head drawn at random; by default ``jax.random.key(0)``.
      param_dtype: dtype of the parameters.
      **fields: further fields of ``ViT`` that leave its parameters as they are, apart from the layers' stacking:
        ``positions``, ``patch_kernel``, ``dtype``, ``scan_layers``, ``remat``, ``dropout``.

    Returns:
      A ``Pretrained``; its ``module`` is a ``ViT``.

    Raises:
      FileNotFoundError: the folder, or a file of it, is not there.
      ValueError: a damaged or foreign file by its name, an architecture that is not supported, or tensors missing,
        unexpected or of other shapes, all listed.

    Example:
      >>> import tempfile
      >>> model = ViT(classes=3, patch=4, grid=(2, 2), hidden_size=8, num_layers=1, num_heads=2)
      >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_vit(folder, model, params, layout="timm")
      ...     load_vit(folder).module.grid
      (2, 2)
    """
    folder = model_folder(source, holds="model.safetensors*")
    config = _read_config(folder / "config.json")
    path = find_weights(folder)
    tensors = read_unwrapped(path)
    timm = "architecture" in config
    module, channels = (timm_model if timm else huggingface_model)(folder / "config.json", config, tensors)
    if classes is not None:
        check_number("classes", classes, low=1, integer=True)
        module = module.clone(classes=classes)
    try:
        module = module.clone(**fields)
        target = _shapes(module, channels)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{folder / 'config.json'} describes no model that can be built: {first_line(error)}"
        ) from error
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, param_dtype), target)
    if timm:
        tensors, rules = split_projections(path, tensors), timm_rules(module)
    else:
        prefix = PREFIXES[config["model_type"]]
        rules = huggingface_rules(module, prefix if any(name.startswith(prefix) for name in tensors) else "")
    heads = {rule.source: rule.target for rule in rules if rule.target and rule.target.split("/")[0] in _HEADS}
    tensors = _without_other_heads(path, module, heads, tensors)
    optional = [target for target in heads.values() if target] if classes is not None else []
    params = import_weights(tensors, target, rules, origin=str(path), optional=optional)
    absent = tuple(
        path_name(where)
        for where, leaf in jax.tree_util.tree_leaves_with_path(params)
        if isinstance(leaf, jax.ShapeDtypeStruct)
    )
    if absent:
        _log.warning("%s has no %s: drawn at random.", path, ", ".join(absent))
        key = jax.random.key(0) if key is None else key
        drawn = jax.jit(lambda key: leaves_at(module.init(key, _images(module, channels))["params"], absent))(key)
        params = with_leaves(params, {name: leaf.astype(param_dtype) for name, leaf in drawn.items()})
    return Pretrained(module, params, config, rules, folder, absent)


def save_vit(
    folder: str | os.PathLike[str],
    model: ViT,
    params: PyTree,
    *,
    layout: str = "huggingface",
    dtype: DTypeLike | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a vision transformer as a folder that Hugging Face's or timm's loaders read: the inverse of ``load_vit``.

    Args:
      folder: made if it is not there; gets ``config.json`` and ``model.safetensors``, each whole or not at all.
      model: the module. What only effjax has (``positions``, ``patch_kernel``, ``token_multiple``) is not written: the
        table of positions is, in full.
      params: its parameters.
      layout: ``"huggingface"`` or ``"timm"``.
      dtype: of the floating tensors in the file; None keeps the parameters'.
      config: further entries of ``config.json``, such as ``id2label``.

    Raises:
      ValueError: a model that the layout has no place for (mean pooling in Hugging Face's; in timm's another epsilon or
        activation, or a distillation token without its head), or parameters of another model.
    """
    check_choice("layout", layout, ("huggingface", "timm"))
    table = leaves_at(params, ("patch_kernel",)).get("patch_kernel")
    if table is None or np.ndim(table) != 4:
        raise ValueError("params must hold patch_kernel [patch, patch, channels, hidden]: give variables['params'].")
    channels = int(np.shape(table)[2])
    described = (timm_config if layout == "timm" else huggingface_config)(model, channels)
    rules = timm_rules(model) if layout == "timm" else huggingface_rules(model, saved_prefix(model))
    wanted = {
        path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(_shapes(model, channels))
    }
    given = {path_name(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    if wrong := sorted(path for path in {*wanted, *given} if wanted.get(path) != given.get(path)):
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"params: {', '.join(wrong[:5])}{more} are not as in the model. Give all of its parameters.")
    tensors = export_weights(params, rules)
    tensors = joined_projections(tensors) if layout == "timm" else tensors
    if dtype is not None:
        tensors = {name: np.asarray(tensor, dtype) for name, tensor in tensors.items()}
    if layout == "huggingface":
        described["dtype"] = next(iter(tensors.values())).dtype.name
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".config.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps({**described, **(config or {})}, indent=2) + "\n")
    os.replace(temporary, folder / "config.json")
    write_tensors(folder / "model.safetensors", tensors)


def _images(module: ViT, channels: int) -> Any:
    return jnp.zeros((1, module.grid[0] * module.patch, module.grid[1] * module.patch, channels), jnp.float32)


def _shapes(module: ViT, channels: int) -> PyTree:
    """The shapes of the parameters, traced at the size of the table."""
    plain = module.clone(positions=None)
    return jax.eval_shape(lambda key: plain.init(key, _images(plain, channels)), jax.random.key(0))["params"]


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict) or not ({"model_type", "architecture"} & config.keys()):
        raise ValueError(f"{path} is no model's config.json: it lacks model_type and architecture. Fetch it again.")
    if "architecture" not in config:
        check_choice(f"{path}: model_type", config["model_type"], tuple(PREFIXES))
        check_types(path, config)
    return {name: value for name, value in config.items() if value is not None}  # null means the default


def _without_other_heads(
    path: Path, module: ViT, heads: Mapping[str, str | None], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors without heads for another number of classes, in whose place others are drawn."""
    kernels = [tensors[name] for name in heads if name in tensors and name.endswith(".weight")]
    others = {len(kernel) for kernel in kernels if kernel.ndim == 2} - {module.classes}
    if not others:
        return dict(tensors)
    _log.warning("%s holds a head for %d classes: a new one for %s is put in its place.", path, *others, module.classes)
    return {name: tensor for name, tensor in tensors.items() if name not in heads}
