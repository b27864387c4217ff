"""How decoders name their sizes and their tensors: OPT, GPT-2, Llama, Mistral, Qwen2 and Qwen3."""

import logging
from collections.abc import Mapping
from typing import Any

from effjax.models.attention import RopeScaling
from effjax.models.convert import Rule
from effjax.models.decoder import Decoder
from effjax.models.family_parts import Config, Family, dense, ignored, norm, output_layer, refuse

__all__: list[str] = []

_log = logging.getLogger("effjax")
_Built = tuple[type[Decoder], dict[str, Any]]


def _opt(config: Config) -> _Built:
    refuse(
        config,
        do_layer_norm_before=True,
        word_embed_proj_dim=config["hidden_size"],
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
        "mlp": config["activation_function"],
        "positions": "learned",
        "use_bias": True,
        "tie_embeddings": config["tie_word_embeddings"],
        "dropout": config["dropout"],
        "attention_dropout": config["attention_dropout"],
    }


def _opt_rules(prefix: str, config: Config) -> tuple[Rule, ...]:
    base = f"{prefix}decoder"
    source, target = f"{base}.layers.{{layer}}", "layer_{layer}"
    return (
        Rule(f"{base}.embed_tokens.weight", "embeddings/word/embedding"),
        Rule(f"{base}.embed_positions.weight", "embeddings/position/embedding"),
        *dense(f"{source}.self_attn.q_proj", f"{target}/attention/query"),
        *dense(f"{source}.self_attn.k_proj", f"{target}/attention/key"),
        *dense(f"{source}.self_attn.v_proj", f"{target}/attention/value"),
        *dense(f"{source}.self_attn.out_proj", f"{target}/attention/output"),
        *norm(f"{source}.self_attn_layer_norm", f"{target}/attention/norm"),
        *dense(f"{source}.fc1", f"{target}/mlp/up"),
        *dense(f"{source}.fc2", f"{target}/mlp/down"),
        *norm(f"{source}.final_layer_norm", f"{target}/mlp/norm"),
        *norm(f"{base}.final_layer_norm", "norm"),
        *output_layer(config["tie_word_embeddings"], "lm_head"),
    )


def _gpt2(config: Config) -> _Built:
    refuse(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    if config["embd_pdrop"] != config["resid_pdrop"]:
        _log.warning(
            "config.json says embd_pdrop=%s and resid_pdrop=%s; one rate serves both here, that of resid_pdrop. Give "
            "dropout= for another.",
            *(config["embd_pdrop"], config["resid_pdrop"]),
        )
    return Decoder, {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["n_embd"],
        "num_layers": config["n_layer"],
        "num_heads": config["n_head"],
        "intermediate_size": config.get("n_inner", 4 * config["n_embd"]),
        "max_positions": config["n_positions"],
        "norm": "layer",
        "mlp": config["activation_function"],
        "positions": "learned",
        "use_bias": True,
        "tie_embeddings": config["tie_word_embeddings"],
        "norm_eps": config["layer_norm_epsilon"],
        "dropout": config["resid_pdrop"],
        "attention_dropout": config["attn_pdrop"],
    }


def _gpt2_rules(prefix: str, config: Config) -> tuple[Rule, ...]:
    source, target = f"{prefix}h.{{layer}}", "layer_{layer}"
    # Its dense layers lie as [in, out], as ours do; query, key and value side by side in one.
    turned = lambda theirs, ours, part=(0, 1): (
        Rule(f"{source}.{theirs}.weight", f"{target}/{ours}/kernel", part=part),
        Rule(f"{source}.{theirs}.bias", f"{target}/{ours}/bias", part=part),
    )
    return (
        Rule(f"{prefix}wte.weight", "embeddings/word/embedding"),
        Rule(f"{prefix}wpe.weight", "embeddings/position/embedding"),
        *turned("attn.c_attn", "attention/query", (0, 3)),
        *turned("attn.c_attn", "attention/key", (1, 3)),
        *turned("attn.c_attn", "attention/value", (2, 3)),
        *turned("attn.c_proj", "attention/output"),
        *norm(f"{source}.ln_1", f"{target}/attention/norm"),
        *turned("mlp.c_fc", "mlp/up"),
        *turned("mlp.c_proj", "mlp/down"),
        *norm(f"{source}.ln_2", f"{target}/mlp/norm"),
        *norm(f"{prefix}ln_f", "norm"),
        *output_layer(config["tie_word_embeddings"], "lm_head"),
        *ignored(f"{source}.attn.bias", f"{source}.attn.masked_bias"),
    )


def _llama(config: Config) -> _Built:
    """Llama, and what differs from it in a few fields."""
    refuse(config, hidden_act="silu", attention_bias=False, mlp_bias=False, partial_rotary_factor=1.0)
    width = config["hidden_size"] // config["num_attention_heads"]
    head = config.get("head_dim", width)
    theta, scaling = _rope(config)
    return Decoder, {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads"),
        "head_dim": None if head * config["num_attention_heads"] == config["hidden_size"] else head,
        "intermediate_size": config["intermediate_size"],
        "max_positions": config["max_position_embeddings"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": config["tie_word_embeddings"],
        "attention_dropout": config["attention_dropout"],
    }


def _mistral(config: Config) -> _Built:
    module, fields = _llama(config)
    return module, fields | {"sliding_window": config.get("sliding_window")}


def _qwen2(config: Config) -> _Built:
    module, fields = _llama(config)
    return module, fields | {"qkv_bias": True} | _windows(config)


def _qwen3(config: Config) -> _Built:
    module, fields = _llama(config)
    return module, fields | {"qk_norm": True} | _windows(config)


def _windows(config: Config) -> dict[str, Any]:
    """The sliding window, and the layers without it."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if not config["use_sliding_window"] or window is None:
        return {}
    first = config["max_window_layers"]
    kinds = config.get("layer_types", ["full_attention"] * first + ["sliding_attention"] * (layers - first))
    kinds = kinds[:layers] if "layer_types" not in config else kinds
    known = {"full_attention", "sliding_attention"}
    if len(kinds) != layers or not all(isinstance(kind, str) and kind in known for kind in kinds):
        raise ValueError(
            f"config.json: layer_types={kinds!r:.80} must name full_attention or sliding_attention for each of the "
            f"{layers} layers; no other is supported."
        )
    full = tuple(index for index, kind in enumerate(kinds) if kind == "full_attention")
    return {} if len(full) == layers else {"sliding_window": window, "full_layers": full}


def _rope(config: Config) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary angles."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta, kind = rope.get("rope_theta", config.get("rope_theta", 10000.0)), rope.get("rope_type", rope.get("type"))
    positive = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31
    names = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for name in names:
        if rope.get(name) is not None and not positive(rope[name]):
            raise ValueError(f"config.json: {name}={rope[name]!r:.60} of the rotary positions must be above 0.")
    if kind in (None, "default"):
        return theta, None
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if not isinstance(kind, str) or kind not in needed:
        raise ValueError(
            f"config.json: rotary positions of the type {kind!r:.60} are not supported, only default, linear and "
            "llama3 are. Where sequences are short, remove that entry: up to the length of the first training most "
            "types are the default one."
        )
    if absent := [name for name in needed[kind] if rope.get(name) is None]:
        raise ValueError(f"config.json: rotary positions of the type {kind!r} lack {absent[0]!r}. Fetch it again.")
    if kind == "linear":
        return theta, RopeScaling(rope["factor"])
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    if low >= high:
        raise ValueError(f"config.json: low_freq_factor={low} must be below high_freq_factor={high}.")
    return theta, RopeScaling(rope["factor"], low, high, original)


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
        Rule(f"{source}.self_attn.q_norm.weight", "layer_{layer}/attention/query_norm/scale"),
        Rule(f"{source}.self_attn.k_norm.weight", "layer_{layer}/attention/key_norm/scale"),
        Rule(f"{source}.input_layernorm.weight", "layer_{layer}/attention/norm/scale"),
        Rule(f"{source}.post_attention_layernorm.weight", "layer_{layer}/mlp/norm/scale"),
        Rule(f"{prefix}norm.weight", "norm/scale"),
        *output_layer(config["tie_word_embeddings"], "lm_head"),
        *ignored(f"{source}.self_attn.rotary_emb.inv_freq"),
    )


def _meta(config: Config) -> _Built:
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


def _meta_rules(prefix: str, config: Config) -> tuple[Rule, ...]:
    del prefix
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
        *output_layer(config["tied_embeddings"], "output"),
        *ignored("rope.freqs"),
    )


_LLAMA = {
    **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    **{"tie_word_embeddings": False, "attention_dropout": 0.0},
}
_QWEN = {
    **{"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    **{"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
}
_OPT = {
    **{"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "num_attention_heads": 12},
    **{"max_position_embeddings": 2048, "activation_function": "relu", "tie_word_embeddings": True},
    **{"dropout": 0.1, "attention_dropout": 0.0},
}
_GPT2 = {
    **{"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
    **{"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    **{"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
}
_MISTRAL = {
    **{"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    **{"sliding_window": 4096},
}


def _like_llama(build: Any, defaults: Config) -> Family:
    return Family(
        build,
        _llama_rules,
        "model.",
        "embed_tokens.weight",
        {**_LLAMA, **defaults},
        ("q_proj", "v_proj"),
        output="lm_head",
    )


DECODERS = {
    "opt": Family(
        _opt, _opt_rules, "model.", "decoder.embed_tokens.weight", _OPT, ("q_proj", "v_proj"), output="lm_head"
    ),
    "gpt2": Family(_gpt2, _gpt2_rules, "transformer.", "wte.weight", _GPT2, ("c_attn",), output="lm_head"),
    "llama": _like_llama(_llama, {}),
    "mistral": _like_llama(_mistral, _MISTRAL),
    "qwen2": _like_llama(_qwen2, _QWEN),
    "qwen3": _like_llama(_qwen3, {**_QWEN, "head_dim": 128}),
}
# Llama in Meta's own names, as the small models of llama2.c come.
META = Family(
    _meta, _meta_rules, "model.", "tok_embeddings.weight", {}, ("wq", "wv"), output="output", tied="tied_embeddings"
)
