"""What a comparison's folder refuses."""

import json

import pytest

from effjax.study.compare import _Comparison, compare
from effjax.study.progress import Progress
from effjax.study.resolve import resolve
from effjax.train.logging import write_json
from effjax.train.loop import Prepared, fit

TINY = ["--settings", "shift", "--budget.amount", "20", "--grid", "0.1", "--arms", "sgd-*"]


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


ARM = "digits-mlp-64-shift/sgd-0.1"


def test_a_finished_arm_of_another_config_is_not_taken_over(tmp_path):
    """As where identity.json was lost and written anew."""
    first = comparison(tmp_path)
    first._claim_folder()
    run = {"status": "ok", "metrics": {}, "train_s": 1.0, "evaluate_s": 1.0, "compiles": 1}
    path = first._folder(ARM, 0) / "done.json"
    write_json(path, {**run, "identity": first._arm_identity(ARM, 0)})
    assert first._finished(ARM, 0) == run
    other = comparison(tmp_path, "--momentum", "0.5")
    with pytest.raises(ValueError, match=r"(?s)of another run:.*momentum: 0\.9 there, 0\.5 here.*to train this seed"):
        other._finished(ARM, 0)
    copied = first._folder(ARM, 1) / "done.json"
    write_json(copied, json.loads(path.read_text()))
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        first._finished(ARM, 1)


def test_a_folder_continues_on_another_mesh_and_measures_anew(tmp_path):
    one = comparison(tmp_path)
    one._claim_folder()
    cost = {"step_ms": 1.0, "compile_s": 1.0}
    _, programs = one._costs()
    eight = comparison(tmp_path, "--train.mesh.data", "8", "--train.checkpoint-seconds", "1", "--train.keep", "3")
    eight._claim_folder()
    eight.sources = one.sources
    write_json(one.work / "cost.json", {ARM: {**cost, "devices": {}}})
    assert one._known_costs(one.work / "cost.json", programs)[ARM]["step_ms"] == 1.0
    assert eight._known_costs(one.work / "cost.json", programs) == {}
    assert eight.study.default_out == one.study.default_out
    with pytest.raises(ValueError, match=r"train\.dtype"):
        comparison(tmp_path, "--train.dtype", "bfloat16")._claim_folder()


def test_what_a_kill_leaves_of_a_folder_is_swept(tmp_path):
    begun = comparison(tmp_path)
    (begun.work).mkdir()
    (begun.work / "identity.json.partial").write_text('{"stu')
    assert begun._claim_folder() is None
    assert json.loads((begun.work / "identity.json").read_text()) == begun._identity()
    write_json(begun.work / "identity.json", {"of": "another"})
    (begun.work / "arms" / "0").mkdir(parents=True)
    write_json(begun.work / "removed.json", {})  # the mark of a removal that was cut short
    assert begun._claim_folder() is None
    assert [path.name for path in begun.work.iterdir()] == ["identity.json"]
    begun._remove_work()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.study
@pytest.mark.parametrize(
    ("words", "arms"),
    [
        (["--experts", "1e30", "1e29", "--arms", "sgd-*", "samuel"], {"samuel": "diverged", "sgd-0.1": "ok"}),
        (["--grid", "1e30", "--experts", "1e30", "1e29", "--arms", "sgd-*", "samuel"], {"samuel": "diverged"}),
        (["--grid", "--cosine-grid", "--arms", "samuel", "uniform"], {"samuel": "ok"}),
    ],
)
def test_arms_that_diverged_and_empty_grids_cost_nothing_but_their_claims(tmp_path, words, arms):
    grid = [] if "--grid" in words else ["--grid", "0.1"]
    study = resolve("samuel:smoke", ["--settings", "shift", "--budget.amount", "20", "--seeds", "0", *grid, *words])
    found = compare(study, out=tmp_path, quiet=True)
    by_name = {name.partition("/")[2]: arm["status"] for name, arm in found["arms"].items() if "-shift" in name}
    assert arms.items() <= by_name.items()
    about = [claim for claim in found["claims"] if "samuel" in claim["text"] and "-shift" in claim["group"]]
    assert about
    assert all(("undecided" in claim) == (arms["samuel"] == "diverged") for claim in about)
    assert (tmp_path / "report.md").exists()
    again = compare(study, out=tmp_path, quiet=True)  # finished: nothing is trained again
    assert again["environment"]["date"] == found["environment"]["date"]
