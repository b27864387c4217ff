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
        Method(
            stem="cola",
            summary="Chain of LoRA: fine-tuning by adapters that are merged and restarted",
            module="effjax.finetune.cola",
            kind="Optax transformation and pure functions",
            paper="Xia, Qin, Hazan 2024, arXiv:2401.04151",
            names=(
                "cola",
                "ColaConfig",
                "cola_init",
                "cola_params",
                "cola_value_and_grad",
                "cola_knot",
                "cola_extend",
                "cola_merge",
                "cola_adapters",
                "cola_state",
                "cola_gradients",
                "cola_links",
                "cola_export",
                "cola_reset",
                "SlopeKnot",
                "LoraConfig",
                "LoraRule",
                "lora_init",
                "lora_scales",
                "lora_params",
                "lora_apply",
                "lora_merge",
                "lora_shardings",
                "scale_lora_b",
                "lora_kernels",
                "lora_hooks",
            ),
        ),
        Method(
            stem="bucket_sampler",
            summary="length-aware batches of few static shapes",
            module="effjax.data.bucket_sampler",
            kind="resumable sampler",
            paper="Nagarajan, Raghunathan 2023, Findings of EMNLP (2023.findings-emnlp.782)",
            names=(
                "BucketSampler",
                "plan_epoch",
                "plan_epoch_official",
                "official_cap",
                "PaddedBatches",
                "PackedBatches",
                "Ragged",
                "scale_by_batch_size",
            ),
        ),
        Method(
            stem="token_drop",
            summary="drop insignificant tokens anew in every epoch",
            module="effjax.transformers.token_drop",
            kind="data transform",
            paper="Nagarajan, Raghunathan 2023, Findings of EMNLP (2023.findings-emnlp.782)",
            names=("token_drop", "token_drop_columns", "stop_ids", "stop_ids_top_k"),
        ),
        Method(
            stem="irnn",
            summary="incremental RNN: the state is the increment of an ODE run at every input",
            module="effjax.recurrent.irnn",
            kind="Flax cell and pure functions",
            paper="Kag, Zhang, Saligrama 2020, ICLR (OpenReview HylpqA4FwS)",
            names=(
                "irnn",
                "irnn_project",
                "irnn_step",
                "IncrementalRNN",
                "IncrementalRNNCell",
                "irnn_equilibrium",
                "equilibrium",
                "limit_norm",
                "EquilibriumRNN",
                "dual_ode",
                "dual_ode_project",
                "dual_ode_step",
                "DualODE",
                "scan_time",
                "fastest_unroll",
            ),
        ),
        Method(
            stem="tarnn",
            summary="time-adaptive RNN: a learned time constant of input and state",
            module="effjax.recurrent.tarnn",
            kind="Flax cell and pure functions",
            paper="Kag, Saligrama 2021, CVPR (pp. 15149-15158)",
            names=(
                "tarnn",
                "tarnn_project",
                "tarnn_step",
                "TARNN",
                "TARNNCell",
                "b_tarnn_lstm",
                "b_tarnn_lstm_project",
                "b_tarnn_lstm_step",
                "old_b_tarnn",
                "old_b_tarnn_project",
                "old_b_tarnn_step",
            ),
        ),
        Method(
            stem="fptt",
            summary="forward propagation through time: updates in every part of a sequence",
            module="effjax.recurrent.fptt",
            kind="Optax transformation and training steps",
            paper="Kag, Saligrama 2021, ICML (PMLR 139:5189-5200)",
            names=(
                "fptt",
                "fptt_eval_params",
                "fptt_epoch_end",
                "fptt_terminal_loss",
                "qbar_init",
                "qbar_first_errors",
                "qbar_sums",
                "qbar_means",
                "fptt_step",
                "fptt_online",
                "bptt_step",
                "tbptt_step",
                "SequencePart",
                "surrogate_spike",
                "ltc_spiking_step",
                "ltc_spiking_init",
                "leaky_readout_step",
                "LTCSpikingCell",
                "LeakyReadoutCell",
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
    "ColaConfig": "effjax.finetune.cola",
    "cola": "effjax.finetune.cola",
    "cola_init": "effjax.finetune.cola",
    "cola_params": "effjax.finetune.cola",
    "cola_adapters": "effjax.finetune.cola",
    "cola_value_and_grad": "effjax.finetune.cola",
    "cola_state": "effjax.finetune.cola",
    "cola_extend": "effjax.finetune.cola",
    "cola_knot": "effjax.finetune.cola",
    "cola_merge": "effjax.finetune.cola",
    "cola_gradients": "effjax.finetune.cola",
    "cola_links": "effjax.finetune.cola",
    "cola_export": "effjax.finetune.cola",
    "cola_reset": "effjax.finetune.restart",
    "SlopeKnot": "effjax.finetune.slope_knot",
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
    "fptt": "effjax.recurrent.fptt",
    "fptt_eval_params": "effjax.recurrent.fptt",
    "fptt_epoch_end": "effjax.recurrent.fptt",
    "fptt_terminal_loss": "effjax.recurrent.fptt",
    "qbar_init": "effjax.recurrent.fptt",
    "qbar_first_errors": "effjax.recurrent.fptt",
    "qbar_sums": "effjax.recurrent.fptt",
    "qbar_means": "effjax.recurrent.fptt",
    "fptt_step": "effjax.recurrent.drivers",
    "fptt_online": "effjax.recurrent.drivers",
    "bptt_step": "effjax.recurrent.drivers",
    "tbptt_step": "effjax.recurrent.drivers",
    "SequencePart": "effjax.recurrent.drivers",
    "surrogate_spike": "effjax.recurrent.ltc_spiking",
    "ltc_spiking_step": "effjax.recurrent.ltc_spiking",
    "ltc_spiking_init": "effjax.recurrent.ltc_spiking",
    "leaky_readout_step": "effjax.recurrent.ltc_spiking",
    "LTCSpikingCell": "effjax.recurrent.ltc_spiking",
    "LeakyReadoutCell": "effjax.recurrent.ltc_spiking",
    "token_drop": "effjax.transformers.token_drop",
    "token_drop_columns": "effjax.transformers.token_drop",
    "stop_ids": "effjax.transformers.token_drop",
    "stop_ids_top_k": "effjax.transformers.token_drop",
    "irnn": "effjax.recurrent.irnn",
    "irnn_project": "effjax.recurrent.irnn",
    "irnn_step": "effjax.recurrent.irnn",
    "irnn_equilibrium": "effjax.recurrent.equilibrium",
    "equilibrium": "effjax.recurrent.equilibrium",
    "limit_norm": "effjax.recurrent.equilibrium",
    "IncrementalRNN": "effjax.recurrent.irnn",
    "IncrementalRNNCell": "effjax.recurrent.irnn",
    "EquilibriumRNN": "effjax.recurrent.equilibrium",
    "dual_ode": "effjax.recurrent.dual_ode",
    "dual_ode_project": "effjax.recurrent.dual_ode",
    "dual_ode_step": "effjax.recurrent.dual_ode",
    "DualODE": "effjax.recurrent.dual_ode",
    "scan_time": "effjax.core.time_scan",
    "fastest_unroll": "effjax.core.time_scan",
    "tarnn": "effjax.recurrent.tarnn",
    "tarnn_project": "effjax.recurrent.tarnn",
    "tarnn_step": "effjax.recurrent.tarnn",
    "TARNN": "effjax.recurrent.tarnn",
    "TARNNCell": "effjax.recurrent.tarnn",
    "b_tarnn_lstm": "effjax.recurrent.tarnn",
    "b_tarnn_lstm_project": "effjax.recurrent.tarnn",
    "b_tarnn_lstm_step": "effjax.recurrent.tarnn",
    "old_b_tarnn": "effjax.recurrent.tarnn",
    "old_b_tarnn_project": "effjax.recurrent.tarnn",
    "old_b_tarnn_step": "effjax.recurrent.tarnn",
    "Recurrent": "effjax.models.sequence",
    "RNNCell": "effjax.models.sequence",
    "LSTMCell": "effjax.models.sequence",
    "GRUCell": "effjax.models.sequence",
    "FastRNNCell": "effjax.models.sequence",
    "FastGRNNCell": "effjax.models.sequence",
    "AntisymmetricRNNCell": "effjax.models.sequence",
    "CoRNNCell": "effjax.models.sequence",
    "chrono_bias": "effjax.models.sequence",
    "LRU": "effjax.models.linear_recurrence",
    "LRUCell": "effjax.models.linear_recurrence",
    "MinGRU": "effjax.models.linear_recurrence",
    "MinGRUCell": "effjax.models.linear_recurrence",
    "linear_scan": "effjax.models.linear_recurrence",
    "SequenceNetwork": "effjax.models.sequence_network",
    "NoEffectWarning": "effjax.core.errors",
    "fit": "effjax.train.loop",
    "Program": "effjax.train.program",
    "TrainOptions": "effjax.train.options",
    "compare": "effjax.study.compare",
    "load_data": "effjax.data.sets",
    "sequence_data": "effjax.data.sequences",
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
