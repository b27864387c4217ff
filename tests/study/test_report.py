"""The report: what it says of clocks that disagree, of arms that failed or did nothing, and what to take."""

import json
import math

import pytest
from made import arm, claim, results

from effjax.study.advice import chosen, clocks, level, pays, take
from effjax.study.report import hardware_name, read_results, render, write_report
from effjax.study.results_view import Results

ACCURACY = {"name": "accuracy", "goal": "max", "label": "test accuracy"}
SECONDS = {
    "buckets": arm([0.80, 0.82], train=5.0, compiling=60.0, role="method", label="BucketSampler", examples=1000),
    "static": arm([0.81, 0.82], train=30.0, compiling=8.0, examples=1000),
    "bad": arm([0.50, 0.51], train=1.0, compiling=0.5, examples=1000),
}


def named(arms):
    return {f"g/{name}": found for name, found in arms.items()}


# What is level with the best


def test_level_is_within_one_standard_error_of_the_paired_difference():
    arms = named(
        {
            "best": arm([0.90, 0.92, 0.94]),
            "noisy": arm([0.80, 0.93, 0.95]),  # behind by 0.0267, with an error of 0.0367
            "steady": arm([0.89, 0.91, 0.93]),  # behind by 0.01 in every seed: no error
            "lost": arm([0.99, math.nan, 0.99]),
        }
    )
    assert level(arms, ACCURACY) == ["g/best", "g/noisy"]
    losses = {**ACCURACY, "goal": "min"}
    assert level(named({"low": arm([0.1, 0.3]), "high": arm([0.2, 0.21]), "far": arm([0.8, 0.9])}), losses) == [
        "g/low",
        "g/high",
    ]


def test_one_seed_has_no_error():
    arms = named({"best": arm([0.9]), "same": arm([0.9]), "near": arm([0.8999])})
    assert level(arms, ACCURACY) == ["g/best", "g/same"]


# What was trained on


def test_data_of_ones_own_are_told_in_a_paragraph_and_in_short_at_the_end():
    source = "mine/mlp: /a/b.csv (train 8, test 2, 2 classes): Rows: 8 train, 2 test. 2 classes: x (4 + 1), y (4 + 1)."
    found = render(results(SECONDS, data=[source], config={"train_rows": 4, "test_rows": None}))
    (paragraph,) = [line for line in found.splitlines() if line.startswith("**Data**")]
    assert paragraph == (
        "**Data**: mine/mlp: /a/b.csv: Rows: 8 train, 2 test. 2 classes: x (4 + 1), y (4 + 1). Of the training rows 4 "
        "were used (train_rows)."
    )
    assert "This holds for: mine/mlp: /a/b.csv (train 8, test 2, 2 classes); 1,200 steps per run;" in found


def test_a_cache_of_compiled_programs_is_told():
    environment = {**results(SECONDS)["environment"], "compile_cache": True}
    assert "compile and total seconds may be less" in render(results(SECONDS, environment=environment))
    assert "compile and total seconds may be less" not in render(results(SECONDS))


# Clocks that disagree


def test_an_arm_that_trains_fastest_but_compiles_long_pays_from_a_number_of_examples_on():
    (sentence,) = clocks(named(SECONDS), ACCURACY)
    # The worse arm `bad` is faster by either clock.
    assert sentence.startswith(
        "Among `static` and `buckets`, `buckets` trains fastest (5 s) but compiles for 60 s: in total `static` is"
    )
    assert "(38.5 s against 65.5 s)" in sentence
    # 52 s more of compiling, 25 s less per 1,000 examples
    assert "pays from about 2,080 examples on (2.08 times this run)" in sentence
    assert sentence in render(results(SECONDS))


def test_without_their_number_the_examples_follow_from_the_pace():
    slow, fast = (json.loads(json.dumps(SECONDS[name])) for name in ("static", "buckets"))
    for found in (slow, fast):
        del found["cost"]["examples"]
    assert pays(fast, slow) == "pays from about 2.08 times this run on"
    fast["cost"]["examples_per_s"] = 400.0
    assert pays(fast, slow) == "pays from about 4,160 examples on (2.08 times this run)"


def test_an_arm_that_trains_less_because_it_sees_less_never_pays():
    few = arm([0.8, 0.82], train=5.0, compiling=60.0, examples=100)
    many = arm([0.8, 0.82], train=30.0, compiling=8.0, examples=1000)
    assert pays(few, many).startswith("never pays")
    assert "`few` never pays" in clocks(named({"few": few, "many": many}), ACCURACY)[0]


def test_equal_orders_and_differences_within_the_grain_of_the_clock_say_nothing():
    same = {"a": arm([0.8, 0.9], train=1.0), "b": arm([0.8, 0.9], train=2.0)}
    assert clocks(named(same), ACCURACY) == []
    grain = {"a": arm([0.8, 0.9], train=1.000, compiling=2.0), "b": arm([0.8, 0.9], train=1.001, compiling=1.0)}
    assert clocks(named(grain), ACCURACY) == []
    unknown = {name: arm([0.8, 0.9], train=train, compiling=9 - train) for name, train in (("a", 1.0), ("b", 2.0))}
    unknown["a"]["cost"]["total_s"] = None
    assert clocks(named(unknown), ACCURACY) == []


def test_slow_evaluation_is_named_as_what_it_is():
    slow = arm([0.8, 0.9], train=1.0)
    slow["cost"] |= {"evaluate_s": 20.0, "total_s": 22.0}
    (sentence,) = clocks(named({"slow": slow, "quick": arm([0.8, 0.9], train=2.0)}), ACCURACY)
    assert "`slow` trains fastest (1 s) but evaluates for 20 s: in total `quick` is faster" in sentence


def test_the_whole_order_is_told_where_more_than_the_fastest_differs():
    arms = {"a": arm([0.8, 0.9], 1, 9), "b": arm([0.8, 0.9], 2, 5), "c": arm([0.8, 0.9], 3, 1)}
    assert clocks(named(arms), ACCURACY)[1] == (
        "Fastest first, by training time: `a`, `b`, `c`; by total time: `c`, `b`, `a`."
    )


# What to take


def test_take_names_the_least_total_time_of_those_level_with_the_best():
    lines = take(results(SECONDS), "g")
    assert lines[0].startswith("Take `static` (test accuracy 0.815 ± 0.00707, 38.5 s in total, 30 s of training")
    assert lines[0].endswith(
        "the least total time of the arms within one standard error of the best test accuracy (the others: `buckets`)."
    )
    assert "Cheaper and worse: `bad` (2 s, 0.505 ± 0.00707)." in lines
    assert not any(line.startswith(("Best", "One seed")) for line in lines)
    last = [line for line in render(results(SECONDS)).splitlines() if line][-1]
    assert last == (
        "This holds for: digits (train 1437 rows); 1,200 steps per run; seeds 0, 1; AMD EPYC, 1 core. Another size or "
        "machine may order the arms differently."
    )


def test_best_quality_and_least_memory_are_named_where_they_are_other_arms():
    arms = {
        "quick": arm([0.80, 0.84], train=1.0, peak=3e6),
        "best": arm([0.84, 0.83], train=5.0, peak=2e6),
        "small": arm([0.79, 0.85], train=6.0, peak=1e6),
    }
    lines = take(results(arms), "g")
    assert lines[0].startswith("Take `quick`")
    assert lines[1].startswith("Best test accuracy: `best`")
    assert lines[2].startswith("Least memory within one standard error of the best test accuracy: `small`")


def test_with_one_seed_the_best_is_taken_and_the_doubt_is_told():
    lines = take(results({"a": arm([0.8]), "b": arm([0.9])}, seeds=[0]), "g")
    assert lines[0].startswith("Take `b`")
    assert lines[0].endswith(": the best test accuracy.")
    assert "One seed: no spread is known, and a difference may be chance." in lines


def test_neither_a_control_nor_a_single_run_of_a_sweep_is_advised():
    arms = {
        "oracle": arm([0.9, 0.92], train=0.1, role="control"),
        "sgd-1": arm([0.9, 0.92], train=0.2),
        "sgd": arm([0.9, 0.92], train=0.4, role="sweep", best="g/sgd-1", runs=2, members=["g/sgd-1", "g/sgd-2"]),
        "sgd-2": arm([0.1, 0.2], train=0.2),
        "adam": arm([0.9, 0.92], train=3.0),
    }
    lines = take(results(arms), "g")
    assert lines[0].startswith("Take `sgd`")
    assert "all 2 runs of the sweep; the best is `sgd-1`" in lines[0]
    assert any(line.startswith("The control `oracle` is within one standard error") for line in lines)


def test_without_total_time_training_time_decides_and_says_so():
    arms = {"a": arm([0.8, 0.9], train=2.0), "b": arm([0.8, 0.9], train=1.0)}
    for found in arms.values():
        found["cost"] |= {"total_s": None, "evaluate_s": None}
    assert chosen(named(arms), ACCURACY) == ("g/b", "train_s")
    assert "the least training time (the total is not known)" in take(results(arms), "g")[0]
    assert "evaluate s" not in render(results(arms))


def test_nothing_is_advised_where_all_diverged_or_nothing_was_trained():
    assert take(results({"a": arm([0.8, math.nan])}), "g") == [
        "No arm ended well in every seed: there is nothing to take."
    ]
    costs = {"a": arm([0.8], peak=2e6) | {"metrics": {}}, "b": arm([0.8], peak=5e6) | {"metrics": {}}}
    costs["a"]["cost"]["step_ms"] = 4.0
    lines = take(results(costs), "g")
    assert lines[0] == "Fastest step: `b` (2 ms; most: `a`, 4 ms)."
    assert lines[1] == "Least peak memory: `a` (2 MB; most: `b`, 5 MB)."
    assert "Nothing was trained" in lines[2]


# The rest of the report


def test_claims_that_fail_and_claims_without_a_number_are_as_plain_as_those_that_hold():
    claims = [claim("it is free", False, "a"), claim("it is known", False, "b", undecided="g/b diverged")]
    text = render(
        results({"a": arm([0.8, 0.9]), "b": arm([0.8, math.nan], why="loss was nan at step 7")}, claims=claims)
    )
    assert "| **DOES NOT HOLD** | it is free | 2 | <= | 1 |" in text
    assert "| **UNDECIDED** (g/b diverged) | it is known |" in text
    assert "- `g/b`: loss was nan at step 7 (seed 1)" in text
    assert "None" not in text
    assert "nan " not in text.replace("loss was nan", "")


def test_arms_that_did_nothing_stand_beside_the_claims_about_them():
    arms = {"sgd": arm([0.8, 0.9]), "clever": arm([0.8, 0.9], role="method"), "adam": arm([0.8, 0.9])}
    claims = [claim("clever beats sgd", True, "clever", "sgd"), claim("adam is slow", True, "adam")]
    text = render(results(arms, claims=claims, idle=[["g/sgd", "g/clever"]]))
    section = text.partition("## Arms that did nothing")[2].partition("##")[0]
    assert "- `g/sgd` = `g/clever`\n  - g: holds: clever beats sgd" in section
    assert "adam" not in section
    assert "| holds † | clever beats sgd" in text
    assert "| holds | adam is slow" in text
    assert "did nothing" not in render(results(arms, claims=claims))


def test_the_table_leads_with_seconds_and_memory():
    text = render(results({**SECONDS, "swept": arm([0.6, 0.7], role="sweep", best="g/bad", runs=3)}))
    assert (
        "|  | arm | test accuracy (higher is better) | total s | train s | peak MB | compile s | evaluate s |" in text
    )
    assert "| 1 | `static` \\* | 0.815 ± 0.00707 | 38.5 | 30 | 1 | 8 | 0.5 | 2 | 7 |" in text
    assert "| 3 | `swept` (3 runs; the best is `bad`) \\* | 0.65 ± 0.0707 |" in text


def test_foreign_older_and_newer_results_are_refused(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(FileNotFoundError, match="effjax compare"):
        read_results(path)
    for text, message in (
        ("{}", "lacks"),
        ("[]", "lacks"),
        ("{", "not JSON"),
        ('{"schema": 1, "arms": {}}', "schema 1, of an older effjax; this version reads schema 2"),
        ('{"schema": 3}', "a newer effjax"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_results(path)
    path.write_text(json.dumps(results({"a": arm([0.8], group="elsewhere")})))
    with pytest.raises(ValueError, match=r"\['elsewhere'\], which 'groups' lacks"):
        read_results(path)


def test_a_folder_is_written_and_shown_in_a_notebook(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results(SECONDS, claims=[claim("a < b", True, "bad")])))
    (tmp_path / "curves.json").write_text(json.dumps({"g/bad": {"0": {"step": [1, 2], "loss": [1.0, 0.5]}}}))
    write_report(tmp_path)
    assert "What to take" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    shown = Results.read(tmp_path)
    assert shown.curves["g/bad"]
    assert shown.folder == tmp_path
    page = shown._repr_html_()
    assert page.count("<table>") == 2
    assert '<img alt="quality against cost"' in page
    assert "base64,iVBOR" in page
    assert "<code>static</code>" in page
    assert "a &lt; b" in page
    row = shown.table()["g"][0]
    assert (row["rank"], row["arm"], row["total s"]) == ("1", "`static` \\*", "38.5")
    assert shown.plot()._repr_png_().startswith(b"\x89PNG")


def test_cores_are_counted_in_english():
    cores = lambda count: hardware_name({"platform": "cpu", "cpu": "AMD EPYC", "cores": count})
    assert (cores(1), cores(2)) == ("AMD EPYC, 1 core", "AMD EPYC, 2 cores")
    assert hardware_name({"platform": "gpu", "devices": 8, "device_kind": "H200"}) == "8 x H200"
