"""What a folder of Hugging Face PEFT says: the settings of ``adapter_config.json``, and its tensors by module."""

import collections
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.core.files import not_finite, read_json, read_safetensors

__all__: list[str] = []

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_LISTED = 5
# Names as PEFT saves them, and as a state dict saved by hand has them: with the adapter's name, without the wrapper's.
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_WHOLE = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.modules_to_save\.(?P<adapter>[^.]+)(?P<rest>\..+)?)?\.(?P<part>weight|bias)"
)

# Fields of adapter_config.json that change what an adapter computes or what else a folder holds, with the values that
# ask for nothing.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The others (PiSSA, OLoRA, CorDA, LoftQ, ...) also replace the base's weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(
        (
            *("use_dora", "lora_bias", "trainable_token_indices"),
            *("target_parameters", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
            *("arrow_config", "kasa_config", "megatron_config", "velora_config", "monteclora_config"),
        ),
        (None, False, [], {}),
    ),
}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no {CONFIG}: it is no PEFT folder, or its writing was interrupted."
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


Factors = dict[str, tuple[np.ndarray, np.ndarray]]
Whole = dict[str, dict[str, np.ndarray]]


def read_adapter(path: Path, saved: Sequence[str]) -> tuple[Factors, Whole]:
    """Module name -> (lora_A, lora_B), and of the modules saved whole -> their tensors by ``weight`` and ``bias``."""
    if not path.is_file():
        if path.with_name("adapter_model.bin").exists():
            raise ValueError(
                f"{path.parent} holds adapter_model.bin, a pickle, which may run any code when it is read. Save it "
                "with PEFT's save_pretrained(safe_serialization=True)."
            )
        raise FileNotFoundError(f"{path} does not exist. Fetch the whole adapter folder.")
    factors: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    whole: Whole = collections.defaultdict(dict)
    adapters: set[str | None] = set()
    foreign = []
    for name, tensor in read_safetensors(path).items():
        plain = name.replace("._orig_mod", "")
        if ".original_module." in plain:  # what PEFT keeps of a module before it was trained
            continue
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or not_finite(tensor):
            what = "NaN or infinity" if jnp.issubdtype(tensor.dtype, jnp.floating) else f"{tensor.dtype}, not floats"
            raise ValueError(f"{path}: the tensor {name!r} holds {what}. Fetch it again, or train the adapter again.")
        if match := _TENSOR.fullmatch(plain):
            adapters.add(match["adapter"])
            factors[match["module"]][match["factor"]] = tensor
        elif (match := _WHOLE.fullmatch(plain)) and (match["adapter"] or _is_saved(match["module"], saved)):
            adapters.update({match["adapter"]} - {None})
            whole[match["module"] + (match["rest"] or "")][match["part"]] = tensor
        else:
            foreign.append(name)
    if (len(adapters) > 1 and None not in adapters) or len(adapters - {None}) > 1:
        raise ValueError(
            f"{path} holds several adapters, {sorted(filter(None, adapters))}. Save one: PEFT's "
            "save_pretrained(folder, selected_adapters=[...])."
        )
    if saved and not whole:
        raise ValueError(
            f"{path} holds none of {list(saved)}, which modules_to_save of {CONFIG} names: what was trained beside "
            "the adapters is lost. Save it again with PEFT's save_pretrained."
        )
    halves = [module for module, pair in factors.items() if len(pair) < 2]
    if foreign or halves or not factors:
        raise ValueError(
            f"{path} is no plain LoRA adapter: {len(foreign)} tensors are not named "
            f"base_model.model.<module>.lora_A.weight or lora_B.weight {foreign[:_LISTED]}, and {len(halves)} modules "
            f"have one of the two only {halves[:_LISTED]}. Save it with PEFT's save_pretrained; of a whole state dict "
            "keep the tensors with lora_ in their names."
        )
    return {module: (pair["A"], pair["B"]) for module, pair in factors.items()}, dict(whole)


def _is_saved(module: str, saved: Sequence[str]) -> bool:
    """PEFT's rule: a module whose name ends with one of the names, or lies inside such a one."""
    return any(re.search(rf"(^|\.){re.escape(name)}(\.|$)", module) for name in saved)


def pattern_value(fields: Mapping[str, Any], pattern: str, default: str, module: str) -> Any:
    """PEFT's rule: the first key that, as a regular expression, ends the module's name."""
    for key, value in (fields.get(pattern) or {}).items():
        try:
            found = re.match(rf"(.*\.)?({key})$", module)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{CONFIG}: the key {key!r} of {pattern} is no regular expression: {error}.") from None
        if found:
            return value
    return 8 if fields.get(default) is None else fields[default]  # PEFT's default of both
