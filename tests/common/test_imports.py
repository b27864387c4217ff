"""``import effjax`` is light, and the methods need nothing but jax, flax and optax."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from blocked import OPTIONAL, blocked

BLOCK = "from blocked import Blocker; import sys; sys.meta_path.insert(0, Blocker())\n"


def run(script: str, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light_and_touches_no_device():
    script = """
        import sys
        import jax
        before = set(sys.modules)
        import effjax
        new = set(sys.modules) - before
        assert len(new) < 10, new  # a number of modules and not of seconds, which depend on what else runs
        names = {name.partition(".")[0] for name in new}
        heavy = names & set(%r)
        assert not heavy, heavy
        from jax._src import xla_bridge  # no public name says whether a backend has been started
        assert not xla_bridge.backends_are_initialized()
        effjax.METHODS, dir(effjax), effjax.__version__
        assert not xla_bridge.backends_are_initialized()
        jax.numpy.zeros(1)
        assert xla_bridge.backends_are_initialized()  # so the checks above could have failed
    """
    run(script % (OPTIONAL,), "-W", "error")


def test_methods_import_with_only_jax_flax_and_optax():
    """Their doctests run so too, see ``conftest.py``; here nothing has been imported before."""
    script = """
        import inspect
        import operator
        import effjax

        for method in effjax.METHODS.values():
            modules = {}
            for name in method.names:
                value = operator.attrgetter(name.removeprefix("effjax."))(effjax)
                assert callable(value) and value.__doc__, f"{name} has no docstring"
                modules[inspect.getmodule(value).__name__] = inspect.getsource(inspect.getmodule(value))
            assert method.module in modules, f"{method.module} defines none of {method.names}"
            assert any(">>> " in source for source in modules.values()), f"{method.stem} has no doctest"
    """
    run(BLOCK + textwrap.dedent(script))


def test_the_blocker_blocks():
    with pytest.raises(AssertionError, match="safetensors is blocked by this test"):
        run(BLOCK + "import safetensors.numpy")


def test_the_block_holds_inside_only():
    import safetensors.numpy

    with blocked(), pytest.raises(ModuleNotFoundError, match="safetensors is blocked by this test"):
        import safetensors.numpy
    import safetensors.numpy as again

    assert again is safetensors.numpy
