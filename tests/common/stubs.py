"""The ``__init__.pyi`` of every namespace, from the ``__all__`` of its modules.

``python tests/common/stubs.py`` writes them.

The stub is what ``lazy_loader`` reads at run time and what editors and type checkers read, so that the three agree. The
top level's own stub, ``effjax/__init__.pyi``, is written by hand: it is a choice.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "effjax"
NAMESPACES = ("data", "finetune", "graph", "models", "optim", "recurrent", "tasks", "train", "transformers")


def public_names(path: Path) -> list[str]:
    """What a module says that it offers, read and not imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return sorted(ast.literal_eval(node.value))
    return []


def offered(namespace: str) -> dict[str, list[str]]:
    """Module, as in ``sparse.matrix``, to the names that the namespace offers of it.

    A name that a file of the package carries too is offered at the top level alone: ``effjax.optim.samuel`` is a
    module.
    """
    folder = PACKAGE / namespace
    files = {path.stem for path in folder.iterdir()}
    found = {}
    for path in sorted(folder.rglob("*.py")):
        names = [name for name in public_names(path) if name not in files]
        if path.name != "__init__.py" and names:
            found[".".join(path.relative_to(folder).with_suffix("").parts)] = names
    return found


def stub(namespace: str) -> str:
    """The text of a namespace's ``__init__.pyi``."""
    lines = [
        f"from .{module} import {name} as {name}" for module, names in offered(namespace).items() for name in names
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name in NAMESPACES:
        (PACKAGE / name / "__init__.pyi").write_text(stub(name))
