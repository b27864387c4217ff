"""Presets of the Global layer study: what `effjax compare global_layer:<name>` runs."""

from effjax.recipes.global_layer import GlobalLayerStudy
from effjax.train.options import Budget, TrainOptions

FOUR = ("deep", "shallow", "global", "global-many")

smoke = GlobalLayerStudy(
    tasks=("fashion_mnist",),
    shrink=2,
    widths=(4, 8, 16, 16),
    deep_blocks=2,
    train_rows=1500,
    test_rows=1000,
    batch_size=64,
    inference_batch=64,
    budget=Budget(3, "epochs"),
    seeds=(0,),
    arms=("deep", "shallow", "global"),
)
"""effjax compare global_layer:smoke. Two CPU cores, about a minute, most of it compiling. Fashion-MNIST at 14 x 14,
three epochs: every network trains; too short for their order to mean anything."""

cpu = GlobalLayerStudy(
    tasks=("cifar10",),
    shrink=2,
    widths=(8, 16, 32, 32),
    train_rows=12_000,
    test_rows=4000,
    batch_size=64,
    inference_batch=64,
    budget=Budget(6, "epochs"),
    seeds=(0, 1, 2),
    arms=(*FOUR, "depthwise"),
)
"""effjax compare global_layer (= global_layer:cpu). Two CPU cores, about 20 minutes by estimate; needs CIFAR-10
(EFFJAX_DATA or a hub). The four networks and the control of equal parameters at half the width, on CIFAR-10 at 16 x 16,
six epochs: what the layer is worth in a short run, with its costs. Not the accuracies that the networks reach."""

speed = GlobalLayerStudy(
    tasks=("cifar10",),
    train_rows=2000,
    test_rows=500,
    budget=Budget(20),
    seeds=(0,),
    batch_size=32,
    inference_batch=32,
    augment=False,
    arms=("deep", "shallow", "depthwise", "large-kernel", "global", "global-many", "implicit", "form-*"),
)
"""effjax compare global_layer:speed --cost-only. Two CPU cores, some minutes; needs CIFAR-10. The networks of the paper
at full size: step and inference times of all arms, interleaved, and of the forms of the solver."""

own = GlobalLayerStudy(
    tasks=("digits",),
    widths=(16, 32, 64, 64),
    budget=Budget(20, "epochs"),
    batch_size=32,
    augment=False,
    arms=(*FOUR, "depthwise", "large-kernel"),
)
"""effjax compare global_layer --data photos/ (= global_layer:own). Your images as they are, three seeds: ResNet-32,
ResNet-Global, and the shallow network without Global layers. Without --data: 8 x 8 digits."""

gpu = GlobalLayerStudy(
    tasks=("cifar10",),
    budget=Budget(30, "epochs"),
    seeds=(0, 1),
    learning_rate=0.2,
    weight_decay=1e-4,
    arms=(*FOUR, "depthwise"),
)
"""effjax compare global_layer:gpu. One H200-class GPU, under 10 minutes; needs CIFAR-10. The four networks of full size
and the control of equal parameters, 30 epochs by a one-cycle schedule."""

paper = GlobalLayerStudy(
    tasks=("cifar10",),
    budget=Budget(300, "epochs"),
    seeds=(0, 1, 2),
    schedule="steps",
    batch_size=32,
    arms=("*", "!form-*"),
    train=TrainOptions(),
)
"""effjax compare global_layer:paper. CIFAR-10 for 300 epochs as in the authors' runner of ResNet-Global (batches of 32,
SGD at 0.1 divided by ten at epochs 150 and 225, weight decay 6e-5), the same for every network; theirs trains ResNet-32
in batches of 128 with 5e-5. A day on one GPU. Expect 92.4 % of ResNet-32 and 91.9 % of ResNet-Global by their poster;
two reproductions reached 91.3 % and 88.5 %."""
