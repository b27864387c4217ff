"""What the tables of model families are written with: settings and their types, rules of layers."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

from effjax.models.convert import Rule

__all__: list[str] = []

Config = Mapping[str, Any]


class Family(NamedTuple):
    """How one ``model_type`` is read.

    Attributes:
      build: ``config -> (module class, its fields)``; the config has the ``defaults`` where it says nothing.
      rules: ``(prefix, config) -> layout``.
      prefix: name of the base model that stands before its tensors, or does not.
      table: name of the table of embeddings, after the prefix.
      defaults: settings that Hugging Face's class has where a file says nothing.
      targets: modules that adapters go to where nothing is said, as in PEFT.
      head: name of a classifier's last layer.
      pooler: of the layer before it; ``{prefix}`` is filled in.
      classifier: Hugging Face's class of the classifier.
      pool_activation: of the layer ``pooler``.
      output: of the output layer of a decoder that the setting ``tied`` may tie to the table.
      tied: that setting.
    """

    build: Callable[[Config], tuple[type[nn.Module], dict[str, Any]]]
    rules: Callable[[str, Config], tuple[Rule, ...]]
    prefix: str
    table: str
    defaults: Config
    targets: tuple[str, ...] = ()
    head: str = ""
    pooler: str = ""
    classifier: str = ""
    pool_activation: str = "tanh"
    output: str = ""
    tied: str = "tie_word_embeddings"


_COUNTS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "max_position_embeddings", "type_vocab_size", "embedding_size", "ffn_dim", "head_dim"),
    *("word_embed_proj_dim", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "max_seq_len"),
    *("n_positions", "n_embd", "n_layer", "n_head", "n_inner", "sliding_window"),
)
_NUMBERS = ("layer_norm_eps", "rms_norm_eps", "norm_eps", "rope_theta", "layer_norm_epsilon")
_RATES = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop"),
)
_SWITCHES = (
    *("tie_word_embeddings", "tied_embeddings", "attention_bias", "mlp_bias", "is_decoder", "enable_bias"),
    *("do_layer_norm_before", "layer_norm_elementwise_affine", "_remove_final_layer_norm", "use_sliding_window"),
    *("sinusoidal_pos_embds", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"),
)
_TEXTS = ("hidden_act", "activation_function", "position_embedding_type", "activation")
_TABLES = ("rope_parameters", "rope_scaling", "id2label", "label2id")


def check_types(path: Path, config: Config) -> None:
    """Refuse settings of another type than their name asks for; null stands for the family's default."""
    real = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    whole = lambda value: isinstance(value, int) and not isinstance(value, bool)
    kinds: tuple[tuple[Sequence[str], Callable[[Any], bool], str], ...] = (
        (_COUNTS, lambda value: whole(value) and 1 <= value < 2**31, "an integer from 1 on, within 32 bits"),
        (("pad_token_id",), lambda value: whole(value) and -1 <= value < 2**31, "an integer from 0 on"),
        (("max_window_layers",), lambda value: whole(value) and 0 <= value < 2**31, "an integer from 0 on"),
        (_NUMBERS, lambda value: real(value) and value > 0, "a number above 0"),
        (_RATES, lambda value: real(value) and 0 <= value < 1, "a number from 0 on, below 1"),
        (_SWITCHES, lambda value: isinstance(value, bool), "true or false"),
        (_TEXTS, lambda value: isinstance(value, str), "a text"),
        (_TABLES, lambda value: isinstance(value, Mapping), "an object"),
        (("layer_types",), lambda value: isinstance(value, list), "a list of texts"),
    )
    for names, legal, expected in kinds:
        for name in names:
            if config.get(name) is not None and not legal(config[name]):
                raise ValueError(f"{path}: {name}={config[name]!r:.60} must be {expected}. Fetch the file again.")
    if config.get("quantization_config"):
        raise ValueError(
            f"{path}: quantization_config={config['quantization_config']!r:.80} says that the weights are codes and "
            "scales, which are not read. Dequantise the model, or fetch the one that is not quantised."
        )


_NULL_COUNTS = ("sliding_window", "num_key_value_heads", "head_dim", "n_inner", "word_embed_proj_dim", "embedding_size")
"""Settings whose null is a value of its own: no window, as many heads of keys as of queries, the usual width."""


def settings(family: Family, config: Config) -> dict[str, Any]:
    """The config with the family's defaults where it says nothing, or null that has no meaning of its own."""
    said = {name: value for name, value in config.items() if value is not None}
    absent = {name for name in _NULL_COUNTS if name in config and config[name] is None}
    return {**{name: value for name, value in family.defaults.items() if name not in absent}, **said}


def refuse(config: Config, **legal: Any) -> None:
    """Refuse settings that the modules do not have; an absent one is the legal one."""
    for name, value in legal.items():
        if config.get(name, value) != value:
            kind = config["model_type"]
            raise ValueError(f"config.json: {name}={config[name]!r} of {kind!r} is not supported, only {value!r} is.")


def dense(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of a dense layer with a bias."""
    return Rule(f"{source}.weight", f"{target}/kernel", "dense"), Rule(f"{source}.bias", f"{target}/bias")


def norm(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of a norm; the last two are the names of checkpoints that came from TensorFlow."""
    return (
        Rule(f"{source}.weight", f"{target}/scale"),
        Rule(f"{source}.bias", f"{target}/bias"),
        Rule(f"{source}.gamma", f"{target}/scale"),
        Rule(f"{source}.beta", f"{target}/bias"),
    )


def ignored(*sources: str) -> tuple[Rule, ...]:
    """Tensors that the modules have no place for."""
    return tuple(Rule(source, None) for source in sources)


def output_layer(tied: bool, source: str) -> tuple[Rule, ...]:
    """The output layer of a decoder; a tied one may be stored again."""
    return ignored(f"{source}.weight") if tied else (Rule(f"{source}.weight", "head/kernel", "dense"),)
