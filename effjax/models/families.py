"""How each family of pretrained transformers names its sizes and its tensors: tables, which ``pretrained`` reads."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

from effjax.models.bert import Bert
from effjax.models.convert import Rule
from effjax.models.decoder import Decoder

__all__: list[str] = []


class Family(NamedTuple):
    """How one ``model_type`` is read.

    ``build(config)`` gives the module's class and fields, ``rules(prefix, config)`` its layout,
    ``prefix`` the name of the base model that stands before its tensors, or does not; ``head`` and
    ``pooler`` the names of a classifier's layers; ``output`` the layer of a decoder that the setting
    ``tied`` may tie to the table of embeddings.
    """

    build: Callable[[Mapping[str, Any]], tuple[type[nn.Module], dict[str, Any]]]
    rules: Callable[[str, Mapping[str, Any]], tuple[Rule, ...]]
    prefix: str
    head: str = ""
    pooler: str = ""
    classifier: str = ""
    output: str = ""
    tied: str = "tie_word_embeddings"


_COUNTS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "max_position_embeddings", "type_vocab_size", "embedding_size", "ffn_dim", "head_dim"),
    *("word_embed_proj_dim", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "max_seq_len"),
)
_NUMBERS = ("layer_norm_eps", "rms_norm_eps", "norm_eps", "rope_theta")
_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
_SWITCHES = (
    *("tie_word_embeddings", "tied_embeddings", "attention_bias", "mlp_bias", "is_decoder", "enable_bias"),
    *("do_layer_norm_before", "layer_norm_elementwise_affine", "_remove_final_layer_norm"),
)
_TEXTS = ("hidden_act", "activation_function", "position_embedding_type")
_TABLES = ("rope_parameters", "rope_scaling", "id2label", "label2id")


def check_types(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse settings of another type than their name asks for; null stands for the family's default."""
    real = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    whole = lambda value: isinstance(value, int) and not isinstance(value, bool)
    kinds: tuple[tuple[Sequence[str], Callable[[Any], bool], str], ...] = (
        (_COUNTS, lambda value: whole(value) and 1 <= value < 2**31, "an integer from 1 on, within 32 bits"),
        (("pad_token_id",), lambda value: whole(value) and -1 <= value < 2**31, "an integer from 0 on"),
        (_NUMBERS, lambda value: real(value) and value > 0, "a number above 0"),
        (_RATES, lambda value: real(value) and 0 <= value < 1, "a number from 0 on, below 1"),
        (_SWITCHES, lambda value: isinstance(value, bool), "true or false"),
        (_TEXTS, lambda value: isinstance(value, str), "a text"),
        (_TABLES, lambda value: isinstance(value, Mapping), "an object"),
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


def _refuse(config: Mapping[str, Any], **legal: Any) -> None:
    """Refuse settings that the modules do not have; an absent one is the legal one."""
    for name, value in legal.items():
        if config.get(name, value) != value:
            kind = config["model_type"]
            raise ValueError(f"config.json: {name}={config[name]!r} of {kind!r} is not supported, only {value!r} is.")


def dense(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of a dense layer with a bias."""
    return Rule(f"{source}.weight", f"{target}/kernel", "dense"), Rule(f"{source}.bias", f"{target}/bias")


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    # The last two are the names of checkpoints that came from TensorFlow.
    return (
        Rule(f"{source}.weight", f"{target}/scale"),
        Rule(f"{source}.bias", f"{target}/bias"),
        Rule(f"{source}.gamma", f"{target}/scale"),
        Rule(f"{source}.beta", f"{target}/bias"),
    )


def _ignored(*sources: str) -> tuple[Rule, ...]:
    return tuple(Rule(source, None) for source in sources)


def _bert(config: Mapping[str, Any]) -> tuple[type[Bert], dict[str, Any]]:
    _refuse(config, position_embedding_type="absolute", is_decoder=False)
    offset = config.get("pad_token_id", 1) + 1 if config["model_type"] == "roberta" else 0
    return Bert, {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"],
        "max_positions": config["max_position_embeddings"] - offset,
        "position_offset": offset,
        "type_vocab_size": config["type_vocab_size"],
        "embedding_size": config.get("embedding_size"),
        # The defaults of Hugging Face's configuration classes, of which older files leave some out.
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
        "activation": config.get("hidden_act", "gelu"),
        "dropout": config.get("hidden_dropout_prob", 0.1),
        "attention_dropout": config.get("attention_probs_dropout_prob", 0.1),
    }


def _bert_rules(prefix: str, config: Mapping[str, Any]) -> tuple[Rule, ...]:
    source, target = f"{prefix}encoder.layer.{{layer}}", "layer_{layer}"
    return (
        Rule(f"{prefix}embeddings.word_embeddings.weight", "embeddings/word/embedding"),
        Rule(f"{prefix}embeddings.position_embeddings.weight", "embeddings/position/embedding"),
        Rule(f"{prefix}embeddings.token_type_embeddings.weight", "embeddings/token_type/embedding"),
        *_norm(f"{prefix}embeddings.LayerNorm", "embeddings/norm"),
        *dense(f"{prefix}embeddings_project", "embeddings/projection"),
        *dense(f"{source}.attention.self.query", f"{target}/attention/query"),
        *dense(f"{source}.attention.self.key", f"{target}/attention/key"),
        *dense(f"{source}.attention.self.value", f"{target}/attention/value"),
        *dense(f"{source}.attention.output.dense", f"{target}/attention/output"),
        *_norm(f"{source}.attention.output.LayerNorm", f"{target}/attention/norm"),
        *dense(f"{source}.intermediate.dense", f"{target}/mlp/up"),
        *dense(f"{source}.output.dense", f"{target}/mlp/down"),
        *_norm(f"{source}.output.LayerNorm", f"{target}/mlp/norm"),
        *_ignored(
            f"{prefix}embeddings.position_ids",
            f"{prefix}embeddings.token_type_ids",
            f"{prefix}pooler.dense.weight",
            f"{prefix}pooler.dense.bias",
            "classifier.{part}",
            "classifier.dense.{part}",
            "classifier.out_proj.{part}",
            "cls.predictions.bias",
            "cls.predictions.decoder.{part}",
            "cls.predictions.transform.dense.{part}",
            "cls.predictions.transform.LayerNorm.{part}",
            "cls.seq_relationship.{part}",
            "lm_head.bias",
            "lm_head.dense.{part}",
            "lm_head.decoder.{part}",
            "lm_head.layer_norm.{part}",
            "discriminator_predictions.dense.{part}",
            "discriminator_predictions.dense_prediction.{part}",
            "generator_predictions.dense.{part}",
            "generator_predictions.LayerNorm.{part}",
            "generator_lm_head.{part}",
        ),
    )


def _opt(config: Mapping[str, Any]) -> tuple[type[Decoder], dict[str, Any]]:
    _refuse(
        config,
        do_layer_norm_before=True,
        word_embed_proj_dim=config["hidden_size"],
        activation_function="relu",
        enable_bias=True,
        layer_norm_elementwise_affine=True,
        _remove_final_layer_norm=False,
    )
    return Decoder, {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "intermediate_size": config["ffn_dim"],
        "max_positions": config["max_position_embeddings"],
        "position_offset": 2,
        "norm": "layer",
        "mlp": "relu",
        "positions": "learned",
        "use_bias": True,
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "dropout": config.get("dropout", 0.1),
        "attention_dropout": config.get("attention_dropout", 0.0),
    }


def _opt_rules(prefix: str, config: Mapping[str, Any]) -> tuple[Rule, ...]:
    base = f"{prefix}decoder"
    source, target = f"{base}.layers.{{layer}}", "layer_{layer}"
    return (
        Rule(f"{base}.embed_tokens.weight", "embeddings/word/embedding"),
        Rule(f"{base}.embed_positions.weight", "embeddings/position/embedding"),
        *dense(f"{source}.self_attn.q_proj", f"{target}/attention/query"),
        *dense(f"{source}.self_attn.k_proj", f"{target}/attention/key"),
        *dense(f"{source}.self_attn.v_proj", f"{target}/attention/value"),
        *dense(f"{source}.self_attn.out_proj", f"{target}/attention/output"),
        *_norm(f"{source}.self_attn_layer_norm", f"{target}/attention/norm"),
        *dense(f"{source}.fc1", f"{target}/mlp/up"),
        *dense(f"{source}.fc2", f"{target}/mlp/down"),
        *_norm(f"{source}.final_layer_norm", f"{target}/mlp/norm"),
        *_norm(f"{base}.final_layer_norm", "norm"),
        *_output(config.get("tie_word_embeddings", True), "lm_head"),
    )


def _output(tied: bool, source: str) -> tuple[Rule, ...]:
    """The output layer; a tied one may be stored again."""
    return _ignored(f"{source}.weight") if tied else (Rule(f"{source}.weight", "head/kernel", "dense"),)


def _llama(config: Mapping[str, Any]) -> tuple[type[Decoder], dict[str, Any]]:
    _refuse(
        config,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        head_dim=config["hidden_size"] // config["num_attention_heads"],
    )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"config.json: scaled rotary positions ({rope}) are not supported; only the default type is.")
    return Decoder, {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads"),
        "intermediate_size": config["intermediate_size"],
        "max_positions": config["max_position_embeddings"],
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "attention_dropout": config.get("attention_dropout", 0.0),
    }


def _llama_rules(prefix: str, config: Mapping[str, Any]) -> tuple[Rule, ...]:
    source = f"{prefix}layers.{{layer}}"
    names = {
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/output": "self_attn.o_proj",
        "mlp/gate": "mlp.gate_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/down": "mlp.down_proj",
    }
    return (
        Rule(f"{prefix}embed_tokens.weight", "embeddings/word/embedding"),
        *(rule for ours, theirs in names.items() for rule in dense(f"{source}.{theirs}", f"layer_{{layer}}/{ours}")),
        Rule(f"{source}.input_layernorm.weight", "layer_{layer}/attention/norm/scale"),
        Rule(f"{source}.post_attention_layernorm.weight", "layer_{layer}/mlp/norm/scale"),
        Rule(f"{prefix}norm.weight", "norm/scale"),
        *_output(config.get("tie_word_embeddings", False), "lm_head"),
        *_ignored(f"{source}.self_attn.rotary_emb.inv_freq"),
    )


def _meta(config: Mapping[str, Any]) -> tuple[type[Decoder], dict[str, Any]]:
    return Decoder, {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["dim"],
        "num_layers": config["n_layers"],
        "num_heads": config["n_heads"],
        "num_kv_heads": config["n_kv_heads"],
        "intermediate_size": config["hidden_dim"],
        "max_positions": config["max_seq_len"],
        "rope_style": "interleaved",
        "rope_theta": config["rope_theta"],
        "norm_eps": config["norm_eps"],
        "tie_embeddings": config["tied_embeddings"],
    }


def _meta_rules(prefix: str, config: Mapping[str, Any]) -> tuple[Rule, ...]:
    source = "layers.{layer}"
    names = {
        "attention/query": "attention.wq",
        "attention/key": "attention.wk",
        "attention/value": "attention.wv",
        "attention/output": "attention.wo",
        "mlp/gate": "feed_forward.w1",
        "mlp/down": "feed_forward.w2",
        "mlp/up": "feed_forward.w3",
    }
    return (
        Rule("tok_embeddings.weight", "embeddings/word/embedding"),
        *(rule for ours, theirs in names.items() for rule in dense(f"{source}.{theirs}", f"layer_{{layer}}/{ours}")),
        Rule(f"{source}.attention_norm.weight", "layer_{layer}/attention/norm/scale"),
        Rule(f"{source}.ffn_norm.weight", "layer_{layer}/mlp/norm/scale"),
        Rule("norm.weight", "norm/scale"),
        *_output(config["tied_embeddings"], "output"),
        *_ignored("rope.freqs"),
    )


_BERT = Family(_bert, _bert_rules, "bert.", "classifier", "{prefix}pooler.dense", "BertForSequenceClassification")
FAMILIES = {
    "bert": _BERT,
    "roberta": Family(
        _bert, _bert_rules, "roberta.", "classifier.out_proj", "classifier.dense", "RobertaForSequenceClassification"
    ),
    "electra": Family(
        _bert, _bert_rules, "electra.", "classifier.out_proj", "classifier.dense", "ElectraForSequenceClassification"
    ),
    "opt": Family(_opt, _opt_rules, "model.", output="lm_head"),
    "llama": Family(_llama, _llama_rules, "model.", output="lm_head"),
}
# Llama in Meta's own names, as the small models of llama2.c come.
META = Family(_meta, _meta_rules, "model.", output="output", tied="tied_embeddings")
