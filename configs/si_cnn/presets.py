"""Presets of the SI-CNN study: what `effjax compare si_cnn:<name>` runs."""

from dataclasses import replace

from effjax.recipes.si_cnn import SiCnnStudy
from effjax.recipes.spec import Budget

BLOCKS = ("noise-56/block-24-3", "noise-28/block-40-5", "noise-14/block-112-5", "noise-7/block-192-5")

smoke = SiCnnStudy(
    tasks=("fashion_mnist/inverted-8-16",),
    expansion=4,
    shrink=2,
    train_rows=4000,
    test_rows=1000,
    batch_size=64,
    budget=Budget(60, "steps"),
    seeds=(0,),
    arms=("dense", "si", "narrow"),
)
"""effjax compare si_cnn:smoke. Two CPU cores, about a minute, most of which compiles. Fashion-MNIST at 14 x 14: SI,
the dense network and one with fewer channels, for as many steps."""

cpu = SiCnnStudy(
    tasks=("cifar10/inverted-8-16-24",),
    expansion=4,
    shrink=2,
    crop=2,
    test_rows=2000,
    batch_size=64,
    budget=Budget(400, "steps"),
    seeds=(0, 1),
    arms=("dense", "si", "low", "narrow", "small"),
)
"""effjax compare si_cnn (= si_cnn:cpu). Two CPU cores, some five minutes by estimate; needs EFFJAX_DATA. CIFAR-10 at
16 x 16, a small MobileNetV2-style network and its rivals at equal cost, for as many steps."""

ablations = replace(cpu, arms=("dense", "si", "si-*", "low"))
"""effjax compare si_cnn:ablations. Two CPU cores, half an hour to an hour by estimate, half of which compiles; needs
EFFJAX_DATA. Blends, cheap paths, samplings, interpolations and strides, as the cpu preset trains them."""

speed = SiCnnStudy(
    tasks=BLOCKS,
    batch_size=8,
    infer_batch=8,
    learning_rate=1e-3,
    budget=Budget(20, "steps"),
    seeds=(0,),
    arms=("dense", "si", "si-3", "low"),
)
"""effjax compare si_cnn:speed --cost-only. Two CPU cores, some minutes. Single inverted residual blocks in batches of
8: a call of inference, and a step forward and backward, in turns. Expect less than half of the dense block's time."""

imagenet_speed = SiCnnStudy(
    tasks=("noise-224/mobilenet_v2",),
    batch_size=8,
    infer_batch=8,
    budget=Budget(20, "steps"),
    seeds=(0,),
    arms=("dense", "si", "low"),
)
"""effjax compare si_cnn:imagenet_speed --cost-only. Two CPU cores, some minutes, most of which compile. MobileNetV2 at
224 x 224, whose multiply-adds are 37 % fewer with SI; `python tests/peers/run.py si_cnn_speed` sets PyTorch beside."""

gpu = SiCnnStudy(
    tasks=("cifar10/mobilenet_v2_cifar",),
    crop=4,
    budget=Budget(30, "epochs"),
    seeds=(0,),
    infer_batch=256,
    arms=("dense", "si", "si-alternating", "low", "narrow", "small"),
)
"""effjax compare si_cnn:gpu. One H200-class GPU, under 10 minutes by estimate; needs EFFJAX_DATA. MobileNetV2 on
CIFAR-10 for 30 epochs."""

paper = SiCnnStudy(
    tasks=("cifar10/mobilenet_v2_cifar", "cifar10/mobilenet_v3_large_cifar", "cifar10/efficientnet_b0_cifar"),
    crop=4,
    budget=Budget(200, "epochs"),
    seeds=(0, 1, 2),
    infer_batch=256,
)
"""effjax compare si_cnn:paper. Days on one GPU; needs EFFJAX_DATA. The paper was never published and its recipe is not
known: CIFAR-10 for 200 epochs stands in for ImageNet, with the networks that its authors name."""
