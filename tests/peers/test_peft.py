"""Adapter folders against Hugging Face PEFT, both ways, on a small BERT of Hugging Face transformers."""

import json
import os

import jax
import numpy as np
import pytest

from effjax.finetune.lora import lora_init, lora_merge, lora_params, lora_scales
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.finetune.lora_files import load_lora, save_lora
from effjax.finetune.lora_linen import lora_apply

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

IDS = np.random.default_rng(0).integers(1, 90, (3, 11))
MASK = np.arange(11) < np.array([[11], [7], [4]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a small BERT with random weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=32)
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertModel(config).eval().save_pretrained(folder)
    return folder


def theirs(base, adapter):
    import peft
    import torch
    import transformers

    model = peft.PeftModel.from_pretrained(transformers.BertModel.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS), torch.tensor(MASK)).last_hidden_state.numpy()


def ours(base, scan_layers):
    from effjax.models.pretrained import load_pretrained

    model = load_pretrained(base, scan_layers=scan_layers)
    return model, model.module_name


def outputs(model, lora, scales):
    variables = {"params": lora_params(model.params, lora, scales)}
    return lora_apply(model.module.apply)(variables, IDS.astype(np.int32), MASK)


def assert_equal(got, want):
    np.testing.assert_allclose(np.asarray(got)[MASK], want[MASK], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_our_folder(base, tmp_path, scan_layers, rslora):
    model, names = ours(base, scan_layers)
    rules = (LoraRule("query/kernel", 4, 8.0), LoraRule("value/kernel", 2, 3.0), LoraRule("mlp/up/kernel", 3, 9.0))
    config = LoraConfig(rules, rslora=rslora)
    lora = jax.tree.map(lambda leaf: leaf + 0.05, lora_init(jax.random.key(0), model.params, config))
    scales = lora_scales(lora, config)
    save_lora(tmp_path / "adapter", lora, config, names, base_model=str(base))
    want = theirs(base, tmp_path / "adapter")
    assert_equal(outputs(model, lora, scales), want)
    merged = {"params": lora_merge(model.params, lora, scales)}
    assert_equal(model.module.apply(merged, IDS.astype(np.int32), MASK), want)
    plain = model.module.apply({"params": model.params}, IDS.astype(np.int32), MASK)
    assert np.abs(plain - want)[MASK].max() > 0.02


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_a_folder_of_peft(base, tmp_path, scan_layers, rslora):
    peft, torch, transformers = (pytest.importorskip(name) for name in ("peft", "torch", "transformers"))
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["query", "value", "intermediate.dense"],
        rank_pattern={"value": 2, r"encoder\.layer\.\d+\.intermediate.dense": 5},
        alpha_pattern={"intermediate.dense": 10},
        use_rslora=rslora,
        lora_dropout=0.1,
        init_lora_weights=False,  # b random too
    )
    torch.manual_seed(1)
    peft.get_peft_model(transformers.BertModel.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    model, names = ours(base, scan_layers)
    lora, read = load_lora(tmp_path / "adapter", model.params, names)
    assert (read.rslora, read.dropout) == (rslora, 0.1)
    assert len(lora) == (3 if scan_layers else 9)
    assert_equal(outputs(model, lora, lora_scales(lora, read)), theirs(base, tmp_path / "adapter"))
    # And back again, as the same tensors.
    save_lora(tmp_path / "again", lora, read, names)
    assert_equal(outputs(model, lora, lora_scales(lora, read)), theirs(base, tmp_path / "again"))


def test_settings_that_peft_offers_and_we_have_not(base, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, names = ours(base, False)
    for setting in (
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["pooler"]},
        {"init_lora_weights": "pissa"},
    ):
        folder = tmp_path / next(iter(setting))
        config = peft.LoraConfig(target_modules=["query"], **setting)
        peft.get_peft_model(transformers.BertModel.from_pretrained(base), config).save_pretrained(folder)
        # A pooler that is trained whole has no place in a model that was loaded without one.
        words, whole = (
            ("'pooler.dense' whole, which this", True) if "modules_to_save" in setting else (folder.name, False)
        )
        with pytest.raises(ValueError, match=words):
            load_lora(folder, model.params, names, whole=whole)


def test_our_config_has_fields_that_peft_knows(base, tmp_path):
    peft = pytest.importorskip("peft")
    model, names = ours(base, False)
    lora = lora_init(jax.random.key(0), model.params, LoraConfig("query/kernel"))
    save_lora(tmp_path / "adapter", lora, LoraConfig("query/kernel"), names)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(fields) <= set(peft.LoraConfig().to_dict())
    assert peft.LoraConfig.from_pretrained(os.fspath(tmp_path / "adapter")).r == 8
