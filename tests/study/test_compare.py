"""What a comparison's folder refuses."""

import json

import pytest

from effjax.study.compare import _Comparison, compare
from effjax.study.progress import Progress
from effjax.study.resolve import resolve
from effjax.train.logging import write_json
from effjax.train.loop import Prepared, fit

TINY = ["--budget.amount", "20", "--grid", "0.1", "--arms", "sgd-*"]


def comparison(out, *words):
    return _Comparison(resolve("samuel:smoke", [*TINY, *words]), out, False, Progress(quiet=True), True)


def test_a_run_is_not_continued_on_other_data(tmp_path):
    begun = comparison(tmp_path)
    assert begun._claim_folder() is None
    write_json(begun.work / "cost.json", {"digits-mlp-64-shift/sgd-0.1": {"step_ms": 1.0, "compile_s": 1.0}})
    write_json(begun.work / "sources.json", ["digits/MLP: EFFJAX_DATA (train 5 rows)"])
    with pytest.raises(ValueError, match=r"other data:\s+there .*EFFJAX_DATA \(train 5 rows\).*\s+here .*built-in"):
        begun._costs()


def test_a_folder_of_another_config_is_refused_while_running_and_when_finished(tmp_path):
    comparison(tmp_path)._claim_folder()
    with pytest.raises(ValueError, match=r"momentum: 0\.9 there, 0\.5 here"):
        comparison(tmp_path, "--momentum", "0.5")._claim_folder()
    (tmp_path / ".work" / "identity.json").unlink()
    (tmp_path / ".work").rmdir()
    arms = {"g/a": {"group": "g", "metrics": {"x": 1}}}
    done = {"schema": 2, "preset": "cpu", "arms": arms, "groups": {"g": {}}, "claims": [], "environment": {}}
    done = comparison(tmp_path / "other")._identity() | done | {"seeds": [0], "budget": {}}
    (tmp_path / "results.json").write_text(json.dumps(done))
    with pytest.raises(ValueError, match="preset: 'cpu' there, 'smoke' here"):
        comparison(tmp_path)._claim_folder()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("identity.json", None, "identity.json is missing. Delete .*.work to start again"),
        ("identity.json", '{"study": "sam', "identity.json is cut short or damaged"),
        ("cost.json", "[]", "cost.json is not what this version of effjax writes: .*Delete it to measure again"),
        ("cost.json", '{"digits-mlp-64-shift/sgd-0.1": {}}', "lacks 'step_ms'"),
        ("sources.json", "{}", "sources.json is not what"),
        ("arms/digits-mlp-64-shift/sgd-0.1/0/done.json", '{"status": "ok"}', "lacks .*to train this seed again"),
    ],
)
def test_a_damaged_working_file_is_named_and_nothing_is_mixed(tmp_path, name, text, words):
    begun = comparison(tmp_path)
    begun._claim_folder()
    costs = {"digits-mlp-64-shift/sgd-0.1": {"step_ms": 1.0, "compile_s": 1.0}}
    write_json(begun.work / "cost.json", costs)
    write_json(begun.work / "sources.json", [])
    path = begun.work / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True) if text is None else path.write_text(text)

    def read_all():
        again = comparison(tmp_path)
        again._claim_folder()
        again._finished("digits-mlp-64-shift/sgd-0.1", 0)
        again._costs()

    with pytest.raises(ValueError, match=words):
        read_all()


def test_a_run_that_fails_before_it_trains_leaves_no_folder(tmp_path):
    study = resolve("samuel:smoke", [*TINY, "--train-rows", "999999"])
    with pytest.raises(ValueError, match="train_rows=999999"):
        compare(study, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / ".work").exists()
    assert not (tmp_path / "out" / ".lock").exists()


@pytest.mark.study
def test_experts_spread_over_a_mesh_learn_what_they_learn_on_one_device():
    losses = []
    for words in ([], ["--train.mesh.expert", "5"]):
        study = resolve("samuel:smoke", ["--budget.amount", "40", *words])
        program = study.build("digits-mlp-64-shift/samuel")
        prepared = Prepared(program, study.config.train)
        result = fit(program, 0, options=study.config.train, prepared=prepared)
        assert prepared.compiles == program.compiles
        kernel = result.state.params["layer0"]["Dense_0"]["kernel"]
        assert len({str(shard.index) for shard in kernel.addressable_shards}) == (5 if words else 1)
        losses.append(result.train["online_loss"])
    assert abs(losses[0] / losses[1] - 1) < 1e-3, losses
