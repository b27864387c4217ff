"""What compiling and a step take in a study on texts, measured once for a task and kept."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effjax.core.cost import hardware
from effjax.core.timing import agreed
from effjax.data.bucket_sampler import BucketSampler
from effjax.data.step_costs import StepCosts
from effjax.optim.batch_size import adamw_by_batch_size
from effjax.tasks.task import Task
from effjax.train.costs import from_first_process, measure_costs
from effjax.train.loaders import token_counts
from effjax.train.prepared import Prepared
from effjax.train.program import Loader, Program
from effjax.train.trainer import supervised

_KNOWN: dict[str, StepCosts] = {}
"""What this process has measured, so that all arms plan alike where nothing is kept in a folder."""


def study_costs(config: Any, task: Task) -> StepCosts:
    """The costs of AdamW steps on all of a task's network, in the shortest and the longest buckets of its texts.

    Measured once in a process, and kept where JAX keeps compiled programs: a run that is started again plans the same
    batches. Where it keeps none, or on another machine, a run may find another ladder and refuses to go on.

    Args:
      config: a study on texts: ``batch_size``, ``tokens`` and ``train`` count.
      task: of its arms.
    """
    if len(np.unique(task.train["input_ids"].lengths)) == 1:
        return StepCosts(compile_s=1.0, token_s=0.0)  # there is one ladder
    sampler = BucketSampler(
        task.train,
        seed=0,
        epochs=1,
        pad_id=task.tokenizer.pad_id,
        **{"max_shapes": 2, "cap": config.batch_size, "tokens": config.tokens},
    )
    program = supervised(
        task._replace(init=lambda key: task.init(jax.random.split(key)[0])),
        adamw_by_batch_size(1e-4, weight_decay=config.weight_decay, reference=config.batch_size),
        steps=1,
        loader=Loader(lambda seed: sampler, config.batch_size),
        options=config.train,
        counts=token_counts,
    )
    prepared = Prepared(program, config.train)
    key = _key(prepared, sampler.shapes)
    if key not in _KNOWN:
        _KNOWN[key] = _found(prepared, program, sampler, _path(key))
    return _KNOWN[key]


def _found(prepared: Prepared, program: Program, sampler: BucketSampler, path: Path | None) -> StepCosts:
    if agreed(int(path is not None and path.exists())):
        saved = json.loads(path.read_text()) if path is not None and path.exists() else StepCosts(1.0, 0.0)._asdict()
        return from_first_process(StepCosts(**saved))
    step, state = prepared.step(program.phases[0]), prepared.init(jax.random.key(0))
    costs = measure_costs(step, [(state, prepared.put(batch), None) for batch in sampler.example_batches()])
    if path is not None and jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(costs._asdict()))
        partial.replace(path)
    return costs


def _key(prepared: Prepared, shapes: Any) -> str:
    about = [str(prepared.abstract), shapes, hardware()]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _path(key: str) -> Path | None:
    """Where the costs of this step on this machine are kept."""
    folder = getattr(jax.config, "jax_compilation_cache_dir", None)
    return Path(folder) / "effjax_step_costs" / f"{key}.json" if folder and "://" not in folder else None
