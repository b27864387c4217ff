"""Every family of pretrained transformers beside transformers itself, on random weights: outputs, a gradient, folders.

Float32 on both sides; outputs to 2e-5, gradients to 2e-4 of their largest entry.
"""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.finetune.lora import lora_init, lora_merge, lora_params, lora_scales
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.finetune.lora_files import load_lora, save_lora
from effjax.finetune.lora_linen import lora_apply
from effjax.models.families import FAMILIES
from effjax.models.pretrained import load_pretrained, save_pretrained

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

MAKE = runpy.run_path(str(Path(__file__).parents[1] / "reference" / "transformers" / "make.py"))
NEW = tuple(MAKE["MODELS"])
HEADS = {"distilbert": {"classes": 3, "pool": "cls"}}
TARGETS = {"distilbert": ["q_lin", "v_lin"]}  # of which PEFT has none of its own
IDS, MASK = MAKE["inputs"]()
# Of each family the kernel whose gradient is looked at: theirs and ours.
KERNELS = {
    "distilbert": ("distilbert.transformer.layer.0.attention.q_lin.weight", "encoder/layer_0/attention/query/kernel"),
    "gpt2": ("transformer.h.0.attn.c_attn.weight", "layer_0/attention/{}/kernel"),
} | dict.fromkeys(
    ("mistral", "qwen2", "qwen3", "llama3"), ("model.layers.0.self_attn.k_proj.weight", "layer_0/attention/key/kernel")
)


@pytest.fixture(scope="module", params=NEW)
def pair(request, tmp_path_factory):
    """A model of transformers, its folder, and its weights here."""
    folder = tmp_path_factory.mktemp(request.param)
    model = MAKE["model_of"](request.param)
    model.save_pretrained(folder)
    return request.param, model, folder, load_pretrained(folder, **HEADS.get(request.param, {}))


def theirs(model):
    ids, mask = torch.tensor(IDS, dtype=torch.long), torch.tensor(MASK).long()
    return model(ids, attention_mask=mask).logits


def real(output):
    return output[MASK] if output.ndim == 3 else output


def leaf_at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return np.asarray(tree)


def test_outputs_and_a_gradient(pair):
    name, model, _, own = pair
    expected = theirs(model)
    weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    weights *= MASK[..., None] if expected.ndim == 3 else 1
    model.zero_grad()
    (expected * torch.tensor(weights)).sum().backward()

    @jax.jit
    def ours(params):
        output, pull = jax.vjp(lambda params: own.module.apply({"params": params}, IDS, MASK), params)
        return output, pull(jnp.asarray(weights))[0]

    output, gradient = ours(own.params)
    np.testing.assert_allclose(real(np.asarray(output)), real(expected.detach().numpy()), rtol=2e-5, atol=2e-5)
    source, path = KERNELS[name]
    right = dict(model.named_parameters())[source].grad.numpy()
    if name == "gpt2":
        found = np.concatenate([leaf_at(gradient, path.format(part)) for part in ("query", "key", "value")], axis=1)
    else:
        found = leaf_at(gradient, path).T
    assert np.abs(right).max() > 1e-3
    np.testing.assert_allclose(found, right, atol=2e-4 * np.abs(right).max(), rtol=0)


def test_transformers_reads_what_we_write(pair, tmp_path):
    _, model, _, own = pair
    save_pretrained(tmp_path, own)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        np.testing.assert_allclose(theirs(again.eval()).numpy(), theirs(model).detach().numpy(), rtol=1e-6, atol=1e-6)


def test_shards_and_bfloat16(pair, tmp_path):
    name, model, _, own = pair
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    again = load_pretrained(tmp_path / "shards", **HEADS.get(name, {}))
    jax.tree.map(np.testing.assert_array_equal, again.params, own.params)
    save_pretrained(tmp_path / "half", own, dtype=jnp.bfloat16)
    half = type(model).from_pretrained(tmp_path / "half", torch_dtype="auto")
    assert next(iter(half.parameters())).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_defaults_are_those_of_transformers(kind):
    config = transformers.AutoConfig.for_model(kind)
    for name, value in FAMILIES[kind].defaults.items():
        if name == "sliding_window" and kind.startswith("qwen"):
            continue  # null there, as use_sliding_window is false
        assert getattr(config, name) == value, name


def adapted(folder, adapter, kind):
    import peft

    return peft.PeftModel.from_pretrained(kind.from_pretrained(folder), adapter).eval()


def outputs(own, lora, scales):
    variables = {"params": lora_params(own.params, lora, scales)}
    return np.asarray(jax.jit(lora_apply(own.module.apply))(variables, IDS, MASK))


def test_adapters_go_to_peft_and_back(pair, tmp_path):
    peft = pytest.importorskip("peft")
    name, model, folder, own = pair
    # From here: different factors for query and value, which are one module in GPT-2.
    rules = (
        LoraRule(r"query/kernel$", 3, 4.0),
        LoraRule(r"value/kernel$", 2, 6.0),
        LoraRule(r"mlp/up/kernel$", 2, 5.0),
    )
    config = LoraConfig(rules)
    lora = jax.tree.map(lambda leaf: leaf + 0.05, lora_init(jax.random.key(0), own.params, config))
    save_lora(tmp_path / "ours", lora, config, own.module_name)
    expected = outputs(own, lora, lora_scales(lora, config))
    with torch.no_grad():
        found = theirs(adapted(folder, tmp_path / "ours", type(model))).numpy()
    np.testing.assert_allclose(real(found), real(expected), atol=2e-5, rtol=2e-5)
    plain = np.asarray(own.module.apply({"params": own.params}, IDS, MASK))
    assert np.abs(real(plain) - real(expected)).max() > 1e-3
    # From there, at PEFT's own targets, which are ours.
    torch.manual_seed(3)
    settings = peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=TARGETS.get(name))
    peft.get_peft_model(type(model).from_pretrained(folder), settings).save_pretrained(tmp_path / "theirs")
    lora, read = load_lora(tmp_path / "theirs", own.params, own.module_name)
    default = LoraConfig(LoraRule(own.target_kernels(), rank=2))
    assert set(lora) == set(lora_init(jax.random.key(0), own.params, default))
    scales = lora_scales(lora, read)
    with torch.no_grad():
        expected = theirs(adapted(folder, tmp_path / "theirs", type(model))).numpy()
    np.testing.assert_allclose(real(outputs(own, lora, scales)), real(expected), atol=2e-5, rtol=2e-5)
    merged = own.module.apply({"params": lora_merge(own.params, lora, scales)}, IDS, MASK)
    np.testing.assert_allclose(real(np.asarray(merged)), real(expected), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["distilbert", "mistral"])
def test_what_is_trained_whole_goes_to_peft_and_back(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, folder = MAKE["model_of"](name), tmp_path / "base"
    model.save_pretrained(folder)
    own = load_pretrained(folder, **HEADS.get(name, {}))
    whole = "^(head|pooler)/" if name == "distilbert" else "(^norm|embedding$|^head)"
    modules = ["pre_classifier", "classifier"] if name == "distilbert" else ["model.norm", "embed_tokens", "lm_head"]
    config = LoraConfig(LoraRule(own.target_kernels(), rank=2), whole=whole)
    lora = jax.tree.map(lambda leaf: leaf + 0.05, lora_init(jax.random.key(0), own.params, config))
    task = "SEQ_CLS" if name == "distilbert" else "CAUSAL_LM"
    save_lora(tmp_path / "ours", lora, config, own.module_name, task_type=task)
    with torch.no_grad():
        found = theirs(adapted(folder, tmp_path / "ours", type(model))).numpy()
    expected = outputs(own, lora, lora_scales(lora, config))
    np.testing.assert_allclose(real(found), real(expected), atol=2e-5, rtol=2e-5)

    torch.manual_seed(4)
    more = {"modules_to_save": modules, "task_type": task, "target_modules": TARGETS.get(name)}
    settings = peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **more)
    wrapped = peft.get_peft_model(type(model).from_pretrained(folder), settings)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "theirs")
    lora, read = load_lora(tmp_path / "theirs", own.params, own.module_name, whole=True)
    assert sum("whole" in entry for entry in lora.values()) == (4 if name == "distilbert" else 3)
    with torch.no_grad():
        expected = theirs(wrapped.eval()).numpy()
    np.testing.assert_allclose(real(outputs(own, lora, lora_scales(lora, read))), real(expected), atol=2e-5, rtol=2e-5)
    # A state dict saved by hand, with the adapter's name in its names.
    from safetensors.torch import save_file

    kept = {
        key: tensor.contiguous()
        for key, tensor in wrapped.state_dict().items()
        if "lora_" in key or "modules_to_save" in key
    }
    save_file(kept, tmp_path / "theirs" / "adapter_model.safetensors")
    again, _ = load_lora(tmp_path / "theirs", own.params, own.module_name, whole=True)
    jax.tree.map(np.testing.assert_array_equal, again, lora)
