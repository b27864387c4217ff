"""Image classifiers by name: made, loaded from files of PyTorch, and given a new head."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.core.errors import check_choice, check_number
from effjax.models.cnn import CNN
from effjax.models.convert import Rule, find_weights, import_weights, read_unwrapped
from effjax.models.layers import EPSILONS
from effjax.models.mlp import MLP
from effjax.models.mobilenet import MOBILENETS, mobilenet
from effjax.models.mobilenet_weights import mobilenet_rules, tflite_rules, tflite_tensors
from effjax.models.resnet import RESNET_CIFAR10_RULES, RESNET_IMAGENET_RULES, RESNETS, SIZES, WIDE_RESNET_RULES, resnet

__all__ = ["fold_batch_norms", "image_model", "load_image_model", "new_head", "pretrained_mobilenet"]

PyTree = Any
Variables = Mapping[str, PyTree]

IMAGE_MODELS = ("mlp", "cnn", *RESNETS, *MOBILENETS)


def image_model(name: str, **fields: Any) -> nn.Module:
    """An image classifier by name.

    Args:
      name: ``"mlp"``, ``"cnn"``; for images of some 32 pixels ``"resnet20"``, ``"resnet32"``, ``"resnet44"``,
        ``"resnet56"``, ``"wrn_40_4"``, ``"wrn_28_10"``; for ImageNet ``"resnet18"``, ``"resnet50"``,
        ``"mobilenet_v1"``, ``"mobilenet_v2"``, ``"mobilenet_v3_small"``, ``"mobilenet_v3_large"``,
        ``"efficientnet_b0"``. With ``_cifar`` behind it, one of ImageNet's takes images of some 32 pixels: it ends
        at an eighth of the resolution, not at a thirty-second.
      **fields: ``classes``, ``dtype``, ``remat``, further fields of the module, and for MobileNets and
        EfficientNet ``width``, the factor of the channels, and ``strides``, one for each stage.

    Returns:
      A Linen module, called as ``module(images, train=False, capture=False)`` with floating images [batch, height,
      width, channels]; it returns logits [batch, classes].

    Raises:
      ValueError: unknown name; the message suggests the nearest.

    Example:
      >>> model = image_model("mobilenet_v2_cifar", width=0.25, classes=7)
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))[0].shape
      (1, 7)
    """
    check_choice("name", name, IMAGE_MODELS)
    plain: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "cnn": CNN}
    if name in plain:
        return plain[name](**fields)
    return resnet(name, **fields) if name in RESNETS else mobilenet(name, **fields)


def load_image_model(
    source: str | os.PathLike[str],
    name: str,
    *,
    layout: str = "torchvision",
    channels: int = 3,
    classes: int | None = None,
    key: jax.Array | None = None,
    **fields: Any,
) -> tuple[nn.Module, dict[str, PyTree]]:
    """An image classifier with weights that PyTorch saved as safetensors.

    ``safetensors.torch.save_file(model.state_dict(), path)`` writes such a file. The number of outputs is the file's.

    Args:
      source: a file, a folder, or a name in ``EFFJAX_MODELS``, as for ``load_weights``.
      name: as for ``image_model``, without ``"mlp"`` and ``"cnn"``.
      layout: whose names the tensors have: ``"torchvision"`` or ``"timm"``. ResNets of ImageNet have the same in
        both; those of CIFAR and the wide ones have the names of their usual PyTorch ports.
      channels: of the images.
      classes: put a new head with that many outputs in place of the file's, drawn at random; None keeps it.
      key: for that head; by default ``jax.random.key(0)``.
      **fields: as for ``image_model``. timm's MobileNetV3s need ``norm="batch"``, for the epsilon of their norms.

    Returns:
      The module, and its variables ``{"params", "batch_stats"}`` in float32.

    Raises:
      FileNotFoundError: nothing there; the message lists where it looked.
      ValueError: an unknown name or layout, or weights of another model: all that is missing, unexpected or of
        another shape.

    Example:
      >>> model, variables = load_image_model("resnet_cifar10/resnet20", "resnet20", classes=3)
      >>> variables["params"]["head"]["kernel"].shape
      (64, 3)
    """
    check_choice("name", name, (*RESNETS, *MOBILENETS))
    check_choice("layout", layout, ("torchvision", "timm"))
    path = find_weights(source)
    tensors = read_unwrapped(path)
    model: Any = image_model(name, **fields)
    rules = layout_rules(name, model, layout)
    outputs = next((rule.source for rule in rules if rule.target == "params/head/bias"), "")
    if outputs in tensors and tensors[outputs].ndim == 1:
        model = model.clone(classes=len(tensors[outputs]))
    variables = import_weights(tensors, _shapes(model, channels), rules, origin=str(path))
    return (model, variables) if classes is None else new_head(model, variables, classes, key=key)


def layout_rules(name: str, model: Any, layout: str = "torchvision") -> tuple[Rule, ...]:
    """The layout table between a model of ``image_model`` and the names of torchvision or timm.

    Args:
      name: the model's name.
      model: the module.
      layout: ``"torchvision"`` or ``"timm"``.

    Returns:
      ``effjax.models.convert.Rule``s.
    """
    if name in MOBILENETS:
        return mobilenet_rules(name.removesuffix("_cifar"), model, layout)
    if name.startswith("wrn"):
        return WIDE_RESNET_RULES
    return RESNET_CIFAR10_RULES if name in SIZES else RESNET_IMAGENET_RULES


def new_head(
    model: Any, variables: Variables, classes: int, *, key: jax.Array | None = None
) -> tuple[nn.Module, dict[str, PyTree]]:
    """A model whose last layer is drawn anew for other classes; all else is kept.

    Args:
      model: a module with the field ``classes`` and a last layer ``head``, as ``image_model`` makes them.
      variables: its variables.
      classes: outputs of the new head.
      key: for its kernel, drawn with the variance ``1 / inputs``; by default ``jax.random.key(0)``. The bias is 0.

    Returns:
      The module with ``classes`` outputs, and its variables.

    Raises:
      ValueError: variables without a head, or ``classes`` below 1.

    Example:
      >>> model = image_model("resnet20")
      >>> variables = {"params": {"head": {"kernel": jnp.ones((64, 10)), "bias": jnp.ones(10)}}}
      >>> model, variables = new_head(model, variables, 3)
      >>> model.classes, variables["params"]["head"]["kernel"].shape
      (3, (64, 3))
    """
    check_number("classes", classes, low=1, integer=True)
    head = variables["params"].get("head")
    if head is None or not hasattr(model, "classes"):
        raise ValueError(f"model={type(model).__name__} has no layer 'head', or no field 'classes', to replace.")
    kernel = head["kernel"]
    drawn = nn.initializers.lecun_normal()(
        jax.random.key(0) if key is None else key, (kernel.shape[0], classes), kernel.dtype
    )
    params = {**variables["params"], "head": {"kernel": drawn, "bias": jnp.zeros(classes, kernel.dtype)}}
    return model.clone(classes=classes), {**variables, "params": params}


def fold_batch_norms(model: Any, variables: Variables) -> tuple[nn.Module, dict[str, PyTree]]:
    """A trained network for inference, its batch norms multiplied into the convolutions before them.

    With ``a = scale / sqrt(var + epsilon)``: the kernel times a, and the bias ``bias - a * mean``.

    Args:
      model: a MobileNet, an EfficientNet or a ResNet of ``image_model``, with batch norms after its convolutions.
      variables: ``{"params", "batch_stats"}``.

    Returns:
      The module with ``norm="none"``, and its variables ``{"params"}``. Outputs in evaluation are the same.

    Raises:
      ValueError: other norms, a norm with no convolution before it, or a wide ResNet, which normalises first.

    Example:
      >>> from effjax.models.resnet import pretrained_resnet
      >>> model, variables = pretrained_resnet("resnet20")
      >>> folded = jax.eval_shape(lambda variables: fold_batch_norms(model, variables)[1], variables)
      >>> sorted(folded["params"]["stage1_block0"]["conv1"])
      ['bias', 'kernel']
    """
    norm = getattr(model, "norm", None)
    if norm not in EPSILONS or "batch_stats" not in variables:
        raise ValueError(
            f"model={type(model).__name__} with norm={norm!r} has no batch norms to fold; "
            f"its variables hold {', '.join(variables)}."
        )
    if getattr(model, "preactivation", False):
        raise ValueError(f"model={type(model).__name__} with preactivation=True normalises before it convolves.")
    return model.clone(norm="none"), {"params": _folded(variables["params"], variables["batch_stats"], EPSILONS[norm])}


def _folded(params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float, where: str = "") -> dict[str, PyTree]:
    norms = {name for name, tree in stats.items() if "mean" in tree}
    before = {_NORM_OF.get(name, f"{name}_norm"): name for name in params}
    if alone := sorted(norms - before.keys()):
        raise ValueError(f"variables: no convolution stands before {where}{alone[0]}, so it cannot be folded.")
    found = {}
    for name, tree in params.items():
        norm = _NORM_OF.get(name, f"{name}_norm")
        if norm in norms:
            factor = params[norm]["scale"] / jnp.sqrt(stats[norm]["var"] + epsilon)
            kernel = tree["kernel"] * factor[None, None, None, :]
            found[name] = {"kernel": kernel, "bias": params[norm]["bias"] - factor * stats[norm]["mean"]}
        elif name not in norms:
            found[name] = _folded(tree, stats[name], epsilon, f"{name}/") if name in stats else tree
    return found


# Where a norm is not called as its convolution with ``_norm`` behind it.
_NORM_OF = {
    **{f"{name}_conv": f"{name}_norm" for name in ("stem", "last")},
    **{f"conv{place}": f"norm{place}" for place in ("1", "2", "3", "_shortcut")},
}


_TFLITE: dict[str, tuple[str, dict[str, Any]]] = {
    "mobilenet_v1_025_128": ("mobilenet_v1", {"width": 0.25}),
    "mobilenet_v2_10_224": ("mobilenet_v2", {}),
}


def pretrained_mobilenet(
    name: str = "mobilenet_v2_10_224", *, classes: int | None = None, key: jax.Array | None = None, **fields: Any
) -> tuple[nn.Module, dict[str, PyTree]]:
    """A MobileNet with trained ImageNet weights, whose batch norms are folded into its convolutions.

    Inputs are RGB in [0, 1], times 2, minus 1, NHWC; outputs are 1001 classes, of which 0 is the background. The
    names say the width and the size of the images it was trained on. The files are looked up in the folder
    ``EFFJAX_MODELS``.

    Args:
      name: ``"mobilenet_v1_025_128"`` or ``"mobilenet_v2_10_224"``, whose weights are 8-bit integers in the file.
      classes: put a new head with that many outputs in place of the file's, drawn at random; None keeps it.
      key: for that head; by default ``jax.random.key(0)``.
      **fields: further fields of ``InvertedResidualNet`` that leave its variables as they are: ``dtype``, ``remat``.

    Returns:
      The module, and its variables ``{"params"}`` in float32.

    Raises:
      ValueError: unknown name, or ``fields`` that change the variables.
      FileNotFoundError: the weights are not on this machine.

    Source: Google's quantization-aware MobileNets for TensorFlow Lite (Apache-2.0), padded as TensorFlow pads.
    """
    kind, sizes = _TFLITE[check_choice("name", name, _TFLITE)]
    plain: Any = mobilenet(kind, **sizes)
    block = functools.partial(plain.block, padding="same")
    model = plain.clone(**{"classes": 1001, "norm": "none", "padding": "same", "block": block, **fields})
    path = find_weights(name)
    tensors = tflite_tensors(read_unwrapped(path), str(path))
    variables = import_weights(tensors, _shapes(model, 3), tflite_rules(kind, model), origin=str(path))
    return (model, variables) if classes is None else new_head(model, variables, classes, key=key)


def _shapes(model: nn.Module, channels: int) -> PyTree:
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32))
