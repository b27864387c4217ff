"""The ``__init__.pyi`` of every namespace, from the ``__all__`` of its modules.

``python tests/common/stubs.py`` writes them.

The stub is what ``lazy_loader`` reads at run time and what editors and type checkers read, so that the three agree. The
top level's own stub, ``effjax/__init__.pyi``, is written by hand: it is a choice.
"""

from pathlib import Path

from effjax.catalogue import offered

PACKAGE = Path(__file__).resolve().parents[2] / "effjax"
NAMESPACES = (
    "data",
    "finetune",
    "graph",
    "hardness",
    "models",
    "optim",
    "recurrent",
    "tasks",
    "train",
    "transformers",
    "vision",
)


def names_by_module(namespace: str) -> dict[str, list[str]]:
    """Module, as in ``sparse.matrix``, to the names that the namespace offers of it.

    A name that a file of the package carries too is offered at the top level alone: ``effjax.optim.samuel`` is a
    module.
    """
    folder = PACKAGE / namespace
    files = {path.stem for path in folder.iterdir()}
    found = {}
    for path in sorted(folder.rglob("*.py")):
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        names = [name for name in offered(f"effjax.{namespace}.{module}") if name not in files]
        if names:
            found[module] = names
    return found


def stub(namespace: str) -> str:
    """The text of a namespace's ``__init__.pyi``."""
    found = names_by_module(namespace).items()
    return "".join(f"from .{module} import {name} as {name}\n" for module, names in found for name in names)


if __name__ == "__main__":
    for name in NAMESPACES:
        (PACKAGE / name / "__init__.pyi").write_text(stub(name))
