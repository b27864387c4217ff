"""Presets of the DiSK study: what `effjax compare disk:<name>` runs."""

from effjax.recipes.disk import DiskStudy
from effjax.train.options import Budget

smoke = DiskStudy(
    tasks=("fashion_mnist/mlp-3",),
    shrink=2,
    train_rows=3000,
    test_rows=1000,
    teacher_epochs=4,
    budget=Budget(4, "epochs"),
    rounds=4,
    seeds=(0,),
    arms=("ce", "kd", "support", "disk", "disk-best"),
)
"""effjax compare disk:smoke. Two CPU cores, under 60 s in all. Fashion-MNIST at 14 x 14, a student of three hidden
units and a teacher of 256: one seed says little, as such students differ by ten points between seeds."""

cpu = DiskStudy(
    tasks=("fashion_mnist/mlp-3", "fashion_mnist/mlp-6"),
    shrink=2,
    train_rows=6000,
    budget=Budget(12, "epochs"),
    seeds=tuple(range(8)),
    arms=("*", "!disk-cached"),
)
"""effjax compare disk (= disk:cpu). Two CPU cores, some minutes. Eight seeds, as such students differ
by ten points between them. Expect DiSK above plain distillation at three hidden units."""

confirm = DiskStudy(
    tasks=("fashion_mnist/mlp-3", "fashion_mnist/mlp-6"),
    shrink=2,
    train_rows=6000,
    budget=Budget(12, "epochs"),
    seeds=tuple(range(8, 24)),
    arms=("ce", "kd", "support", "disk", "disk-cosine"),
)
"""effjax compare disk:confirm. Two CPU cores, some minutes. The arm that met the bar of half a point over distillation
in cpu was singled out after looking at its eight seeds: here are sixteen others."""

overhead = DiskStudy(
    tasks=("fashion_mnist/mlp-6",),
    teacher="cnn",
    teacher_epochs=1,
    train_rows=2000,
    budget=Budget(100),
    seeds=(0,),
    arms=("ce", "kd", "disk", "disk-cached", "disk-separate", "disk-best"),
)
"""effjax compare disk:overhead --cost-only. Two CPU cores, two minutes. Step times with the teacher run in every step,
and with its outputs kept."""

gpu = DiskStudy(
    tasks=("cifar10/resnet-8-16-32-64",),
    teacher="resnet56",
    k=5,
    temperature=4.0,
    batch_size=128,
    budget=Budget(30, "epochs"),
    rounds=15,
    seeds=(0, 1),
    arms=("ce", "kd", "dkd", "support", "disk", "disk-cached", "disk-best"),
)
"""effjax compare disk:gpu. One H200-class GPU, under 10 minutes; needs CIFAR-10 (EFFJAX_DATA or a hub) and the weights
of resnet56 (EFFJAX_MODELS)."""

paper = DiskStudy(
    tasks=("cifar10/resnet-8-16-32-64", "cifar10/resnet-16-32-64-128"),
    teacher="resnet-32-64-128-256",
    teacher_epochs=200,
    k=5,
    temperature=4.0,
    batch_size=200,
    budget=Budget(200, "epochs"),
    rounds=200,
    seeds=(0, 1, 2),
    arms=("ce", "kd", "dkd", "dist", "disk", "disk-separate", "disk-paper"),
)
"""effjax compare disk:paper. The small and medium ResNet10 students of the paper with its large one as teacher, on
CIFAR-10 in place of CIFAR-100 and without its augmentation. A day on one GPU."""
