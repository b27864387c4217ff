"""No import runs up: core < families and models < tasks < train < recipes < study < cli."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import effjax

pytestmark = pytest.mark.once

PACKAGE = Path(effjax.__file__).parent
FAMILIES = ("optim", "finetune", "recurrent", "transformers", "vision", "hardness", "graph")
FLOORS = {
    "core": 0,
    **dict.fromkeys(FAMILIES, 1),
    "data": 1,
    "models": 1,
    "tasks": 2,
    "train": 3,
    "recipes": 4,
    "study": 5,
    "catalogue": 6,
    "cli": 6,
    "__main__": 7,
}


def targets(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a module imports, in functions and under conditions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def complaints(part: str, source: str, package: str) -> list[str]:
    """What a module of ``part`` imports and must not."""
    found = []
    for line, name in targets(source, package):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if top != "effjax" or other == part:
            continue
        if other not in FLOORS:
            # `import effjax` and `from effjax import __version__` are for those above the methods.
            legal = FLOORS[part] >= FLOORS["study"]
        elif FLOORS[other] == FLOORS[part]:
            # Models take a family's layers as arguments, and families stand apart. But graph networks are graph
            # layers, what is constrained in selective training and in DiSK is constrained by DCL, vision methods put
            # their blocks into the image models, AxFormer makes transformers smaller, and a cascade over sizes of an
            # input is one of the cascades of hardness, with its thresholds.
            legal = other == "data" or (part, other) in (
                ("models", "graph"),
                ("hardness", "optim"),
                ("vision", "models"),
                ("transformers", "hardness"),
                ("transformers", "models"),
            )
        else:
            legal = FLOORS[other] < FLOORS[part]
        if not legal:
            found.append(f"line {line}: {part} imports {name}")
    return found


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_import_runs_up(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] == "configs":  # presets: values of the recipes' configs
        pytest.skip("presets stand above the recipes")
    assert parts[0] in FLOORS, f"{parts[0]} has no floor: add it to this table and to the design"
    package = ".".join(("effjax", *parts[:-1]))
    assert complaints(parts[0], path.read_text(), package) == []


def test_packages_import_none_of_their_modules_before_they_are_used():
    for path in PACKAGE.glob("*/__init__.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert ast.unparse(node) == "import lazy_loader", path


@pytest.mark.parametrize(
    ("part", "source", "bad"),
    [
        ("optim", "from effjax.core.tree import select\nfrom effjax.data import sources", 0),
        ("optim", "def f():\n    from effjax.train.loop import fit", 1),
        ("optim", "from effjax.models import resnet", 1),
        ("models", "from effjax.graph.sparse.layers import gcn", 0),
        ("models", "from effjax.recurrent import irnn", 1),
        ("optim", "from effjax import vision", 1),
        ("optim", "from ..graph import x", 1),
        ("optim", "from .lora import x", 0),
        ("core", "import effjax.optim.samuel", 1),
        ("core", "import effjax", 1),
        ("study", "import effjax\nfrom effjax.recipes import samuel", 0),
        ("train", "if True:\n    import effjax.recipes.samuel as s", 1),
        ("study", "from effjax import cli", 1),
        ("data", "from effjax.models import resnet", 1),
    ],
)
def test_the_check_itself(part, source, bad):
    assert len(complaints(part, source, f"effjax.{part}")) == bad
