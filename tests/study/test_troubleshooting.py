"""The page of error messages quotes messages that the source holds, and mistakes that users make lead to them."""

import ast
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax

ROOT = Path(__file__).resolve().parents[2]
# A line that begins with a quoted message; those of Flax and JAX say so.
QUOTED = re.findall(r"^`([^`]+)`( \(\w+\))?\n:", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)


def pieces(text: str) -> list[str]:
    """What a quotation says beside what varies."""
    return [piece.strip(" ,.:()") for piece in text.split("...") if piece.strip(" ,.:()")]


def messages() -> str:
    """All texts of the source, those with values in them with ... in their place."""
    found = []
    for path in (ROOT / "effjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_quoted_messages_stand_in_the_source():
    source, own = messages(), [text for text, other in QUOTED if not other]
    assert len(own) > 18
    assert [text for text in own if not all(piece in source for piece in pieces(text))] == []


PARAMS = {"w": np.zeros((2, 3), np.float32)}
ONE = lambda base=optax.sgd: effjax.optim.samuel_one_gradient(base, (0.1, 0.01))
SAMUEL = lambda: effjax.samuel(optax.sgd, (0.1, 0.01, 0.001), period=10)
COLUMNS = {"x": np.zeros((4, 2), np.float32), "z": np.zeros(4, np.float32), "label": np.array([0, 1, 0, 1])}
DENSE = (lambda key: {}, lambda params, x, *, key=None: x)
MISTAKES = {
    "samuel_one_gradient needs": lambda: ONE().update(PARAMS, ONE().init(PARAMS), PARAMS),
    "must be a function of the learning rate": lambda: ONE(optax.adam(1e-3)),
    "the number of experts": lambda: SAMUEL().init(PARAMS),
    "is not a registered data set": lambda: effjax.load_data("messages.csv"),
    "Name those of the network": lambda: effjax.task(DENSE, {"train": COLUMNS, "test": COLUMNS}),
    "holds NaN or infinity in": lambda: effjax.task(DENSE, {"train": COLUMNS | {"x": jnp.nan * COLUMNS["x"]}} | EMPTY),
}
EMPTY = {"test": COLUMNS}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_lead_to_the_quoted_messages(words):
    assert any(words in text for text, _ in QUOTED)
    with pytest.raises((ValueError, TypeError), match=words):
        MISTAKES[words]()
