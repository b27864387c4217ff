"""Every row of METHODS has joined every matrix that its kind asks for, and has all its rooms."""

from pathlib import Path

import optimizer_cases
import public_calls
import pytest
import study_cases

import effjax

ROOT = Path(__file__).resolve().parents[2]
METHODS = list(effjax.METHODS.values())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.stem)
def test_method_is_in_the_matrices_of_its_kind(method):
    assert method.stem in study_cases.TINY
    assert method.stem in public_calls.CASES
    if "Optax" in method.kind:
        assert method.stem in {case.stem for case in optimizer_cases.CASES.values()}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.stem)
def test_method_has_all_its_rooms(method):
    family = method.module.split(".")[1]
    for path in (
        f"effjax/{family}/{method.stem}.py",
        f"effjax/recipes/{method.stem}.py",
        f"configs/{method.stem}/README.md",
        f"configs/{method.stem}/presets.py",
        f"tests/{family}/test_{method.stem}.py",
    ):
        assert (ROOT / path).exists(), path
    card = (ROOT / "configs" / method.stem / "README.md").read_text()
    for name in method.names:
        assert f"`{name.rpartition('.')[2]}`" in card
    for texts in ((ROOT / "notebooks").glob("*.py"), [ROOT / "CHANGELOG.md"]):
        assert any(name in path.read_text() for path in texts for name in method.names)
    assert list((ROOT / "configs" / method.stem / "results").glob("*.json"))


def test_names_are_listed_once_and_public():
    names = [name for method in METHODS for name in method.names]
    assert len(names) == len(set(names))


def test_unknown_patterns():
    with pytest.raises(ValueError, match="matches none"):
        effjax.methods("nothing*")
