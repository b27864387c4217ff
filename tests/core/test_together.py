"""What several processes do all or none; here the others are played."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from effjax.core.together import ElsewhereError, together


@pytest.fixture
def others(monkeypatch):
    """A second process, whose answers are taken from a list, and what this one said."""
    answers, said = [], []

    def gather(mine):
        said.append(bool(mine))
        return np.array([bool(mine), answers.pop(0)])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    return answers, said


def refuse():
    raise FileNotFoundError("no such file here")


def test_one_that_is_refused_and_one_that_hears_of_it(others):
    answers, said = others
    answers += [False, False, True]
    assert together(lambda: 3) == 3
    with pytest.raises(FileNotFoundError):
        together(refuse)
    with pytest.raises(ElsewhereError, match="process 1 of this run was refused"):
        together(lambda: 3)
    assert said == [False, True, False]


@pytest.mark.parametrize(("inner", "error"), [(refuse, FileNotFoundError), (lambda: 3, ElsewhereError)])
def test_an_inner_refusal_is_told_once(others, inner, error):
    answers, said = others
    answers.append(error is ElsewhereError)
    with pytest.raises(error):
        together(lambda: together(inner))
    assert len(said) == 1
