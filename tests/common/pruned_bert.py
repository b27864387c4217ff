"""The authors' small BERT classifiers of ``tests/reference/axformer`` as models of this package."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from effjax.models.bert import Bert, BertClassifier
from effjax.models.convert import import_weights
from effjax.models.families import FAMILIES
from effjax.models.family_parts import dense
from effjax.transformers.prune_spec import PruneSpec, prune_shape

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "axformer"
GATES = {
    "attention": "attn_pruned",
    "mlp": "ffn_pruned",
    "heads": "heads_pruned",
    "groups": "groups_pruned",
    "hard": "hard_layers",
}


def read(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        return dict(file)


def model(data, dtype=jnp.float32):
    """Module, parameters, group size and top K."""
    vocabulary, width, layers, heads, intermediate, positions, top_k, group_size = map(int, data["config"][:8])
    sizes = {"max_positions": positions, "dtype": dtype}
    encoder = Bert(vocabulary, width, layers, heads, intermediate, **sizes)
    module = BertClassifier(encoder, classes=2, pool="cls")
    rules = [
        rule._replace(target=f"encoder/{rule.target}")
        for rule in FAMILIES["bert"].rules("bert.", {})
        if rule.target is not None
    ]
    rules = [*dense("classifier", "head"), *dense("bert.pooler.dense", "pooler"), *rules]
    tensors = {
        name.removeprefix("param/").replace("/", "."): value for name, value in data.items() if name[:6] == "param/"
    }
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    target = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), target)
    return module, import_weights(tensors, target, rules), group_size, top_k, rules


def inputs_of(data):
    ids, mask, types = (data[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    return {"input_ids": ids.astype(np.int32), "mask": mask > 0, "token_type_ids": types.astype(np.int32)}


def spec_of(data, case, module, group_size, top_k):
    off = {name: np.argwhere(data[f"{case}/{theirs}"]).tolist() for name, theirs in GATES.items()}
    places = {name: tuple(place[0] if len(place) == 1 else tuple(place) for place in off[name]) for name in off}
    return PruneSpec(prune_shape(module, group_size=group_size), **places, top_k=top_k)
