"""Writes the tiny random models of the newer families: ``python make.py [NAME ...]``, with torch and transformers.

Those of README.md's first paragraph are older and are not written again.
"""

import json
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
DECODER = {
    **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24},
    **{"num_key_value_heads": 2, "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_theta": 500.0},
    **{"pad_token_id": 0, "tie_word_embeddings": False},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 16}
        | {"num_labels": 3},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 16},
    ),
    "mistral": ("MistralForCausalLM", DECODER | {"sliding_window": 4, "head_dim": 8}),
    "qwen2": (
        "Qwen2ForCausalLM",
        DECODER
        | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3ForCausalLM", DECODER | {"head_dim": 8}),
    "llama3": (
        "LlamaForCausalLM",
        DECODER | {"head_dim": 8, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8}},
    ),
}


def model_of(name: str):
    """A model of ``MODELS`` with noise on every parameter, rounded to float16, in evaluation mode."""
    import torch
    import transformers

    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    maker = getattr(transformers, kind)
    model = maker(maker.config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.2 * torch.randn_like(parameter)).half().float())
    return model


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Three rows of 9, 5 and 2 real tokens, padded on the right."""
    ids = np.random.default_rng(0).integers(1, 40, (3, 9)).astype(np.int32)
    mask = np.arange(9) < np.array([[9], [5], [2]])
    return np.where(mask, ids, 0).astype(np.int32), mask


def main(names: list[str]) -> None:
    """Write the folders."""
    import torch

    ids, mask = inputs()
    for name in names or MODELS:
        model = model_of(name)
        with torch.no_grad():
            output = model(torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(mask).long()).logits.numpy()
        model.half().save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(FOLDER / name / "expected.npz", input_ids=ids, mask=mask, output=output)
        config = json.loads((FOLDER / name / "config.json").read_text())
        print(name, config["model_type"], output.shape, np.abs(output).max())


if __name__ == "__main__":
    main(sys.argv[1:])
