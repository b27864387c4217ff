"""What a transformer can be pruned of, and what was chosen: ``PruneShape`` and ``PruneSpec``."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from effjax.core.errors import Count, Natural, check_choice, check_fields, check_number
from effjax.models.bert import Bert, BertClassifier
from effjax.models.decoder import Decoder
from effjax.models.pruned import Gates, check_top_k

__all__ = ["Element", "PruneShape", "PruneSpec", "all_gates", "prune_shape"]

Kind = Literal["hard", "mlp", "group", "attention", "head"]
KINDS: tuple[Kind, ...] = ("hard", "mlp", "group", "attention", "head")
_FIELD = {"hard": "hard", "mlp": "mlp", "group": "groups", "attention": "attention", "head": "heads"}
_FORMAT = "effjax prune spec 1"


class Element(NamedTuple):
    """One thing to test: hard attention in a layer, or the removal of a block, a head or a group of neurons.

    Attributes:
      kind: ``"hard"``, ``"mlp"``, ``"group"``, ``"attention"`` or ``"head"``.
      layer: from 0.
      index: of the head or group; -1 for blocks and layers.
    """

    kind: Kind
    layer: int
    index: int = -1


@dataclasses.dataclass(frozen=True)
class PruneShape:
    """The elements of a model, all layers alike, and their sizes.

    ``layers``, ``heads`` and ``groups`` are enough for a search; the sizes are needed to count what a spec saves, and
    0 stands for unknown.

    Attributes:
      layers: depth.
      heads: removable heads of a layer; of a model with GQA, its heads of keys and values, each with the query heads
        that share it.
      groups: groups of feed-forward neurons of a layer.
      hidden_size: width of the stream.
      head_width: columns of the queries of one removable head.
      kv_width: columns of its keys.
      group_size: neurons of a group.
      mlp_matrices: matrices of a feed-forward block: 2, or 3 with a gate.
      use_bias: whether dense layers have biases.
      norm_first: pre-LN: with a block its norm goes. Post-LN: the norm stays.
    """

    layers: Count
    heads: Natural
    groups: Natural
    hidden_size: Natural = 0
    head_width: Natural = 0
    kv_width: Natural = 0
    group_size: Natural = 0
    mlp_matrices: Natural = 2
    use_bias: bool = True
    norm_first: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def params_of(self, kind: Kind) -> int:
        """Parameters that go with one element, by closed form; 0 for ``"hard"``."""
        check_choice("kind", kind, KINDS)
        width, bias = self.hidden_size, int(self.use_bias)
        norm = (1 + bias) * width * self.norm_first
        head = 2 * width * (self.head_width + self.kv_width) + bias * (self.head_width + 2 * self.kv_width)
        group = self.mlp_matrices * width * self.group_size + bias * (self.mlp_matrices - 1) * self.group_size
        sizes = {
            "head": head,
            "group": group,
            "attention": self.heads * head + bias * width + norm,
            "mlp": self.groups * group + bias * width + norm,
        }
        return sizes.get(kind, 0)

    def macs_of(self, kind: Kind, length: int) -> int:
        """Multiply-accumulates of a token that go with one element, in a sequence of ``length`` tokens."""
        check_choice("kind", kind, KINDS)
        width = self.hidden_size
        head = 2 * width * (self.head_width + self.kv_width) + 2 * length * self.head_width
        group = self.mlp_matrices * width * self.group_size
        sizes = {"head": head, "group": group, "attention": self.heads * head, "mlp": self.groups * group}
        return sizes.get(kind, 0)


def prune_shape(module: Any, *, group_size: int = 256) -> PruneShape:
    """The elements of a ``Bert``, ``BertClassifier`` or ``Decoder``.

    Args:
      module: a model with whole layers.
      group_size: neighbouring feed-forward neurons that go together; divides the block's width. Multiples of 128
        suit the units of TPUs.

    Returns:
      A ``PruneShape``.

    Raises:
      TypeError: another module.
      ValueError: a group size that does not divide the width, or a model that is pruned already.

    Example:
      >>> shape = prune_shape(Bert(30, 8, num_layers=2, num_heads=4, intermediate_size=16), group_size=8)
      >>> shape.layers, shape.heads, shape.groups, shape.params_of("head")
      (2, 4, 2, 70)
    """
    if not isinstance(module, Bert | BertClassifier | Decoder):
        raise TypeError(
            f"module={type(module).__name__} is none of Bert, BertClassifier, Decoder. Of another model say its sizes: "
            "PruneShape(layers, heads, groups)."
        )
    body = module.encoder if isinstance(module, BertClassifier) else module
    if body.layer_shapes is not None:
        raise ValueError("module is pruned already: layer_shapes are given. Give the whole model.")
    spec = body.layer_spec()
    if spec.qkv_bias or spec.qk_norm:
        raise ValueError(
            f"module has qkv_bias={spec.qkv_bias} and qk_norm={spec.qk_norm}, of which a PruneShape does not count the "
            "parameters. Give an encoder, or a decoder of the types llama, mistral, opt or gpt2."
        )
    check_number("group_size", group_size, low=1, integer=True)
    if spec.intermediate_size % group_size:
        divisors = [size for size in range(1, spec.intermediate_size + 1) if spec.intermediate_size % size == 0]
        closest = sorted(divisors, key=lambda size: abs(size - group_size))[:3]
        raise ValueError(
            f"group_size={group_size} must divide intermediate_size={spec.intermediate_size}. Near ones that do: "
            f"{', '.join(map(str, sorted(closest)))}."
        )
    kv_heads, width = spec.num_kv_heads or spec.num_heads, spec.head_width
    return PruneShape(
        layers=body.num_layers,
        heads=kv_heads,
        groups=spec.intermediate_size // group_size,
        hidden_size=spec.hidden_size,
        head_width=spec.num_heads // kv_heads * width,
        kv_width=width,
        group_size=group_size,
        mlp_matrices=3 if spec.gated else 2,
        use_bias=spec.use_bias,
        norm_first=spec.norm_first,
    )


def all_gates(shape: PruneShape) -> Gates:
    """The gates of the whole model: everything on, no hard attention.

    Args:
      shape: of the model.

    Returns:
      ``Gates`` with a leading layer axis, float32.

    Example:
      >>> all_gates(PruneShape(layers=2, heads=3, groups=4)).heads.shape
      (2, 3)
    """
    ones = lambda *sizes: np.ones((shape.layers, *sizes), np.float32)
    return Gates(ones(), ones(), ones(shape.heads), ones(shape.groups), np.zeros(shape.layers, np.float32))


@dataclasses.dataclass(frozen=True)
class PruneSpec:
    """What is removed from a model, and where its attention is hard; hashable, saved as JSON.

    Attributes:
      shape: the elements of the model that it was made for.
      attention: layers without an attention block.
      mlp: layers without a feed-forward block.
      heads: removed (layer, head).
      groups: removed (layer, group of neurons).
      hard: layers with hard attention.
      top_k: of hard attention, see ``keep_largest``.

    Raises:
      ValueError: an element that the shape does not have, or that is named twice.

    Example:
      >>> spec = PruneSpec(PruneShape(layers=2, heads=3, groups=4), mlp=(1,), heads=((0, 2),))
      >>> spec.gates().heads.tolist(), spec.gates().mlp.tolist()
      ([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], [1.0, 0.0])
      >>> PruneSpec.from_json(spec.to_json()) == spec
      True
    """

    shape: PruneShape
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    groups: tuple[tuple[int, int], ...] = ()
    hard: tuple[int, ...] = ()
    top_k: int | float = 30

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        for name in ("attention", "mlp", "hard"):
            _check_members(name, getattr(self, name), (self.shape.layers,))
        _check_members("heads", self.heads, (self.shape.layers, self.shape.heads))
        _check_members("groups", self.groups, (self.shape.layers, self.shape.groups))
        for name in _FIELD.values():  # one order, so that equal choices are equal specs
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))

    @classmethod
    def of_gates(cls, gates: Gates, shape: PruneShape, *, top_k: int | float = 30) -> "PruneSpec":
        """The spec of gates that are 0 or 1 (concrete arrays); the inverse of ``gates``."""
        off = lambda gate: np.argwhere(np.asarray(gate) == 0).tolist()
        flat = lambda gate: tuple(place[0] for place in off(gate))
        return cls(
            shape,
            attention=flat(gates.attention),
            mlp=flat(gates.mlp),
            heads=tuple((layer, index) for layer, index in off(gates.heads)),
            groups=tuple((layer, index) for layer, index in off(gates.groups)),
            hard=flat(1 - np.asarray(gates.hard)),
            top_k=top_k,
        )

    def adding(self, element: Element) -> "PruneSpec":
        """The spec with one element more."""
        name = _FIELD[check_choice("kind", element.kind, KINDS)]
        place = element.layer if element.index < 0 else (element.layer, element.index)
        return dataclasses.replace(self, **{name: (*getattr(self, name), place)})

    def gates(self) -> Gates:
        """Float32 NumPy arrays: what a gated model reads."""
        gates = all_gates(self.shape)
        for name in ("attention", "mlp", "heads", "groups"):
            for place in getattr(self, name):
                getattr(gates, name)[place] = 0
        gates.hard[list(self.hard)] = 1
        return gates

    @property
    def removed(self) -> dict[str, int]:
        """How many of each kind are removed; heads and groups of removed blocks do not count again."""
        return {
            "attention": len(self.attention),
            "mlp": len(self.mlp),
            "heads": sum(layer not in self.attention for layer, _ in self.heads),
            "groups": sum(layer not in self.mlp for layer, _ in self.groups),
            "hard": sum(layer not in self.attention for layer in self.hard),
        }

    @property
    def removed_any(self) -> bool:
        """Whether anything is removed; hard attention removes nothing."""
        return bool(self.attention or self.mlp or self.heads or self.groups)

    @property
    def removed_params(self) -> int:
        """Parameters that slicing removes; needs a shape with sizes."""
        count, size = self.removed, self._sized().params_of
        kinds: tuple[tuple[str, Kind], ...] = (
            *(("attention", "attention"), ("mlp", "mlp")),
            *(("heads", "head"), ("groups", "group")),
        )
        return sum(count[name] * size(kind) for name, kind in kinds)

    def kept_macs(self, length: int) -> float:
        """Share of the layers' multiply-accumulates that stays, in sequences of ``length`` tokens."""
        check_number("length", length, low=1, integer=True)
        count, shape = self.removed, self._sized()
        whole = shape.layers * (shape.macs_of("attention", length) + shape.macs_of("mlp", length))
        gone = sum(
            count[name] * shape.macs_of(kind, length)
            for name, kind in (("attention", "attention"), ("mlp", "mlp"), ("heads", "head"), ("groups", "group"))
        )
        return 1 - gone / whole

    def _sized(self) -> PruneShape:
        if not (self.shape.hidden_size and self.shape.head_width and self.shape.group_size):
            raise ValueError(
                f"shape={self.shape} says no sizes. Give hidden_size, head_width, kv_width and group_size."
            )
        return self.shape

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "PruneSpec":
        """The inverse of ``to_json``.

        Raises:
          ValueError: text of another kind, or a spec that names what its shape does not have.
        """
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"text is no JSON: {error}. Save the spec again with PruneSpec.save.") from None
        if not isinstance(found, dict) or found.pop("format", None) != _FORMAT:
            raise ValueError(f"text is no prune spec: format={_FORMAT!r} is missing. PruneSpec.save writes one.")
        try:
            shape = PruneShape(**found.pop("shape"))
            places: dict[str, Any] = {name: tuple(map(_place, found.pop(name))) for name in _FIELD.values()}
            return dataclasses.replace(cls(shape), **places, **found)
        except (TypeError, KeyError) as error:
            raise ValueError(f"text is a damaged prune spec: {error}. Save it again.") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(self.to_json() + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruneSpec":
        """Read a file that ``save`` wrote."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def check_made_for(module: Any, spec: PruneSpec) -> PruneShape:
    """Refuse a spec that was made for another model; returns the model's elements.

    Raises:
      ValueError: the fields that differ, or a spec that says no sizes.

    Example:
      >>> module = Bert(30, 8, num_layers=2, num_heads=2, intermediate_size=16)
      >>> check_made_for(module, PruneSpec(prune_shape(module.clone(num_layers=3), group_size=4)))
      Traceback (most recent call last):
      ValueError: spec is of another model: layers=3, here 2. Search this model, or give the one that was searched.
    """
    if not spec.shape.group_size:
        raise ValueError(f"spec was made for sizes that are not known: {spec.shape}. Search with prune_shape(module).")
    body = module.encoder if isinstance(module, BertClassifier) else module
    # A group size that does not divide is one more way to be another model.
    fits = getattr(body, "intermediate_size", 0) % spec.shape.group_size == 0
    shape = prune_shape(module, group_size=spec.shape.group_size if fits else 1)
    mine, here = dataclasses.asdict(spec.shape), dataclasses.asdict(shape)
    wrong = [f"{name}={mine[name]}, here {here[name]}" for name in mine if mine[name] != here[name]]
    if wrong:
        raise ValueError(
            f"spec is of another model: {'; '.join(wrong)}. Search this model, or give the one that was searched."
        )
    return shape


def _place(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_members(name: str, places: Any, sizes: tuple[int, ...]) -> None:
    whole = lambda value: isinstance(value, int | np.integer) and not isinstance(value, bool)
    for place in places:
        parts = place if isinstance(place, tuple) else (place,)
        legal = len(parts) == len(sizes) and all(
            whole(part) and 0 <= part < size for part, size in zip(parts, sizes, strict=True)
        )
        if not legal:
            kind = "a layer" if len(sizes) == 1 else f"(layer, {name[:-1]})"
            raise ValueError(f"{name}: {place!r} must be {kind} below {sizes if len(sizes) > 1 else sizes[0]}.")
    if len(set(places)) < len(places):
        raise ValueError(f"{name}={places} names one element twice.")


jax.tree_util.register_static(PruneSpec)
