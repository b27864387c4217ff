"""What a folder of a pretrained transformer says: its family, its settings and tensors, and what they lack."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effjax.core.errors import check_number
from effjax.core.files import read_json
from effjax.models.decoder_families import META
from effjax.models.families import FAMILIES
from effjax.models.family_parts import Family, check_types, settings

__all__: list[str] = []

_log = logging.getLogger("effjax")
PRUNED = "pruned_"
"""Before the ``model_type`` of a pruned model, so that no other program takes it for a whole one."""


def read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path} is no model's config.json: it lacks model_type, a text. Fetch it again.")
    pruned = config["model_type"].startswith(PRUNED)
    if pruned != (config.get("pruned_layers") is not None):
        raise ValueError(
            f"{path}: model_type={config['model_type']!r} and pruned_layers belong together: a pruned model has both. "
            "Write the folder again."
        )
    config["model_type"] = config["model_type"].removeprefix(PRUNED)
    check_types(path, config)
    return config


def family_of(config: Mapping[str, Any], folder: Path) -> Family:
    kind = config["model_type"]
    if kind not in FAMILIES:
        raise ValueError(f"{folder}: model_type={kind!r} is not one of {', '.join(sorted(FAMILIES))}.")
    return META if kind == "llama" and "dim" in config else FAMILIES[kind]


def depth(config: Mapping[str, Any]) -> int:
    known = settings(FAMILIES[config["model_type"]], config)
    return next((known[name] for name in ("num_hidden_layers", "n_layers", "n_layer") if name in known), 0)


def classifier_config(config: Mapping[str, Any], family: Family, classes: int, pool: str) -> dict[str, Any]:
    labels = {str(i): f"LABEL_{i}" for i in range(classes)}
    if (config.get("id2label") or {}).keys() == labels.keys():
        labels = config["id2label"]
    named = {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
    # Hugging Face's classifiers pool the first token; a mean-pooled one is ours alone.
    return {**config, **named, **({"architectures": [family.classifier]} if pool == "cls" else {"pool": pool})}


def unwrapped(path: Path, family: Family, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without the prefix of a module around the model, told by the place of the table of embeddings."""
    if any(f"{prefix}{family.table}" in tensors for prefix in ("", family.prefix)):
        return tensors
    tables = [name for name in tensors if name.endswith(f".{family.table}")]
    if len(tables) != 1:
        return tensors
    wrapper = tables[0].removesuffix(family.table).removesuffix(family.prefix)
    plain = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise ValueError(f"{path} holds one tensor with and without the prefix {wrapper!r}. Keep one of each.")
    return plain


def own_output(path: Path, config: dict[str, Any], family: Family, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The config, untied where the file holds an output layer that is no copy of the table of embeddings."""
    name = f"{family.output}.weight"
    if not family.output or name not in tensors or not settings(family, config).get(family.tied):
        return config
    table = next((tensors[key] for key in (f"{family.prefix}{family.table}", family.table) if key in tensors), None)
    if table is None or _equal(table, tensors[name]):
        return config
    if table.shape != tensors[name].shape:
        _log.warning(
            "%s holds a %s of shape %s, which cannot be the output of %s embeddings: it is passed over, as config.json "
            "says %s=true.",
            *(path, name, tensors[name].shape, table.shape, family.tied),
        )
        return config
    _log.warning(
        "%s holds a %s of its own, so it is not tied to the embeddings, although config.json says %s=true.",
        *(path, name, family.tied),
    )
    return {**config, family.tied: False}


def _equal(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two tables hold the same numbers, looked at a part at a time."""
    part = lambda table, first: table[first : first + 4096].astype(np.float32)
    return left.shape == right.shape and all(
        np.array_equal(part(left, first), part(right, first)) for first in range(0, len(left), 4096)
    )


def with_vocabulary(
    path: Path, config: dict[str, Any], family: Family, tensors: dict[str, np.ndarray], vocabulary: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the tensors with as many ids as asked for; new rows are the mean of the others."""
    if vocabulary is None:
        return config, tensors
    check_number("vocab_size", vocabulary, low=1, integer=True)
    held = settings(family, config).get("vocab_size", 0)
    if vocabulary < held:
        raise ValueError(
            f"vocab_size={vocabulary}: {path} has {held} ids, and none can be left out. Give {held} or more."
        )
    if vocabulary == held:
        return config, tensors
    endings = (family.table, f"{family.output}.weight") if family.output else family.table
    grown = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(endings) and tensor.ndim == 2 and len(tensor) == held:
            mean = tensor.astype(np.float32).mean(0, keepdims=True).astype(tensor.dtype)
            grown[name] = np.concatenate([tensor, np.repeat(mean, vocabulary - held, 0)])
    _log.warning("%s has %d ids: rows for %d more are the mean of the others.", path, held, vocabulary - held)
    return {**config, "vocab_size": int(vocabulary)}, grown


def without_other_head(
    path: Path, family: Family, classes: int, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors without a head for another number of classes, in whose place one is drawn."""
    kernel = tensors.get(f"{family.head}.weight")
    if kernel is None or kernel.ndim != 2 or len(kernel) == classes:
        return dict(tensors)
    _log.warning("%s holds a head for %d classes: a new one for %d is put in its place.", path, len(kernel), classes)
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] != family.head}


_SCALES = ("_scale", "_scale_inv", ".qweight", ".qzeros", ".absmax", ".quant_map", ".SCB")
"""The endings of what quantised weights come with."""


def advice(
    problems: Mapping[str, Sequence[str]],
    config: Mapping[str, Any],
    family: Family,
    tensors: Mapping[str, np.ndarray],
) -> str:
    """What to do about weights that are not those of the config."""
    missing, unexpected = ([name.partition(" -> ")[0] for name in problems[kind]] for kind in ("missing", "unexpected"))
    table = next((tensors[name] for name in (f"{family.prefix}{family.table}", family.table) if name in tensors), None)
    size = settings(family, config).get("vocab_size")
    if any(".lora_" in name for name in unexpected):
        return "It holds adapters: merge them in PEFT (merge_and_unload), or give the base here and them to load_lora."
    if any(name.endswith(_SCALES) for name in unexpected):
        return "It holds codes and scales of quantised weights. Dequantise the model, or fetch the one that is not."
    if table is not None and table.ndim == 2 and len(table) != size:
        return (
            f"Its table has {len(table)} rows, and config.json says vocab_size={size}: rows were added, or the config "
            f"is another model's. Set vocab_size to {len(table)} in config.json."
        )
    if missing == [f"{family.output}.weight"] and not problems["misfitting"]:
        return f"If its output layer is tied to the embeddings, set {family.tied} to true in config.json."
    if len(missing) > len(tensors) / 2:
        kind = config["model_type"]
        return f"Its tensors have other names than those of model_type={kind!r}: is config.json that of this model?"
    return "Its config.json and its weights are not of one model, or a part is lost: fetch both again."
