"""Packages that a method must do without, and a place where they cannot be imported."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

OPTIONAL = (
    *("grain", "datasets", "orbax", "tyro", "rich", "matplotlib", "sklearn", "PIL", "safetensors", "pyarrow"),
    *("pandas", "torch", "transformers", "tokenizers", "huggingface_hub"),
)
BLOCKED = tuple(name for name in OPTIONAL if name != "rich")  # flax.linen itself imports rich


class Blocker:
    """An import finder that refuses them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked by this test", name=name)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Here they cannot be imported, even where they were before."""
    taken = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in BLOCKED}
    for name in taken:
        del sys.modules[name]
    finder = Blocker()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update(taken)
