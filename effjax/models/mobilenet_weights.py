"""Where the weights of MobileNets and EfficientNets of torchvision, timm and TensorFlow Lite go."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from effjax.models.convert import Kind, Rule, batch_norm_rules
from effjax.models.inverted_residual import BlockRow, InvertedResidualNet


class _Block(NamedTuple):
    """A block's place: ``index`` counts all, from 1; ``stage`` and ``position`` as in its name here."""

    index: int
    stage: int
    position: int
    expands: bool
    row: BlockRow

    @property
    def target(self) -> str:
        return f"stage{self.stage}_block{self.position}"

    @property
    def layers(self) -> list[str]:
        """Its layers from the first to the last."""
        return [*["expand"] * self.expands, "depthwise", *["squeeze"] * bool(self.row.squeeze), "project"]


def _blocks(model: InvertedResidualNet) -> Iterator[_Block]:
    inputs, index = model.stem, 0
    for stage, rows in enumerate(model.stages, start=1):
        for position, row in enumerate(rows):
            index += 1
            yield _Block(index, stage, position, row.hidden != inputs, row)
            inputs = row.features


def _layer(source: str, target: str, kind: Kind = "conv") -> tuple[Rule, Rule]:
    """Kernel and bias; a file whose layer has no bias has no such tensor, and the model no such leaf."""
    return Rule(f"{source}.weight", f"params/{target}/kernel", kind), Rule(f"{source}.bias", f"params/{target}/bias")


def _squeeze(source: str, target: str, names: tuple[str, str]) -> list[Rule]:
    places = zip(names, ("reduce", "expand"), strict=True)
    return [
        rule for name, place in places for rule in _layer(f"{source}.{name}", f"{target}/squeeze/{place}", "pointwise")
    ]


def mobilenet_rules(kind: str, model: InvertedResidualNet, layout: str) -> tuple[Rule, ...]:
    """The layout table of a network of ``mobilenet``.

    Args:
      kind: its name, without ``_cifar``.
      model: the network.
      layout: ``"torchvision"`` or ``"timm"``.

    Raises:
      ValueError: ``"mobilenet_v1"``, which torchvision has not.
    """
    if layout == "timm":
        return _timm(kind, model)
    if kind == "mobilenet_v1":
        raise ValueError("layout='torchvision': torchvision has no MobileNetV1. Use layout='timm'.")
    return _torchvision(kind, model)


def _timm(kind: str, model: InvertedResidualNet) -> tuple[Rule, ...]:
    rules = [*_layer("conv_stem", "stem_conv"), *batch_norm_rules("bn1", "stem_norm")]
    for block in _blocks(model):
        source, target = f"blocks.{block.stage - 1}.{block.position}", block.target
        names = ("conv_pw", "conv_dw", "conv_pwl") if block.expands else ("conv_dw", "conv_pw")
        convolutions = [layer for layer in block.layers if layer != "squeeze"]
        for number, (name, layer) in enumerate(zip(names, convolutions, strict=True), start=1):
            rules += _layer(f"{source}.{name}", f"{target}/{layer}")
            rules += batch_norm_rules(f"{source}.bn{number}", f"{target}/{layer}_norm")
        rules += _squeeze(f"{source}.se", target, ("conv_reduce", "conv_expand"))
    if model.dense:
        last = f"blocks.{len(model.stages)}.0"
        rules += [*_layer(f"{last}.conv", "last_conv"), *batch_norm_rules(f"{last}.bn1", "last_norm")]
        rules += _layer("conv_head", "dense", "pointwise")
    else:
        rules += [*_layer("conv_head", "last_conv"), *batch_norm_rules("bn2", "last_norm")]
    return (*rules, *_layer("classifier", "head", "dense"))


def _torchvision(kind: str, model: InvertedResidualNet) -> tuple[Rule, ...]:
    rules = [*_layer("features.0.0", "stem_conv"), *batch_norm_rules("features.0.1", "stem_norm")]
    staged = kind == "efficientnet_b0"
    last = 0
    for block in _blocks(model):
        last = block.stage + 1 if staged else block.index + 1
        place = f"{block.stage}.{block.position}" if staged else f"{block.index}"
        inner = "conv" if kind == "mobilenet_v2" else "block"
        for number, layer in enumerate(block.layers):
            source, target = f"features.{place}.{inner}.{number}", f"{block.target}/{layer}"
            if layer == "squeeze":
                rules += _squeeze(source, block.target, ("fc1", "fc2"))
            elif kind == "mobilenet_v2" and layer == "project":  # its norm stands beside it, not with it
                norm = f"features.{place}.{inner}.{number + 1}"
                rules += [*_layer(source, target), *batch_norm_rules(norm, f"{target}_norm")]
            else:
                rules += [*_layer(f"{source}.0", target), *batch_norm_rules(f"{source}.1", f"{target}_norm")]
    rules += [*_layer(f"features.{last}.0", "last_conv"), *batch_norm_rules(f"features.{last}.1", "last_norm")]
    if model.dense:
        return (*rules, *_layer("classifier.0", "dense", "dense"), *_layer("classifier.3", "head", "dense"))
    return (*rules, *_layer("classifier.1", "head", "dense"))


def tflite_rules(kind: str, model: InvertedResidualNet) -> tuple[Rule, ...]:
    """The layout table of a MobileNetV1 or V2 of TensorFlow's, batch norms folded in.

    Args:
      kind: ``"mobilenet_v1"`` or ``"mobilenet_v2"``.
      model: the network.
    """
    first = kind == "mobilenet_v1"
    rules = [*_layer("Conv2d_0" if first else "Conv", "stem_conv")]
    for block in _blocks(model):
        number = "" if block.index == 1 else f"_{block.index - 1}"
        for layer in block.layers:
            old = "pointwise" if layer == "project" else layer
            source = f"Conv2d_{block.index}_{old}" if first else f"expanded_conv{number}.{layer}"
            rules += _layer(source, f"{block.target}/{layer}")
    return (*rules, *_layer("Conv_1", "last_conv"), *_layer("logits", "head", "pointwise"))


def tflite_tensors(tensors: Mapping[str, np.ndarray], origin: str) -> dict[str, np.ndarray]:
    """Tensors with 8-bit weights as floats: ``(weight - weight_zero) * weight_scale``.

    Args:
      tensors: name -> array; floating weights stay.
      origin: the file, for the message.

    Raises:
      ValueError: a weight of integers without its scale or zero.
    """
    found = {}
    for name, tensor in tensors.items():
        if name.endswith((".weight_scale", ".weight_zero")):
            continue
        if tensor.dtype.kind in "iu":
            needed = (f"{name}_scale", f"{name}_zero")
            if absent := [other for other in needed if other not in tensors]:
                raise ValueError(f"{origin}: {name} has dtype {tensor.dtype}, but {', '.join(absent)} is not there.")
            scale, zero = (tensors[other].astype(np.float32) for other in needed)
            tensor = (tensor.astype(np.float32) - zero) * scale
        found[name] = tensor
    return found
