"""Every method on every mesh: the batches, losses and final metrics of one device, or a refusal that says why."""

import json
import re
import socket
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from commands import Command
from mesh_cases import BOTH, DATA, FSDP, MESHES, TENSOR, built, crc_of, observe, stem_of, words_of

import effjax
from effjax.core.errors import NoEffectWarning
from effjax.study.resolve import resolve
from effjax.tasks.language import lm_task
from effjax.train.loop import Prepared
from effjax.train.options import MeshOptions, TrainOptions

CASES = sorted(MESHES)
RTOL = 1e-5
"""Of losses and metrics: sums of float32 in another order, carried through the steps of the tiny studies."""
WITHOUT_BATCHES = {"fastrain", "geeni", "hybrid"}
"""Their steps take a whole graph, or the outputs of two models on all rows, so that an axis of data repeats the work:
they say so."""

# They train networks before the study, on one device, which several processes do not have.
ONE_PROCESS = {"hybrid", "disk", "cola"}

# Case, words of the mesh -> why it cannot be.
REFUSED = {
    ("global_layer", TENSOR): r"conv1/kernel' of shape \(3, 3, 3, 3\) has 3 rows along the 'model' axis of 4 devices",
    ("samuel", ("--train.mesh.expert", "3")): r"has 4 rows along the 'expert' axis of 3 devices.*multiple of 3",
    ("irnn", ("--train.mesh.data", "3")): r"batch_size=8 is not divisible by the 3 devices.*multiple of 3",
    ("bucket_sampler", ("--train.mesh.data", "3")): r"batch_size=32 is not divisible by the 3 devices",
    ("cola, pretrained", ("--train.mesh.model", "3", "--train.mesh.rules", "tensor")): r"64 rows .* axis of 3 devices",
    ("dcl", ("--train.mesh.data", "3")): r"batch_size=16 is not divisible by the 3 devices.*multiple of 3",
    ("dcl", ("--train.mesh.data", "16")): r"needs 16 devices and 8 are there",
    ("dcl", ("--train.mesh.rules", "fsdp")): r"splits parameters over mesh\.data, which is 1",
    ("dcl", ("--train.mesh.data", "-1", "--train.mesh.model", "-1")): r"only one axis may be -1",
}


def test_every_method_has_a_row():
    assert {stem_of(case) for case in MESHES} == set(effjax.METHODS)
    assert all(DATA in MESHES[stem].meshes for stem in effjax.METHODS)
    assert {mesh for row in MESHES.values() for mesh in row.meshes} > {DATA, FSDP, BOTH, TENSOR}


def check_same(found, wanted, atol):
    assert "error" not in found, found["error"]
    assert found["batches"] == wanted["batches"]
    np.testing.assert_allclose(found["losses"], wanted["losses"], rtol=RTOL, atol=1e-6)
    assert found["metrics"].keys() == wanted["metrics"].keys()
    for name, value in wanted["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=RTOL, abs=atol), name


@pytest.fixture(scope="module")
def on_one_device():
    """What each case shows on one device, observed once."""
    known = {}
    return lambda case: known.get(case) or known.setdefault(case, observe(case, words_of(case)))


# By day one method; the others with `-m nightly`.
BY_DAY = "dcl"
ON_MESHES = [
    pytest.param(case, mesh, id=f"{case}-{index}", marks=[] if (case, index) == (BY_DAY, 0) else [pytest.mark.nightly])
    for case in CASES
    for index, mesh in enumerate(MESHES[case].meshes)
]


@pytest.mark.once
@pytest.mark.parametrize(("case", "mesh"), ON_MESHES)
def test_eight_devices_show_what_one_shows(case, mesh, on_one_device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # see below
        found = observe(case, words_of(case, mesh))
    assert found["losses"]
    check_same(found, on_one_device(case), MESHES[case].atol)


TARGET = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from effjax.train.mesh import start_distributed
start_distributed(required=True)
from mesh_cases import main
main(sys.argv[1:])
"""


def in_processes(count, out, mesh, cases):
    """What the cases show in some processes of one device each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    commands = [
        Command(out, mesh, *cases, target=TARGET, environment={**shared, "JAX_PROCESS_ID": str(index)})
        for index in range(count)
    ]
    said = [command.communicate(timeout=1200) for command in commands]
    assert [command.returncode for command in commands] == [0] * count, said
    return {found["case"]: found for found in map(json.loads, out.read_text().splitlines())}


@pytest.mark.nightly
@pytest.mark.study
@pytest.mark.parametrize("third", range(3))
def test_two_processes_show_what_one_shows(third, tmp_path, on_one_device):
    cases = CASES[third::3]
    found = in_processes(2, tmp_path / "found", "--train.mesh.data 2", cases)
    for case in cases:
        if case in ONE_PROCESS:
            assert "needs 1 devices and 2 are there" in found[case]["error"]
        else:
            check_same(found[case], on_one_device(case), MESHES[case].atol)


@pytest.mark.nightly
@pytest.mark.study
def test_four_processes_show_what_one_shows(tmp_path, on_one_device):
    cases = ("dcl", "token_drop")
    found = in_processes(4, tmp_path / "found", "--train.mesh.data 4", cases)
    for case in cases:
        check_same(found[case], on_one_device(case), MESHES[case].atol)


@pytest.mark.nightly
@pytest.mark.study
@pytest.mark.parametrize(
    ("mesh", "case"),
    [("--train.mesh.expert 4", "samuel"), ("--train.mesh.data 2 --train.mesh.model 2", "dcl")],
)
def test_processes_that_share_rows_are_refused(mesh, case, tmp_path):
    """Each of them reads rows of its own, which JAX would take for all of a batch."""
    found = in_processes(4, tmp_path / "found", mesh, (case,))
    assert re.search(
        r"its devices hold \d+ of them. Give the axis 'data' a multiple of 4 devices", found[case]["error"]
    )


PARTS = [
    pytest.param(case, marks=[] if case == BY_DAY else [pytest.mark.nightly])
    for case in CASES
    if case not in WITHOUT_BATCHES
]


@pytest.mark.once
@pytest.mark.parametrize("case", PARTS)
def test_the_parts_of_all_processes_are_the_batch_of_one(case, monkeypatch):
    _, program = built(case, words_of(case))

    def opened(process, count):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        return program.loader.open(3)

    whole = opened(0, 1)
    parts = {count: [opened(process, count) for process in range(count)] for count in (2, 4)}
    for _ in range(3):
        batch = next(whole)
        for sources in parts.values():
            columns = [jax.tree.leaves(next(source)) for source in sources]
            joined = [np.concatenate(rows) for rows in zip(*columns, strict=True)]
            assert crc_of(joined) == crc_of(jax.tree.leaves(batch))


REFUSALS = [
    pytest.param(*case, words, id=case[0], marks=[] if case[0] == BY_DAY else [pytest.mark.nightly])
    for case, words in REFUSED.items()
]


@pytest.mark.once
@pytest.mark.parametrize(("case", "mesh", "words"), REFUSALS)
def test_what_cannot_be_is_refused(case, mesh, words):
    with pytest.raises(ValueError, match=words):
        prepare(case, mesh)


def prepare(case, mesh):
    """All that is checked before the first step is compiled."""
    config, program = built(case, words_of(case, mesh))
    Prepared(program, config.train)


@pytest.mark.once
def test_where_parameters_are_split_pretrained_ones_are_read_in_parts():
    config = resolve("cola:smoke", FSDP).config
    assert config.made["mesh"] is config.train.mesh.built
    assert config.made["rules"] == "fsdp"
    assert not {"mesh", "rules"} & resolve("cola:smoke", DATA).config.made.keys()
    with pytest.raises(ValueError, match="mesh and param_dtype are for pretrained parameters"):
        lm_task(model=nn.Dense(1), mesh=config.train.mesh.built)


@pytest.mark.once
def test_an_axis_of_data_that_only_repeats_the_work_is_told():
    import toy

    with pytest.warns(NoEffectWarning, match=r"mesh\.data=8 only repeats the work .* a step takes no batches"):
        Prepared(toy.toy(2)._replace(loader=None), TrainOptions(mesh=MeshOptions(data=8)))
