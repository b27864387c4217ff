"""effjax: methods that make neural networks cheaper to train, fine-tune and run, in JAX.

Public names live here and are imported when first used; ``import effjax`` touches no device.
"""

import fnmatch
import importlib
from typing import Any, NamedTuple

__version__ = "0.1.0"


class Method(NamedTuple):
    """One row of ``METHODS``.

    Attributes:
      stem: names the module, the config folder, the test file and the study.
      summary: one line.
      module: where it lives.
      kind: what a user gets.
      paper: where it comes from.
      names: its public names, as ``effjax.<name>``.
    """

    stem: str
    summary: str
    module: str
    kind: str
    paper: str
    names: tuple[str, ...]


METHODS: dict[str, Method] = {
    row.stem: row
    for row in (
        Method(
            stem="samuel",
            summary="learning-rate experts by multiplicative weights",
            module="effjax.optim.samuel",
            kind="Optax transformation",
            paper="Lu, Xia, Arora, Hazan 2022, arXiv:2203.01400",
            names=(
                "samuel",
                "samuel_init",
                "samuel_value_and_grad",
                "samuel_sync",
                "samuel_eval_params",
                "samuel_probabilities",
                "samuel_one_gradient",
                "covering_intervals",
                "strongly_adaptive_init",
                "strongly_adaptive_step",
                "strongly_adaptive_run",
                "preconditioner_regret",
            ),
        ),
    )
}

# Public name -> module that defines it.
_PUBLIC: dict[str, str] = {
    "samuel": "effjax.optim.samuel",
    "samuel_init": "effjax.optim.samuel",
    "samuel_value_and_grad": "effjax.optim.samuel",
    "samuel_sync": "effjax.optim.samuel",
    "samuel_eval_params": "effjax.optim.samuel",
    "samuel_probabilities": "effjax.optim.samuel",
    "samuel_one_gradient": "effjax.optim.samuel_one_gradient",
    "covering_intervals": "effjax.optim.strongly_adaptive",
    "strongly_adaptive_init": "effjax.optim.strongly_adaptive",
    "strongly_adaptive_step": "effjax.optim.strongly_adaptive",
    "strongly_adaptive_run": "effjax.optim.strongly_adaptive",
    "preconditioner_regret": "effjax.optim.strongly_adaptive",
    "LoraConfig": "effjax.finetune.lora",
    "LoraRule": "effjax.finetune.lora",
    "lora_init": "effjax.finetune.lora",
    "lora_scales": "effjax.finetune.lora",
    "lora_params": "effjax.finetune.lora",
    "lora_apply": "effjax.finetune.lora",
    "lora_merge": "effjax.finetune.lora",
    "lora_shardings": "effjax.finetune.lora",
    "scale_lora_b": "effjax.finetune.lora",
    "lora_kernels": "effjax.finetune.lora_kernels",
    "lora_hooks": "effjax.finetune.lora_kernels",
    "save_lora": "effjax.finetune.lora_files",
    "load_lora": "effjax.finetune.lora_files",
    "BucketSampler": "effjax.data.bucket_sampler",
    "plan_epoch": "effjax.data.bucket_sampler",
    "plan_epoch_official": "effjax.data.bucket_sampler",
    "official_cap": "effjax.data.bucket_sampler",
    "PaddedBatches": "effjax.data.length_grouping",
    "PackedBatches": "effjax.data.packing",
    "Ragged": "effjax.data.ragged",
    "scale_by_batch_size": "effjax.optim.scale_by_batch_size",
    "token_drop": "effjax.transformers.token_drop",
    "token_drop_columns": "effjax.transformers.token_drop",
    "stop_ids": "effjax.transformers.token_drop",
    "stop_ids_top_k": "effjax.transformers.token_drop",
    "NoEffectWarning": "effjax.core.errors",
    "fit": "effjax.train.loop",
    "Program": "effjax.train.program",
    "TrainOptions": "effjax.train.options",
    "compare": "effjax.study.compare",
    "load_data": "effjax.data.sets",
    "load_pretrained": "effjax.models.pretrained",
    "save_pretrained": "effjax.models.pretrained",
    "load_tokenizer": "effjax.data.tokens",
}

__all__ = ["METHODS", "Method", "__version__", "methods", *sorted(_PUBLIC)]


def methods(pattern: str = "*") -> list[Method]:
    """The methods whose stem or module path (``optim/samuel``) matches a shell pattern.

    Example:
      >>> [method.stem for method in methods("optim/*")]
      ['samuel']
    """
    found = [
        row
        for row in METHODS.values()
        if fnmatch.fnmatch(row.stem, pattern)
        or fnmatch.fnmatch(row.module.removeprefix("effjax.").replace(".", "/"), pattern)
    ]
    if not found:
        raise ValueError(f"pattern={pattern!r} matches none of the methods {sorted(METHODS)}.")
    return found


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'effjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
