"""How Hugging Face and timm name the sizes and the tensors of a vision transformer: tables for ``vit_files``."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effjax.core.errors import check_choice, check_number
from effjax.models.convert import Rule
from effjax.models.family_parts import dense
from effjax.models.vit import SIZES, ViT, named_vit

__all__: list[str] = []

PREFIXES = {"vit": "vit.", "deit": "deit."}


def _sides(path: Path, name: str, value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in pair):
        raise ValueError(f"{path}: {name}={value!r:.60} must be a number of pixels, or two. Fetch the file again.")
    return pair


def _square_patch(path: Path, name: str, value: Any) -> int:
    pair = _sides(path, name, value)
    if pair[0] != pair[1]:
        raise ValueError(f"{path}: {name}={value!r}: patches that are no squares are not supported.")
    return pair[0]


def _grid(path: Path, image: tuple[int, int], patch: int) -> tuple[int, int]:
    if image[0] % patch or image[1] % patch:
        raise ValueError(f"{path}: images of {image} pixels do not divide into patches of {patch}. Fetch it again.")
    return image[0] // patch, image[1] // patch


# Hugging Face


def huggingface_model(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[ViT, int]:
    for name, legal in (("qkv_bias", True), ("use_mask_token", False)):
        if config.get(name, legal) != legal:
            raise ValueError(f"{path}: {name}={config[name]!r} is not supported, only {legal} is.")
    # The defaults of Hugging Face's configuration classes.
    get = lambda name, default: config.get(name, default)
    patch = _square_patch(path, "patch_size", get("patch_size", 16))
    layers = get("num_hidden_layers", 12)
    if layers > len(tensors):  # before they are traced one by one
        raise ValueError(f"{path} says {layers} layers, but the weights are {len(tensors)} tensors. Fetch it again.")
    deit = config["model_type"] == "deit"
    two = "cls_classifier.weight" in tensors
    head = tensors.get("cls_classifier.weight" if two else "classifier.weight")
    module = ViT(
        classes=None if head is None or head.ndim != 2 else len(head),
        patch=patch,
        grid=_grid(path, _sides(path, "image_size", get("image_size", 224)), patch),
        hidden_size=get("hidden_size", 768),
        num_layers=layers,
        num_heads=get("num_attention_heads", 12),
        intermediate_size=get("intermediate_size", 3072),
        pool="distilled" if two else "cls",
        distillation_token=deit,
        layer_norm_eps=get("layer_norm_eps", 1e-12),
        activation=get("hidden_act", "gelu"),
        dropout=get("hidden_dropout_prob", 0.0),
        attention_dropout=get("attention_probs_dropout_prob", 0.0),
    )
    return module, check_number(f"{path}: num_channels", get("num_channels", 3), low=1, integer=True)


def saved_prefix(model: ViT) -> str:
    return "" if model.classes is None else PREFIXES["deit" if model.distillation_token else "vit"]


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")


def _stacked(module: ViT, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    if not module.scan_layers:
        return rules
    return tuple(
        rule._replace(target=rule.target.replace("layer_{layer}/", "layers/")) if rule.target else rule
        for rule in rules
    )


def huggingface_rules(module: ViT, prefix: str) -> tuple[Rule, ...]:
    source, target = f"{prefix}encoder.layer.{{layer}}", "layer_{layer}"
    two = module.pool == "distilled"
    heads = (
        *dense("cls_classifier" if two else "classifier", "head"),
        *(dense("distillation_classifier", "distillation_head") if two else ()),
    )
    ignored = tuple(Rule(f"{prefix}{name}", None) for name in ("pooler.dense.weight", "pooler.dense.bias"))
    rules = (
        Rule(f"{prefix}embeddings.cls_token", "class_token"),
        Rule(f"{prefix}embeddings.distillation_token", "distillation_token"),
        Rule(f"{prefix}embeddings.position_embeddings", "position"),
        Rule(f"{prefix}embeddings.patch_embeddings.projection.weight", "patch_kernel", "conv"),
        Rule(f"{prefix}embeddings.patch_embeddings.projection.bias", "patch_bias"),
        *_norm(f"{source}.layernorm_before", f"{target}/attention/norm"),
        *dense(f"{source}.attention.attention.query", f"{target}/attention/query"),
        *dense(f"{source}.attention.attention.key", f"{target}/attention/key"),
        *dense(f"{source}.attention.attention.value", f"{target}/attention/value"),
        *dense(f"{source}.attention.output.dense", f"{target}/attention/output"),
        *_norm(f"{source}.layernorm_after", f"{target}/mlp/norm"),
        *dense(f"{source}.intermediate.dense", f"{target}/mlp/up"),
        *dense(f"{source}.output.dense", f"{target}/mlp/down"),
        *_norm(f"{prefix}layernorm", "norm"),
        *(heads if module.classes is not None else ()),
        *ignored,
    )
    return _stacked(module, rules)


def huggingface_config(model: ViT, channels: int) -> dict[str, Any]:
    if model.pool == "mean" or not model.class_token:
        raise ValueError(f"pool={model.pool!r} has no place in Hugging Face's ViT. Save it with layout='timm'.")
    family = "DeiT" if model.distillation_token else "ViT"
    kind = "Model" if model.classes is None else "ForImageClassification"
    labels = {} if model.classes is None else {str(i): f"LABEL_{i}" for i in range(model.classes)}
    size = [side * model.patch for side in model.grid]
    return {
        "architectures": [family + kind + ("WithTeacher" if model.pool == "distilled" else "")],
        "model_type": family.lower(),
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.intermediate_size or 4 * model.hidden_size,
        "hidden_act": model.activation,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "layer_norm_eps": model.layer_norm_eps,
        "image_size": size[0] if size[0] == size[1] else size,
        "patch_size": model.patch,
        "num_channels": channels,
        "qkv_bias": True,
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
    }


# timm

_TIMM_SIZES = {"embed_dim": "hidden_size", "depth": "num_layers", "num_heads": "num_heads"}
_TIMM_RATES = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
_TIMM_ARGS = ("num_classes", "in_chans", "global_pool", "img_size", "patch_size", "mlp_ratio", "class_token")


def timm_model(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[ViT, int]:
    args = dict(config.get("model_args") or {})
    if unknown := sorted(args.keys() - {*_TIMM_SIZES, *_TIMM_RATES, *_TIMM_ARGS}):
        raise ValueError(f"{path}: model_args {', '.join(unknown)} are not supported.")
    try:
        module = named_vit(str(config["architecture"]).partition(".")[0])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, field in _TIMM_SIZES.items():
        if name in args:
            module = module.clone(**{field: check_number(f"{path}: {name}", args[name], low=1, integer=True)})
    ratio = check_number(f"{path}: mlp_ratio", args.get("mlp_ratio", 4.0), low=0, open_low=True)
    patch = _square_patch(path, "patch_size", args.get("patch_size", module.patch))
    image = _sides(path, "img_size", args.get("img_size", [side * module.patch for side in module.grid]))
    pool = args.get("global_pool", config.get("global_pool", "token"))
    check_choice(f"{path}: global_pool", pool, ("token", "avg"))
    classes = args.get("num_classes", config.get("num_classes", 1000))
    module = module.clone(
        classes=check_number(f"{path}: num_classes", classes, low=0, integer=True) or None,
        patch=patch,
        grid=_grid(path, image, patch),
        intermediate_size=int(module.hidden_size * ratio),
        pool="mean" if pool == "avg" else module.pool,
        class_token=args.get("class_token", True),
    )
    if module.num_layers > len(tensors):
        raise ValueError(f"{path} says {module.num_layers} layers, but holds {len(tensors)} tensors. Fetch it again.")
    return module, check_number(f"{path}: in_chans", args.get("in_chans", 3), low=1, integer=True)


def timm_rules(module: ViT) -> tuple[Rule, ...]:
    source, target = "blocks.{layer}", "layer_{layer}"
    heads = (
        *dense("head", "head"),
        *(dense("head_dist", "distillation_head") if module.pool == "distilled" else ()),
    )
    rules = (
        Rule("cls_token", "class_token"),
        Rule("dist_token", "distillation_token"),
        Rule("pos_embed", "position"),
        Rule("patch_embed.proj.weight", "patch_kernel", "conv"),
        Rule("patch_embed.proj.bias", "patch_bias"),
        *_norm(f"{source}.norm1", f"{target}/attention/norm"),
        *(rule for part in _PARTS for rule in dense(f"{source}.attn.qkv.{part}", f"{target}/attention/{part}")),
        *dense(f"{source}.attn.proj", f"{target}/attention/output"),
        *_norm(f"{source}.norm2", f"{target}/mlp/norm"),
        *dense(f"{source}.mlp.fc1", f"{target}/mlp/up"),
        *dense(f"{source}.mlp.fc2", f"{target}/mlp/down"),
        *_norm("fc_norm" if module.pool == "mean" else "norm", "norm"),
        *(heads if module.classes is not None else ()),
    )
    return _stacked(module, rules)


_PARTS = ("query", "key", "value")


def split_projections(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """timm's joint projections as three, under ``qkv.query`` and so on."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        stem, joint, end = name.partition(".qkv.")
        if not joint:
            found[name] = tensor
            continue
        if tensor.ndim == 0 or len(tensor) % 3:
            raise ValueError(f"{path}: {name} of shape {tensor.shape} must hold three equal parts. Fetch it again.")
        found |= {f"{stem}.qkv.{part}.{end}": one for part, one in zip(_PARTS, np.split(tensor, 3), strict=True)}
    return found


def joined_projections(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        stem, joint, rest = name.partition(".qkv.")
        if not joint:
            found[name] = tensor
        elif rest.startswith("query."):
            end = rest.removeprefix("query.")
            found[f"{stem}.qkv.{end}"] = np.concatenate([tensors[f"{stem}.qkv.{part}.{end}"] for part in _PARTS])
    return found


def timm_config(model: ViT, channels: int) -> dict[str, Any]:
    wrong = {"layer_norm_eps": 1e-6, "activation": "gelu"}
    for name, legal in wrong.items():
        if getattr(model, name) != legal:
            raise ValueError(f"{name}={getattr(model, name)!r} has no place in timm's folder, only {legal!r} has.")
    if model.distillation_token and model.pool != "distilled":
        raise ValueError(f"pool={model.pool!r} with a distillation token has no place in timm's. Use 'huggingface'.")
    intermediate = model.intermediate_size or 4 * model.hidden_size
    sizes = (model.hidden_size, model.num_layers, model.num_heads, intermediate)
    size = next((name for name, known in SIZES.items() if known == sizes), "base")
    distilled = model.pool == "distilled"
    size = size if not distilled or size in ("tiny", "small", "base") else "base"
    # A name that timm has; what differs from it stands in model_args.
    name = f"deit_{size}_distilled_patch16_224" if distilled else f"vit_{size}_patch{14 if size == 'huge' else 16}_224"
    pool = {"mean": "avg", "cls": "token", "distilled": "token"}[model.pool]
    pixels = [side * model.patch for side in model.grid]
    # timm takes the product's integer part; the quotient alone may fall just below it.
    ratio = intermediate / model.hidden_size
    ratio = ratio if int(model.hidden_size * ratio) == intermediate else math.nextafter(ratio, math.inf)
    args = {
        "num_classes": model.classes or 0,
        "in_chans": channels,
        "global_pool": pool,
        "img_size": pixels,
        "patch_size": model.patch,
        "embed_dim": model.hidden_size,
        "depth": model.num_layers,
        "num_heads": model.num_heads,
        "mlp_ratio": ratio,
    }
    args |= {} if model.class_token else {"class_token": False}
    return {
        "architecture": name,
        "num_classes": model.classes or 0,
        "num_features": model.hidden_size,
        "global_pool": pool,
        "model_args": args,
        "pretrained_cfg": {
            "num_classes": model.classes or 0,
            "input_size": [channels, *pixels],
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if distilled else "head",
        },
    }
