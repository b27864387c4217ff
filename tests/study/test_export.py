"""`effjax export` of a chain: one PEFT adapter, or the merged network."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from effjax.cli import main
from effjax.finetune.lora import lora_params, lora_scales
from effjax.finetune.lora_files import load_lora
from effjax.finetune.lora_linen import lora_apply
from effjax.models.convert import module_name
from effjax.models.pretrained import load_pretrained

GROUP = "tiny_shakespeare-stories260k"
WORDS = [
    *("cola:smoke", "--tasks", "tiny_shakespeare/stories260k", "--budget.amount", "6", "--rank", "2"),
    *("--batch-size", "2", "--max-length", "16", "--train-rows", "16", "--test-rows", "4", "--scan-layers"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "cola"
    assert main(["train", *WORDS, "--arm", f"{GROUP}/cola-3", "--out", str(folder)]) == 0
    assert main(["export", str(folder), "--out", str(folder.with_name("w.safetensors"))]) == 0
    return folder


@pytest.fixture(scope="module")
def logits(trained):
    """Of the network that was trained, from the plain export of its parameters."""
    loaded = load_pretrained("stories260k", scan_layers=True)
    flat = load_file(trained.with_name("w.safetensors"))
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: flat["/".join(["params", *(key.key for key in path)])], loaded.params
    )
    before, after = (loaded.module.apply({"params": tree}, IDS) for tree in (loaded.params, params))
    assert np.abs(after - before).max() > 1e-3
    return after


IDS = np.arange(1, 13, dtype=np.int32)[None]


def test_a_chain_is_one_peft_adapter(trained, logits, capsys):
    out = trained.with_name("adapter")
    assert main(["export", str(trained), "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 2 * 2 * 5  # a and b of query and value in five layers
    loaded = load_pretrained("stories260k", scan_layers=True)
    lora, config = load_lora(out, loaded.params, lambda path, layer: module_name(path, loaded.rules, layer))
    assert {adapter["a"].shape[-1] for adapter in lora.values()} == {6}  # three links of rank 2
    variables = {"params": lora_params(loaded.params, lora, lora_scales(lora, config))}
    np.testing.assert_allclose(lora_apply(loaded.module.apply)(variables, IDS), logits, atol=2e-5)


def test_the_merged_network_is_a_hugging_face_folder(trained, logits):
    out = trained.with_name("merged")
    assert main(["export", str(trained), "--out", str(out), "--merged"]) == 0
    loaded = load_pretrained(out, scan_layers=True)
    np.testing.assert_allclose(loaded.module.apply({"params": loaded.params}, IDS), logits, atol=2e-5)


def test_what_cannot_be_a_folder_says_so(trained, tmp_path, capsys):
    run = tmp_path / "digits"
    words = ["cola:smoke", "--budget.amount", "3", "--arm", "digits-mlp-64-64/full", "--out", str(run)]
    assert main(["train", *words]) == 0
    for extra, said in (
        (["--out", str(tmp_path / "x")], "has no adapters"),
        (["--out", str(tmp_path / "x"), "--merged"], "no layout of Hugging Face"),
        (["--out", str(tmp_path / "x.safetensors"), "--merged"], "--merged is for folders"),
    ):
        assert main(["export", str(run), *extra]) == 2
        assert said in capsys.readouterr().err
