"""Presets of the study of dynamic inference: what `effjax compare dynamic_inference:<name>` runs."""

from effjax.recipes.dynamic_inference import DynamicInferenceStudy
from effjax.recipes.spec import Budget

smoke = DynamicInferenceStudy(
    tasks=("fashion_mnist/resnet-8-16",),
    depth=2,
    train_rows=4000,
    test_rows=1000,
    batch_size=32,
    learning_rate=1e-2,
    gate_rate=3e-2,
    mac_target=0.7,
    budget=Budget(80),
    seeds=(0,),
    arms=("dense", "static", "layers", "random"),
)
"""effjax compare dynamic_inference:smoke. Two CPU cores, about a minute in all. Fashion-MNIST, four small blocks,
trained from scratch for 80 steps: it shows what the study reports, not what the method can do."""

cpu = DynamicInferenceStudy(
    test_rows=2000,
    batch_size=32,
    gate_rate=3e-2,
    mac_target=0.7,
    warm_up=0.0,
    anneal=0.3,
    budget=Budget(150),
    seeds=(0, 1),
    arms=("dense", "static", "layers", "aig", "random"),
    clock_batches=(32,),
)
"""effjax compare dynamic_inference (= dynamic_inference:cpu). Two CPU cores, some ten minutes; needs CIFAR-10
(EFFJAX_DATA). A pretrained ResNet-20 is fine-tuned on 4,800 images with gates, to seven tenths of its multiply-adds."""

speed = DynamicInferenceStudy(
    tasks=(),
    shapes=("basic-64-16", "mlp-512"),
    budget=Budget(1),
    seeds=(0,),
)
"""effjax compare dynamic_inference:speed --cost-only. Two CPU cores, some five minutes. Executors at 10 to 100 % open
examples, batches of 32 and 256; a step is one inference call."""

gpu = DynamicInferenceStudy(budget=Budget(10, "epochs"), batch_size=128, seeds=(0, 1, 2), clock_batches=(32, 256))
"""effjax compare dynamic_inference:gpu. One H200-class GPU, by estimate under 10 minutes an arm; needs CIFAR-10. Every
arm. Blocks of 16 to 64 channels are too small for such a machine to gain by the clock, as the estimate says."""

gpu_speed = DynamicInferenceStudy(
    tasks=(),
    shapes=("bottleneck-1024-14", "bottleneck-2048-7", "basic-64-32", "mlp-4096"),
    budget=Budget(1),
    seeds=(0,),
    batches=(256,),
)
"""effjax compare dynamic_inference:gpu_speed --cost-only --train.dtype bfloat16. One H200-class GPU, minutes. Shapes of
ResNet-50's stages and of transformers."""

paper = DynamicInferenceStudy(
    tasks=("cifar10/resnet56",), budget=Budget(160, "epochs"), batch_size=128, learning_rate=1e-3, seeds=(0, 1, 2)
)
"""effjax compare dynamic_inference:paper. A day on a GPU; needs CIFAR-10. The paper's networks and settings could not
be found: a ResNet-56 from scratch stands in for them."""
