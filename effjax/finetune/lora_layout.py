"""Which axes of a kernel are stacked layers, which are summed over, and which are made."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from effjax.finetune.lora_config import LoraRule

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
_ATTENTION = ("query", "key", "value", "out")


class Layout(NamedTuple):
    """The axes of a kernel, from the first to the last: of a stack, inputs, outputs.

    Attributes:
      stack: number of leading axes along which layers are stacked.
      inputs: number of axes that the layer sums over.
      outputs: number of axes that it makes.
      window: of the inputs, those of a convolution's window, which the factor ``a`` keeps apart.
    """

    stack: int
    inputs: int = 1
    outputs: int = 1
    window: int = 0


def is_kernel(path: str, shape: Sequence[int]) -> bool:
    """Whether a leaf can have an adapter, by its name and number of axes."""
    name = path.rsplit("/", 1)[-1]
    return (name in ("kernel", "embedding") and len(shape) >= 2) or (name == "weight" and len(shape) == 2)


def is_table(path: str) -> bool:
    """Whether the kernel is a table of embeddings, of which a token reads one row."""
    return path.rsplit("/", 1)[-1] == "embedding"


def out_first(path: str) -> bool:
    """Whether the kernel lies as ``[out, in]``, as Equinox's ``weight`` does."""
    return path.rsplit("/", 1)[-1] == "weight"


def layout(path: str, rule: LoraRule, shapes: Shapes) -> Layout:
    """The axes of a kernel: what its rule says, else what its bias and the parameters beside it tell.

    Args:
      path: of the kernel.
      rule: that selected it.
      shapes: of all parameters by path.

    Returns:
      A ``Layout``.

    Raises:
      ValueError: more axes than the kernel has; a kernel that may be a stack as well as one of several axes.
    """
    shape = shapes[path]
    given = _given(path, shape, rule)
    if given is not None:
        return given
    if len(shape) == 2:
        return Layout(0)
    if is_table(path):
        return Layout(len(shape) - 2)
    by_bias = _by_bias(path, shape, shapes)
    if len(by_bias) == 1:
        return by_bias[0]
    by_attention = _by_attention(path, shape, shapes)
    if by_attention is not None:
        return by_attention
    stacked = _is_stacked(path, shape, shapes)
    if stacked and (len(shape) == 3 or Layout(1) in by_bias):
        return Layout(len(shape) - 2)
    if not by_bias and _like_window(shape) and (len(shape) == 5 or not stacked):
        return Layout(len(shape) - 4, 3, 1, window=2)
    raise ValueError(
        f"rules: {path} of shape {shape} may be a stack of layers, or one layer of several input or output axes, as "
        f"those of nn.DenseGeneral and of convolutions. Say which: LoraRule({rule.pattern!r}, inputs=1) for a stack, "
        "outputs=2 for [in, heads, width], inputs=2 for [heads, width, out], window=1 for [window, in, out]."
    )


def _given(path: str, shape: Shape, rule: LoraRule) -> Layout | None:
    if rule.window is None and rule.inputs is None and rule.outputs is None:
        return None
    window, outputs = rule.window or 0, rule.outputs or 1
    inputs = rule.inputs or window + 1
    if inputs + outputs > len(shape):
        said = [f"{name}={getattr(rule, name)}" for name in ("window", "inputs", "outputs") if getattr(rule, name)]
        raise ValueError(
            f"{', '.join(said)} of the rule {rule.pattern!r}: {path} has shape {shape}, too few axes for them."
        )
    return Layout(len(shape) - inputs - outputs, inputs, outputs, window)


def _by_bias(path: str, shape: Shape, shapes: Shapes) -> list[Layout]:
    """All that the bias admits: it has the axes of the stack and of the outputs."""
    bias = shapes.get(path.rpartition("kernel")[0] + "bias")
    if bias is None or out_first(path):
        return []
    found = []
    for outputs in range(1, len(bias) + 1):
        stack = len(bias) - outputs
        inputs = len(shape) - stack - outputs
        if inputs >= 1 and bias == shape[:stack] + shape[len(shape) - outputs :]:
            found.append(Layout(stack, inputs, outputs, window=2 if inputs == 3 and outputs == 1 else 0))
    return found


def _by_attention(path: str, shape: Shape, shapes: Shapes) -> Layout | None:
    """Attention built on ``nn.DenseGeneral`` is known by its query [in, heads, width] and out [heads, width, out]."""
    parent, _, _ = path.rpartition("/")
    beside, _, name = parent.rpartition("/")
    query, out = (shapes.get(f"{beside}/{other}/kernel".lstrip("/"), ()) for other in ("query", "out"))
    heads = len(query) == len(out) >= 3 and query[-2:] == out[-3:-1] and query[:-3] == out[:-3]
    if name not in _ATTENTION or not heads or query[-3] == query[-2]:
        return None
    stack = len(shape) - 3
    return Layout(stack, 2, 1) if name == "out" else Layout(stack, 1, 2)


def _is_stacked(path: str, shape: Shape, shapes: Shapes) -> bool:
    """Whether all parameters of a module around the kernel begin with its first axis, and it holds several layers.

    Those are known by their biases and norms of two axes, or by one kernel that takes what another one makes.
    """
    holder = path.rpartition("/")[0]
    while holder:
        holder = holder.rpartition("/")[0]
        inside = {other: of for other, of in shapes.items() if not holder or other.startswith(f"{holder}/")}
        if any(of[:1] != shape[:1] or len(of) < 2 + is_kernel(other, of) for other, of in inside.items()):
            return False  # a bias of one axis, or a kernel of two, is of no stack
        layers = {other.rpartition("/")[0] for other in inside}
        fitting = any(len(of) == 2 or (*of[:-2], of[-1], of[-2]) in inside.values() for of in inside.values())
        if len(layers) > 1 and fitting:
            return True
    return False


def _like_window(shape: Shape) -> bool:
    """Whether it may be a kernel of a two-dimensional convolution, stacked or not: its sides are equal or short."""
    return len(shape) in (4, 5) and (shape[-4] == shape[-3] or max(shape[-4:-2]) <= 16)


def matrix(path: str, shape: Shape, b: Shape) -> tuple[Shape, int, int] | None:
    """Lengths of the stack, of all inputs together and of all outputs; None where ``b`` is of another kernel."""
    lead = len(b) - 2
    outputs = b[-1]
    rest = shape[lead:][::-1] if out_first(path) else shape[lead:]
    sizes = [(math.prod(rest[:cut]), math.prod(rest[cut:])) for cut in range(1, len(rest))]
    inputs = [inside for inside, outside in sizes if outside == outputs]
    return (shape[:lead], inputs[0], outputs) if inputs and lead >= 0 else None
