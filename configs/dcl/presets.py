"""Presets of the DCL study: what `effjax compare dcl:<name>` runs."""

from effjax.recipes.dcl import DclStudy
from effjax.train.options import Budget

smoke = DclStudy(
    tasks=("digits/mlp-128-128",),
    settings=("noise",),
    budget=Budget(600),
    seeds=(0,),
    arms=("erm", "augmented", "fixed-1", "fixed-3", "dcl-0.1"),
)
"""effjax compare dcl:smoke. Two CPU cores, under 60 s in all. Digits with 30 % noisy labels: consistency at a stated
level well above cross-entropy and above the same noise as augmentation."""

cpu = DclStudy(
    tasks=("digits/mlp-128-128",),
    settings=("noise", "few", "tail"),
    budget=Budget(1500),
    seeds=(0, 1, 2, 3, 4),
)
"""effjax compare dcl (= dcl:cpu). Two CPU cores, some minutes. Expect consistency under noise to win ten points over
cross-entropy, and the marginal to help the worst class of a long tail."""

fashion = DclStudy(
    tasks=("fashion_mnist/mlp-256",),
    settings=("noise", "tail"),
    budget=Budget(1500),
    seeds=(0, 1, 2),
    noise_rows=4000,
    arms=("erm", "augmented", "smoothed", "fixed-*", "dcl-*", "trimmed", "adjusted", "marginal", "risk"),
)
"""effjax compare dcl:fashion. Two CPU cores, some minutes. The same on Fashion-MNIST."""

gpu = DclStudy(
    tasks=("cifar10/resnet20",),
    settings=("noise",),
    noise=0.4,
    noise_rows=None,
    view=0.1,
    learning_rate=1e-3,
    budget=Budget(40, "epochs"),
    seeds=(0,),
    weights=(0.3, 1.0, 3.0),
    arms=("erm", "smoothed", "augmented", "fixed-*", "dcl-*"),
)
"""effjax compare dcl:gpu. One H200-class GPU, under 10 minutes; needs CIFAR-10 (EFFJAX_DATA or a hub). With 40 % of the
labels noisy."""

paper = DclStudy(
    tasks=("cifar10/resnet20",),
    settings=("noise",),
    noise=0.4,
    noise_rows=None,
    view=0.1,
    learning_rate=1e-3,
    budget=Budget(200, "epochs"),
    seeds=(0, 1, 2),
)
"""effjax compare dcl:paper. No set-up of the thesis is known: 200 epochs of CIFAR-10 with 40 % noisy labels stand in
for it. Hours on one GPU."""

overhead = DclStudy(
    tasks=("fashion_mnist/cnn",),
    settings=("noise", "tail"),
    budget=Budget(100),
    seeds=(0,),
    arms=("erm", "fixed-1", "dcl-0.1", "adjusted", "marginal", "risk"),
)
"""effjax compare dcl:overhead --cost-only. Two CPU cores, a minute. Step times of a network of convolutions, with fixed
weights and with multipliers."""
