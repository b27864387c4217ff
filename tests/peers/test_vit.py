"""Vision transformers beside transformers' and timm's: the same weights, outputs and gradients, in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models.vit_files import load_vit, save_vit

pytestmark = pytest.mark.peers

torch = pytest.importorskip("torch")

TIMM = {
    "class-token": ("vit_tiny_patch16_224", {}),
    "mean": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "no-class-token": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "oblong": ("vit_tiny_patch16_224", {"img_size": (16, 24)}),
    "deit": ("deit_tiny_distilled_patch16_224", {}),
}
SIZES = {"img_size": (16, 16), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
CONFIG = {
    **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48},
    **{"image_size": 16, "patch_size": 8, "num_channels": 3, "num_labels": 5},
}


def shaken(model):
    """All parameters at random, as zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def agree(loaded, run):
    """Logits, and the gradient of a weighted sum of them by the images."""
    height, width = (side * loaded.module.patch for side in loaded.module.grid)
    images = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    own, pull = jax.vjp(lambda x: loaded.module.apply({"params": loaded.params}, x), jnp.asarray(images))
    theirs = torch.tensor(images.transpose(0, 3, 1, 2)).requires_grad_()
    expected = run(theirs)
    weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(own, expected.detach().numpy(), rtol=2e-5, atol=2e-5)
    gradient = theirs.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(pull(jnp.asarray(weights))[0], gradient, rtol=2e-4, atol=2e-5)
    return torch.tensor(images.transpose(0, 3, 1, 2)), expected.detach().numpy()


@pytest.mark.parametrize("kind", TIMM)
def test_timm(kind, tmp_path):
    timm = pytest.importorskip("timm")
    from timm.models import _hub

    name, args = TIMM[kind]
    args = {**SIZES, "num_classes": 5, **args}
    model = shaken(timm.create_model(name, pretrained=False, **args))
    (tmp_path / "theirs").mkdir()
    _hub.save_for_hf(model, str(tmp_path / "theirs"), model_args=args, safe_serialization=True)
    loaded = load_vit(tmp_path / "theirs")
    images, expected = agree(loaded, model)

    save_vit(tmp_path / "ours", loaded.module, loaded.params, layout="timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    with torch.no_grad():
        np.testing.assert_allclose(again(images).numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "DeiTWithTeacher", "ViTModel"])
def test_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = (transformers.DeiTConfig if kind.startswith("DeiT") else transformers.ViTConfig)(**CONFIG)
    make = {
        "ViT": "ViTForImageClassification",
        "DeiT": "DeiTForImageClassification",
        "DeiTWithTeacher": "DeiTForImageClassificationWithTeacher",
        "ViTModel": "ViTModel",
    }[kind]
    make = getattr(transformers, make)
    model = shaken(make(config))
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_vit(tmp_path / "theirs", scan_layers=kind == "DeiT")
    run = lambda model: lambda x: model(x).last_hidden_state[:, 0] if kind == "ViTModel" else model(x).logits
    images, expected = agree(loaded, run(model))

    save_vit(tmp_path / "ours", loaded.module, loaded.params)
    again = make.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(run(again)(images).numpy(), expected, rtol=1e-6, atol=1e-6)
