"""``--max-shapes auto``: costs are measured once for a task and kept, so that a start later plans the same batches."""

import json

import pytest

from effjax.data.step_costs import StepCosts
from effjax.recipes import shape_costs
from effjax.study.resolve import resolve

WORDS = (
    *("--tasks", "sms_spam/encoder-1x8", "--train-rows", "200", "--test-rows", "20", "--max-length", "32"),
    *("--arms", "buckets", "--seeds", "0"),
)
COSTS = StepCosts(compile_s=1e-3, token_s=1e-4, step_s=1e-3)


def test_a_study_measures_once_and_keeps_the_numbers(tmp_path, monkeypatch):
    measured, path = [], tmp_path / "kept" / "costs.json"

    def measure(step, arguments):
        measured.append([args[1]["input_ids"].shape for args in arguments])
        return COSTS

    monkeypatch.setattr(shape_costs, "measure_costs", measure)
    monkeypatch.setattr(shape_costs, "_path", lambda key: path)
    study = resolve("bucket_sampler:smoke", ("--max-shapes", "auto", *WORDS))
    assert study.groups()[0].arms[0].label == "BucketSampler, shapes by their cost"
    assert not [claim for claim in study.claims["sms_spam-encoder-1x8"] if claim.of == "compiles"]
    program = study.build("sms_spam-encoder-1x8/buckets")
    (found,) = measured
    short, long = sorted(found, key=lambda shape: shape[1])
    assert short[0] == long[0] == 32
    assert short[1] < long[1] == 32
    assert json.loads(path.read_text()) == COSTS._asdict()
    # A later start, in another process, measures nothing and plans the same; dearer programs mean fewer of them.
    shapes = lambda made: {shape.batch["input_ids"].shape for shape in made.shapes}
    monkeypatch.setattr(shape_costs, "_KNOWN", {})
    assert shapes(study.build("sms_spam-encoder-1x8/buckets")) == shapes(program)
    path.write_text(json.dumps(COSTS._replace(compile_s=1e4)._asdict()))
    monkeypatch.setattr(shape_costs, "_KNOWN", {})
    assert len(shapes(study.build("sms_spam-encoder-1x8/buckets"))) == 1 < len(shapes(program))
    assert len(measured) == 1


def test_another_word_is_refused():
    with pytest.raises(ValueError, match=r"max.shapes"):
        resolve("bucket_sampler:smoke", ("--max-shapes", "most", *WORDS))
