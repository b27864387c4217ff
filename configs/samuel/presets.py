"""Presets of the SAMUEL study: what `effjax compare samuel:<name>` runs."""

from effjax.recipes.samuel import SamuelStudy
from effjax.train.options import Budget

smoke = SamuelStudy(
    tasks=("digits/mlp-64",),
    settings=("shift",),
    budget=Budget(400),
    seeds=(0,),
    grid=(1.0, 0.1, 0.01),
    cosine_grid=(0.3,),
    arms=("sgd-*", "cosine-*", "adam", "schedule-free", "prodigy", "samuel", "uniform", "one-gradient"),
)
"""effjax compare samuel:smoke. Two CPU cores, under 60 s in all. Digits whose pixels are permuted anew three times:
SAMUEL near the best fixed rate, cosine well behind."""

cpu = SamuelStudy(
    tasks=("digits/mlp-64", "fashion_mnist/mlp-64"),
    settings=("offline", "shift"),
    budget=Budget(1200),
    seeds=(0, 1, 2),
)
"""effjax compare samuel (= samuel:cpu). Two CPU cores, some minutes. Expect SAMUEL within 5 % of the best fixed rate
and 20 % below cosine under shift; near the grid offline, at five times the cost of one run."""

overhead = SamuelStudy(
    arms=("sgd-0.1", "adam", "one-gradient-adam", "loop-*"),
    tasks=("digits/mlp-64", "fashion_mnist/cnn"),
    settings=("offline",),
    budget=Budget(1000),
    seeds=(0,),
)
"""effjax compare samuel:overhead --cost-only. Two CPU cores, two minutes. Step times of the experts' loop forms and of
the one-gradient variant, interleaved."""

gpu = SamuelStudy(
    tasks=("cifar10/resnet20",),
    settings=("offline", "shift"),
    budget=Budget(4000),
    seeds=(0, 1),
    batch_size=128,
    loop="vmap",
)
"""effjax compare samuel:gpu. One H200-class GPU, under 10 minutes; needs CIFAR-10 (EFFJAX_DATA or a hub)."""

paper = SamuelStudy(
    tasks=("cifar10/resnet20",),
    settings=("offline",),
    budget=Budget(200 * 45_000, "examples"),
    seeds=(0, 1, 2),
    batch_size=128,
    experts=(1.0, 0.1, 0.01, 0.001, 0.0001),
)
"""effjax compare samuel:paper. CIFAR-10 for 200 epochs, a day on one GPU. The paper's per-task settings could not be
found; its networks (VGG-16, ResNet-18) are stood in for by a ResNet-20."""
