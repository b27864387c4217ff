"""The public surface: what editors see, what is imported, and one convention for signatures."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import jedi
import pytest
import stubs

import effjax

ROOT = Path(__file__).resolve().parents[2]
# No value of a package may hide one of its files: `effjax.optim.samuel` is the module, `effjax.samuel` the method.
PUBLIC = {
    f"effjax.{namespace}.{name}": f"effjax.{namespace}.{module}"
    for namespace in stubs.NAMESPACES
    for module, names in stubs.names_by_module(namespace).items()
    for name in names
} | {f"effjax.{method.stem}": method.module for method in effjax.METHODS.values() if method.stem in dir(effjax)}


def value(path: str):
    return getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])


def functions() -> dict[str, inspect.Signature]:
    found = {path: value(path) for path in PUBLIC}
    return {path: inspect.signature(found[path]) for path in found if inspect.isfunction(found[path])}


FUNCTIONS = functions()


@pytest.mark.parametrize("namespace", stubs.NAMESPACES)
def test_stub_holds_what_the_modules_offer(namespace):
    """If this fails, run `python tests/common/stubs.py`."""
    assert (stubs.PACKAGE / namespace / "__init__.pyi").read_text() == stubs.stub(namespace)
    package = importlib.import_module(f"effjax.{namespace}")
    names = [name for names in stubs.names_by_module(namespace).values() for name in names]
    assert sorted(package.__all__) == sorted(names)
    assert len(set(names)) == len(names)
    for name in names:
        assert not inspect.ismodule(getattr(package, name)), name


def test_top_level_is_small_and_whole():
    assert len(effjax.__all__) <= 60
    for name in effjax.__all__:
        getattr(effjax, name)
    for method in effjax.METHODS.values():
        assert {method.stem, "BucketSampler"} & set(effjax.__all__)
        for path in method.names:
            assert callable(value(path)), path
    with pytest.raises(AttributeError, match="samuell"):
        effjax.samuell  # noqa: B018


def test_help_lists_every_method():
    listed = dict(re.findall(r"^ {4}(\w+) {2,}(\S.*)$", effjax.__doc__, flags=re.MULTILINE))
    named = {"bucket_sampler": "BucketSampler"}
    assert {named.get(stem, stem): row.summary for stem, row in effjax.METHODS.items()}.items() <= listed.items()


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("effjax.", {"samuel", "BucketSampler", "compare", "graph", "optim", "METHODS"}),
        ("effjax.graph.", {"spmm", "SparseMatrix", "gcn_adjacency", "fastrain_init", "GeeniConfig"}),
        ("effjax.optim.sam", {"samuel_init", "samuel_eval_params"}),
        ("effjax.train.", {"supervised", "Program", "fit"}),
    ],
)
def test_editors_complete(typed, wanted):
    found = {completion.name for completion in jedi.Script(f"import effjax\n{typed}").complete(2, len(typed))}
    assert wanted <= found


def test_editors_jump_to_the_definition():
    source = "import effjax\neffjax.graph.spmm"
    (found,) = jedi.Script(source).goto(2, len("effjax.graph.spmm"), follow_imports=True)
    assert Path(found.module_path) == stubs.PACKAGE / "graph/sparse/products.py"


def test_a_type_checker_refuses_names_and_arguments_that_are_not_there(tmp_path):
    lines = (
        "import effjax",
        "effjax.nope",
        "effjax.graph.nope",
        "effjax.optim.samuel_init({}, 3)",
        "effjax.optim.samuel_init({}, exports=3)",
        "from effjax.train import TrainOptions",
        "TrainOptions(accumulate='two')",
    )
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "pyrefly", "check", "--preset", "default", "--output-format", "min-text"]
    done = subprocess.run(
        [*command, "--search-path", str(ROOT), str(tmp_path / "user.py")], capture_output=True, text=True
    )
    wrong = {int(line) for line in re.findall(r"user\.py:(\d+)", done.stdout)}
    assert wrong == {2, 3, 5, 7}, done.stdout + done.stderr


def positional(signature: inspect.Signature) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter for parameter in signature.parameters.values() if parameter.kind in kinds]


# What a name must not be called, and what it is called.
TERMS = {
    "inner": "base",
    "optimizer": "tx",
    "opt": "state",
    "opt_state": "state",
    "rng": "key",
    "form": "loop or kernel",
    "network": "apply",
}


@pytest.mark.parametrize("path", FUNCTIONS)
def test_signature_keeps_the_one_convention(path):
    signature = FUNCTIONS[path]
    names = list(signature.parameters)
    placed = [parameter.name for parameter in positional(signature)]
    assert not set(names) & set(TERMS), {name: TERMS[name] for name in names if name in TERMS}
    assert len(placed) <= 5, placed
    if "key" in names:  # first where it is needed, by keyword where it is not
        optional = signature.parameters["key"].default is not inspect.Parameter.empty
        assert ("key" not in placed) if optional else placed[0] == "key"
    if {"state", "params"} <= set(placed):
        assert placed.index("state") < placed.index("params")
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("path", FUNCTIONS)
def test_docstring_says_what_goes_in_and_what_comes_out(path):
    text, signature = inspect.getdoc(value(path)) or "", FUNCTIONS[path]
    assert not signature.parameters or "Args:" in text
    assert signature.return_annotation is None or "Returns:" in text or "Yields:" in text
    described = re.findall(r"^  \**(\w+):", text.partition("Args:")[2].partition("\n\n")[0], re.MULTILINE)
    assert described == [name.strip("*") for name in signature.parameters]
    assert "raise " not in inspect.getsource(value(path)) or "Raises:" in text
    # A page of the reference is read alone: "the paper" has a name there.
    assert not re.search(r"\b[Tt]he paper", text) or re.search(r"\b(19|20)\d\d\b|arXiv", text)
