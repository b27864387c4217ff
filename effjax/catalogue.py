"""The methods of this package as data: what each is, where it lives and where it comes from."""

import ast
import fnmatch
from pathlib import Path
from typing import NamedTuple

import effjax

__all__ = ["METHODS", "Method", "methods"]


class Method(NamedTuple):
    """One row of ``METHODS``.

    Attributes:
      stem: names the module, the config folder, the test file and the study.
      summary: one line.
      modules: where it lives, the method's own module first.
      kind: what a user gets.
      paper: where it comes from.
    """

    stem: str
    summary: str
    modules: tuple[str, ...]
    kind: str
    paper: str

    @property
    def module(self) -> str:
        """The module that is named after the method."""
        return self.modules[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The public names of its modules, as one writes them: ``effjax.samuel``, ``effjax.optim.samuel_init``."""
        return tuple(_public_path(module, name) for module in self.modules for name in offered(module))


def offered(module: str) -> list[str]:
    """The ``__all__`` of a module of this package, from its source: importing it would import JAX."""
    path = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return sorted(ast.literal_eval(node.value))
    return []


def _public_path(module: str, name: str) -> str:
    """How one writes a public name: at the top level where it is offered there, else by its package."""
    return f"effjax.{name}" if name in dir(effjax) else f"effjax.{module.split('.')[1]}.{name}"


_TOKENS = "Nagarajan, Raghunathan 2023, Findings of EMNLP (2023.findings-emnlp.782)"

METHODS: dict[str, Method] = {
    row.stem: row
    for row in (
        Method(
            stem="samuel",
            summary="learning-rate experts by multiplicative weights",
            modules=("effjax.optim.samuel", "effjax.optim.one_gradient", "effjax.optim.strongly_adaptive"),
            kind="Optax transformation",
            paper="Lu, Xia, Arora, Hazan 2022, arXiv:2203.01400",
        ),
        Method(
            stem="dcl",
            summary="distributionally constrained learning: stated levels instead of penalty weights",
            modules=(
                "effjax.optim.dcl",
                "effjax.optim.dual_ascent",
                "effjax.optim.constraints",
                "effjax.optim.smoothness",
            ),
            kind="Optax transformation and pure functions",
            paper="Kag 2023, thesis (Boston University); reconstructed from a description",
        ),
        Method(
            stem="cola",
            summary="Chain of LoRA: fine-tuning by adapters that are merged and restarted",
            modules=(
                "effjax.finetune.cola",
                "effjax.finetune.chain",
                "effjax.finetune.chain_config",
                "effjax.finetune.chain_links",
                "effjax.finetune.restart",
                "effjax.finetune.slope_knot",
                "effjax.finetune.lora",
                "effjax.finetune.lora_layers",
            ),
            kind="Optax transformation and pure functions",
            paper="Xia, Qin, Hazan 2024, arXiv:2401.04151",
        ),
        Method(
            stem="bucket_sampler",
            summary="length-aware batches of few static shapes",
            modules=(
                "effjax.data.bucket_sampler",
                "effjax.data.length_grouping",
                "effjax.data.packing",
                "effjax.data.ragged",
                "effjax.optim.batch_size",
            ),
            kind="resumable sampler",
            paper=_TOKENS,
        ),
        Method(
            stem="token_drop",
            summary="drop insignificant tokens anew in every epoch",
            modules=("effjax.transformers.token_drop",),
            kind="data transform",
            paper=_TOKENS,
        ),
        Method(
            stem="icpc",
            summary="input compression with positional consistency: one transformer for inputs of several sizes",
            modules=(
                "effjax.transformers.icpc",
                "effjax.transformers.position_tables",
                "effjax.transformers.level_sampling",
                "effjax.transformers.compressions",
                "effjax.transformers.level_cascade",
                "effjax.transformers.level_calibration",
                "effjax.transformers.flexible_patches",
            ),
            kind="pure functions and variable-effort inference",
            paper="Nagarajan, Raghunathan 2023, arXiv:2312.12385 (ECML PKDD 2024)",
        ),
        Method(
            stem="axformer",
            summary="accuracy-driven pruning of the blocks, heads and neurons of a fine-tuned transformer",
            modules=(
                "effjax.transformers.axformer",
                "effjax.transformers.axformer_rules",
                "effjax.transformers.prune_spec",
                "effjax.transformers.gated",
                "effjax.transformers.evaluator",
                "effjax.transformers.validation",
                "effjax.transformers.slicing",
                "effjax.transformers.significance",
                "effjax.transformers.prune_rivals",
                "effjax.transformers.fisher",
                "effjax.transformers.repair",
                "effjax.transformers.block_costs",
                "effjax.transformers.cost_search",
            ),
            kind="search over pure functions",
            paper="Nagarajan, Sen, Stevens, Raghunathan 2022, arXiv:2010.03688",
        ),
        Method(
            stem="irnn",
            summary="incremental RNN: the state is the increment of an ODE run at every input",
            modules=(
                "effjax.recurrent.irnn",
                "effjax.recurrent.fixed_point",
                "effjax.recurrent.dual",
                "effjax.recurrent.cells",
            ),
            kind="Flax cell and pure functions",
            paper="Kag, Zhang, Saligrama 2020, ICLR (OpenReview HylpqA4FwS)",
        ),
        Method(
            stem="tarnn",
            summary="time-adaptive RNN: a learned time constant of input and state",
            modules=("effjax.recurrent.tarnn",),
            kind="Flax cell and pure functions",
            paper="Kag, Saligrama 2021, CVPR (pp. 15149-15158)",
        ),
        Method(
            stem="fptt",
            summary="forward propagation through time: updates in every part of a sequence",
            modules=(
                "effjax.recurrent.fptt",
                "effjax.recurrent.through_time",
                "effjax.recurrent.sequence_problem",
                "effjax.recurrent.ltc_spiking",
            ),
            kind="Optax transformation and training steps",
            paper="Kag, Saligrama 2021, ICML (PMLR 139:5189-5200)",
        ),
        Method(
            stem="global_layer",
            summary="Global layer: an advection-diffusion equation in place of the blocks that widen the view",
            modules=("effjax.vision.global_layer", "effjax.vision.pde", "effjax.vision.global_nets"),
            kind="Flax module and pure functions",
            paper="Kag, Saligrama 2022, CVPR (pp. 610-619)",
        ),
        Method(
            stem="fastrain",
            summary="fast and accurate self-training of graph neural networks",
            modules=(
                "effjax.graph.fastrain",
                "effjax.graph.fastrain_config",
                "effjax.graph.stages",
                "effjax.graph.pseudolabels",
                "effjax.graph.calibration",
            ),
            kind="pure functions and a staged loop",
            paper="Nagarajan, Raghunathan 2023, TMLR (OpenReview 1IYJfwJtjQ)",
        ),
        Method(
            stem="disk",
            summary="selective distillation: a guide takes off a small student what it cannot learn",
            modules=(
                "effjax.hardness.disk",
                "effjax.hardness.disk_config",
                "effjax.hardness.disk_losses",
                "effjax.hardness.guides",
                "effjax.hardness.distillation",
            ),
            kind="pure functions and alternating steps",
            paper="Kag, Acar, Gangrade, Saligrama 2023, ICLR (OpenReview N4K5ck-BTT)",
        ),
        Method(
            stem="geeni",
            summary="ensembles of graph networks that run as one, without the messages of doubtful nodes",
            modules=(
                "effjax.graph.geeni",
                "effjax.graph.geeni_config",
                "effjax.graph.members",
                "effjax.graph.geeni_serving",
                "effjax.graph.isolation",
                "effjax.graph.error_nodes",
            ),
            kind="pure functions",
            paper="Nagarajan, Raghunathan 2022, DAC (10.1145/3489517.3530416); reconstructed from abstracts",
        ),
        Method(
            stem="selective",
            summary="selective classification: predict or abstain, with a guarantee",
            modules=(
                "effjax.hardness.selective",
                "effjax.hardness.thresholds",
                "effjax.hardness.risk_coverage",
                "effjax.hardness.confidence",
                "effjax.hardness.osp",
                "effjax.hardness.osp_saddle",
                "effjax.hardness.abstention_losses",
                "effjax.hardness.online",
            ),
            kind="rules, losses and measures as pure functions",
            paper="Gangrade, Kag, Saligrama 2021, AISTATS, arXiv:2010.07853",
        ),
        Method(
            stem="hybrid",
            summary="a small model that asks a large one only where that pays",
            modules=(
                "effjax.hardness.hybrid",
                "effjax.hardness.hybrid_config",
                "effjax.hardness.router",
                "effjax.hardness.hybrid_losses",
                "effjax.hardness.query_rules",
                "effjax.hardness.cascades",
                "effjax.hardness.dispatch",
                "effjax.hardness.host_dispatch",
                "effjax.hardness.query_queue",
                "effjax.hardness.remote",
            ),
            kind="pure functions and static-shape routing",
            paper="Kag, Fedorov, Gangrade, Whatmough, Saligrama 2023, ICLR (OpenReview jpR98ZdIm2q)",
        ),
        Method(
            stem="si_cnn",
            summary="residual blocks that compute on a grid of anchor pixels and interpolate between them",
            modules=("effjax.vision.si_cnn", "effjax.vision.si_block", "effjax.vision.anchors"),
            kind="pure functions, Flax blocks, and surgery on networks",
            paper="Kag, Wadhwa, Saligrama, Jain 2023, unpublished; reconstructed from two descriptions",
        ),
        Method(
            stem="dynamic_inference",
            summary="residual networks whose layers and channels run only for the images that need them",
            modules=(
                "effjax.vision.dynamic_inference",
                "effjax.vision.gated_executors",
                "effjax.vision.gated_blocks",
                "effjax.vision.gates",
                "effjax.vision.gate_networks",
                "effjax.vision.mac_target",
                "effjax.vision.policies",
                "effjax.vision.pattern_buckets",
                "effjax.vision.channel_groups",
                "effjax.vision.skip_estimate",
            ),
            kind="Flax modules and static-shape routing",
            paper="Xia, Yin, Dai, Jha 2021, IEEE TETC, arXiv:2007.15151; reconstructed from re-implementations",
        ),
    )
}


def methods(pattern: str = "*") -> list[Method]:
    """The methods whose stem or module path (``optim/samuel``) matches a shell pattern.

    Args:
      pattern: a pattern as in a shell, such as ``"*"`` or ``"graph/*"``.

    Returns:
      The rows of ``METHODS``, in their order.

    Raises:
      ValueError: if nothing matches.

    Example:
      >>> [method.stem for method in methods("optim/*")]
      ['samuel', 'dcl']
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
