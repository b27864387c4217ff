"""How encoders name their sizes and their tensors: BERT, RoBERTa, ELECTRA, DistilBERT."""

from typing import Any

from effjax.models.bert import Bert
from effjax.models.convert import Rule
from effjax.models.family_parts import Config, Family, dense, ignored, norm, refuse

__all__: list[str] = []


def _bert(config: Config) -> tuple[type[Bert], dict[str, Any]]:
    refuse(config, position_embedding_type="absolute", is_decoder=False)
    offset = config["pad_token_id"] + 1 if config["model_type"] == "roberta" else 0
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
        "layer_norm_eps": config["layer_norm_eps"],
        "activation": config["hidden_act"],
        "dropout": config["hidden_dropout_prob"],
        "attention_dropout": config["attention_probs_dropout_prob"],
    }


def _bert_rules(prefix: str, config: Config) -> tuple[Rule, ...]:
    del config
    source, target = f"{prefix}encoder.layer.{{layer}}", "layer_{layer}"
    return (
        Rule(f"{prefix}embeddings.word_embeddings.weight", "embeddings/word/embedding"),
        Rule(f"{prefix}embeddings.position_embeddings.weight", "embeddings/position/embedding"),
        Rule(f"{prefix}embeddings.token_type_embeddings.weight", "embeddings/token_type/embedding"),
        *norm(f"{prefix}embeddings.LayerNorm", "embeddings/norm"),
        *dense(f"{prefix}embeddings_project", "embeddings/projection"),
        *dense(f"{source}.attention.self.query", f"{target}/attention/query"),
        *dense(f"{source}.attention.self.key", f"{target}/attention/key"),
        *dense(f"{source}.attention.self.value", f"{target}/attention/value"),
        *dense(f"{source}.attention.output.dense", f"{target}/attention/output"),
        *norm(f"{source}.attention.output.LayerNorm", f"{target}/attention/norm"),
        *dense(f"{source}.intermediate.dense", f"{target}/mlp/up"),
        *dense(f"{source}.output.dense", f"{target}/mlp/down"),
        *norm(f"{source}.output.LayerNorm", f"{target}/mlp/norm"),
        *ignored(
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


def _distilbert(config: Config) -> tuple[type[Bert], dict[str, Any]]:
    # Sinusoidal positions are a table in the file as learned ones are, but stay as they are in training there.
    return Bert, {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["dim"],
        "num_layers": config["n_layers"],
        "num_heads": config["n_heads"],
        "intermediate_size": config["hidden_dim"],
        "max_positions": config["max_position_embeddings"],
        "type_vocab_size": 0,
        "activation": config["activation"],
        "dropout": config["dropout"],
        "attention_dropout": config["attention_dropout"],
    }


def _distilbert_rules(prefix: str, config: Config) -> tuple[Rule, ...]:
    del config
    source, target = f"{prefix}transformer.layer.{{layer}}", "layer_{layer}"
    return (
        Rule(f"{prefix}embeddings.word_embeddings.weight", "embeddings/word/embedding"),
        Rule(f"{prefix}embeddings.position_embeddings.weight", "embeddings/position/embedding"),
        *norm(f"{prefix}embeddings.LayerNorm", "embeddings/norm"),
        *dense(f"{source}.attention.q_lin", f"{target}/attention/query"),
        *dense(f"{source}.attention.k_lin", f"{target}/attention/key"),
        *dense(f"{source}.attention.v_lin", f"{target}/attention/value"),
        *dense(f"{source}.attention.out_lin", f"{target}/attention/output"),
        *norm(f"{source}.sa_layer_norm", f"{target}/attention/norm"),
        *dense(f"{source}.ffn.lin1", f"{target}/mlp/up"),
        *dense(f"{source}.ffn.lin2", f"{target}/mlp/down"),
        *norm(f"{source}.output_layer_norm", f"{target}/mlp/norm"),
        *ignored(
            f"{prefix}embeddings.position_ids",
            "pre_classifier.{part}",
            "classifier.{part}",
            "qa_outputs.{part}",
            "vocab_transform.{part}",
            "vocab_layer_norm.{part}",
            "vocab_projector.{part}",
        ),
    )


_SIZES = {
    **{"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
    **{"hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pad_token_id": 0},
}
_TABLE = "embeddings.word_embeddings.weight"


def _family(prefix: str, title: str, defaults: Config, **more: Any) -> Family:
    kind = f"{title}ForSequenceClassification"
    own = Family(_bert, _bert_rules, prefix, _TABLE, {**_SIZES, **defaults}, ("query", "value"), classifier=kind)
    return own._replace(**more)


_OUT_PROJ = {"head": "classifier.out_proj", "pooler": "classifier.dense"}
ENCODERS = {
    "bert": _family("bert.", "Bert", {}, head="classifier", pooler="{prefix}pooler.dense"),
    "roberta": _family("roberta.", "Roberta", {"vocab_size": 50265, "pad_token_id": 1}, **_OUT_PROJ),
    "electra": _family(
        "electra.",
        "Electra",
        {"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
        pool_activation="gelu",
        **_OUT_PROJ,
    ),
    "distilbert": Family(
        _distilbert,
        _distilbert_rules,
        "distilbert.",
        _TABLE,
        {
            **{"vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072},
            **{"max_position_embeddings": 512, "activation": "gelu", "dropout": 0.1, "attention_dropout": 0.1},
        },
        ("q_lin", "v_lin"),
        "classifier",
        "pre_classifier",
        "DistilBertForSequenceClassification",
        "relu",
    ),
}
