"""``import effjax`` is light, and the methods need nothing but jax, flax and optax."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

import effjax

OPTIONAL = (
    *("grain", "datasets", "orbax", "tyro", "rich", "matplotlib", "sklearn", "PIL", "safetensors", "pyarrow"),
    *("pandas", "torch", "transformers", "tokenizers", "huggingface_hub"),
)
BLOCKED = tuple(name for name in OPTIONAL if name != "rich")  # flax.linen itself imports rich
BLOCK = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked by this test", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(script: str, *flags: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(script)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_less_than_a_third_of_a_second_beyond_jax():
    script = """
        import time
        import jax
        start = time.perf_counter()
        import effjax
        print(time.perf_counter() - start)
    """
    # The least of several: the rest is what else the machine is doing.
    assert min(float(run(script)) for _ in range(3)) < 0.3


def test_import_is_light_and_touches_no_device():
    script = """
        import sys
        before = set(sys.modules)
        import effjax
        names = {name.partition(".")[0] for name in set(sys.modules) - before}
        heavy = names & set(%r)
        assert not heavy, heavy
        from jax._src import xla_bridge  # no public name says whether a backend has been started
        assert not xla_bridge.backends_are_initialized()
        effjax.METHODS, dir(effjax), effjax.__version__
        assert not xla_bridge.backends_are_initialized()
        import jax
        jax.numpy.zeros(1)
        assert xla_bridge.backends_are_initialized()  # so the checks above could have failed
    """
    run(script % (OPTIONAL,), "-W", "error")


@pytest.fixture(scope="module")
def complaints() -> dict[str, str]:
    """What goes wrong with each method where the optional packages are blocked, from one process for all."""
    script = """
        import doctest, inspect, json, operator, traceback
        import effjax

        def check(method):
            modules = {}
            for name in method.names:
                value = operator.attrgetter(name.removeprefix("effjax."))(effjax)
                assert callable(value) and value.__doc__, f"{name} has no docstring"
                modules[inspect.getmodule(value).__name__] = inspect.getmodule(value)
            assert method.module in modules, f"{method.module} defines none of {method.names}"
            # Doctests are the smallest complete runs of a method.
            results = [doctest.testmod(module) for module in modules.values()]
            assert any(result.attempted for result in results), "no doctest"
            assert not any(result.failed for result in results), "a doctest fails; its report is in the captured output"

        complaints = {}
        for stem, method in effjax.METHODS.items():
            try:
                check(method)
            except Exception:
                complaints[stem] = traceback.format_exc()
        print()
        print(json.dumps(complaints))
    """
    # Tiny programs: compiling takes longer than running them.
    output = run(BLOCK + textwrap.dedent(script), JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    print(output)  # a failed doctest's report
    return json.loads(output.splitlines()[-1])


@pytest.mark.study  # as long as a study: all doctests once more, so that the second Python leaves it out
@pytest.mark.parametrize("stem", list(effjax.METHODS))
def test_method_imports_and_runs_with_only_jax_flax_and_optax(stem, complaints):
    assert effjax.METHODS[stem].stem == stem
    assert stem not in complaints, complaints[stem]


def test_the_blocker_blocks():
    with pytest.raises(AssertionError, match="safetensors is blocked by this test"):
        run(BLOCK + "import safetensors.numpy")
