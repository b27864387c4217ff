"""Training: the one trainer, the programs that it makes, and the loop that runs them."""

import importlib
from typing import Any

_NAMES = {
    "supervised": "trainer",
    "TrainState": "trainer",
    "through_time": "sequence_trainer",
    "Program": "program",
    "Phase": "program",
    "Loader": "program",
    "column_loader": "loaders",
    "planned_loader": "loaders",
    "fit": "loop",
    "Budget": "options",
    "TrainOptions": "options",
    "MeshOptions": "options",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'effjax.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"effjax.train.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
