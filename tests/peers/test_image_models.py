"""Image classifiers beside torchvision's and timm's: random weights that they wrote, outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.tree import path_name
from effjax.models.convert import export_weights
from effjax.models.image_models import layout_rules, load_image_model

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]


def libraries():
    """torch, torchvision and timm, also where PyTorch is built for another device than torchvision."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    try:
        import torchvision
    except RuntimeError:  # its detection operators are not there; classifiers need none
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        libraries.kept = library
        import torchvision
    except ImportError:
        pytest.skip("torchvision is not installed")
    return torch, torchvision, pytest.importorskip("timm")


def wide_resnet(torch, depth, width, classes=10):
    """WRN in the form of its usual PyTorch port; neither library has the one for CIFAR."""
    nn, functional = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            if inputs != outputs:
                self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, 0, bias=False)

        def forward(self, x):
            z = functional.relu(self.bn1(x))
            y = self.conv2(functional.relu(self.bn2(self.conv1(z))))
            return y + (self.convShortcut(z) if hasattr(self, "convShortcut") else x)

    class Stage(nn.Module):
        def __init__(self, inputs, outputs, blocks, stride):
            super().__init__()
            sizes = [(inputs, outputs, stride), *[(outputs, outputs, 1)] * (blocks - 1)]
            self.layer = nn.Sequential(*(Block(*size) for size in sizes))

        def forward(self, x):
            return self.layer(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            widths, blocks = (16, 16 * width, 32 * width, 64 * width), (depth - 4) // 6
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            for stage in (1, 2, 3):
                block = Stage(widths[stage - 1], widths[stage], blocks, 1 if stage == 1 else 2)
                setattr(self, f"block{stage}", block)
            self.bn1, self.fc = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], classes)

        def forward(self, x):
            x = self.block3(self.block2(self.block1(self.conv1(x))))
            return self.fc(functional.relu(self.bn1(x)).mean((2, 3)))

    return Net()


# layout-name-width -> size of the images, our fields
CASES = {
    "torchvision-mobilenet_v2": (64, {}),
    "torchvision-mobilenet_v3_small": (64, {}),
    "torchvision-mobilenet_v3_large": (64, {}),
    "torchvision-efficientnet_b0": (64, {}),
    "torchvision-resnet18": (64, {}),
    "torchvision-resnet50": (64, {}),
    "timm-mobilenet_v1": (64, {}),
    "timm-mobilenet_v2": (64, {}),
    "timm-mobilenet_v3_small": (64, {"norm": "batch"}),
    "timm-mobilenet_v3_large": (65, {"norm": "batch"}),
    "timm-efficientnet_b0": (51, {}),
    "timm-resnet50": (64, {}),
    "torchvision-mobilenet_v2-0.35": (64, {"width": 0.35}),
    "torchvision-mobilenet_v2-1.4": (64, {"width": 1.4}),
    "torchvision-mobilenet_v3_large-0.75": (64, {"width": 0.75}),
    "timm-mobilenet_v1-1.25": (64, {"width": 1.25}),
    "timm-mobilenet_v2-0.5": (64, {"width": 0.5}),
    "port-wrn_40_4": (32, {}),
}
TIMM = {
    "mobilenet_v1": "mobilenetv1_100",
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "efficientnet_b0": "efficientnet_b0",
    "resnet50": "resnet50",
}


def theirs(case):
    layout, name, *width = case.split("-")
    torch, torchvision, timm = libraries()
    torch.manual_seed(0)
    widths = {"width_mult": float(width[0])} if width else {}
    if layout == "port":
        net = wide_resnet(torch, 40, 4)
    elif layout == "timm":
        named = TIMM[name].replace("100", f"{round(100 * float(width[0])):03d}") if width else TIMM[name]
        net = timm.create_model(named)
    else:
        net = getattr(torchvision.models, name)(**widths)
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():  # running statistics and affine parts as training leaves them
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
        elif isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module.bias is not None:
            module.bias.data.normal_(0, 0.2, generator=generator)
    return torch, net.eval()


def error(found, expected):
    """Relative, in the Euclidean norm: where an activation has a kink, rounding decides about single gradients."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case, tmp_path):
    from safetensors.torch import save_file

    torch, net = theirs(case)
    layout, name, *_ = case.split("-")
    size, fields = CASES[case]
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    layout = "timm" if layout == "timm" else "torchvision"
    model, variables = load_image_model(tmp_path, name, layout=layout, **fields)

    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    weights = rng.normal(size=(2, model.classes)).astype(np.float32)
    given = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    outputs = net(given)
    (outputs * torch.tensor(weights)).sum().backward()
    expected = {
        parameter: tensor.grad.numpy() for parameter, tensor in net.named_parameters() if tensor.grad is not None
    }

    @jax.jit
    def ours(params, images):
        def value(params, images):
            logits = model.apply({**variables, "params": params}, images)
            return (logits * weights).sum(), logits

        return jax.value_and_grad(value, (0, 1), has_aux=True)(params, images)

    (_, logits), (gradients, image_gradient) = ours(variables["params"], jnp.asarray(images))
    assert error(logits, outputs.detach()) < 1e-4
    assert error(image_gradient, given.grad.numpy().transpose(0, 2, 3, 1)) < 1e-3
    back = export_weights({"params": gradients}, layout_rules(name, model, layout))
    assert back.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert error(back[parameter], gradient) < 5e-3, parameter


def test_training_statistics_as_torch():
    """Batch statistics in training: the same outputs; running variances differ by n / (n - 1), as Flax's are biased."""
    torch, net = theirs("torchvision-mobilenet_v2")
    import safetensors.torch as files

    model, variables = load_state(files, net)
    images = np.random.default_rng(0).normal(size=(4, 64, 64, 3)).astype(np.float32)
    net.train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    outputs = net(torch.tensor(images.transpose(0, 3, 1, 2))).detach()
    logits, changed = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables, images)
    assert error(logits, outputs) < 1e-3
    means = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(changed["batch_stats"])}
    assert error(means["stem_norm/mean"], net.features[0][1].running_mean) < 1e-5
    n = 4 * 32 * 32
    before = np.asarray(variables["batch_stats"]["stem_norm"]["var"])
    batch = (net.features[0][1].running_var.numpy() - 0.9 * before) * (n - 1) / n
    assert error(means["stem_norm/var"], 0.9 * before + batch) < 1e-5


def load_state(files, net):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        files.save_file(net.state_dict(), f"{folder}/model.safetensors")
        return load_image_model(folder, "mobilenet_v2")
