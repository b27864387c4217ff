"""Presets of the TARNN study: what `effjax compare tarnn:<name>` runs."""

from effjax.recipes.spec import Budget
from effjax.recipes.tarnn import TarnnStudy
from effjax.train.options import TrainOptions

LAYERS = ("lstm", "chrono-lstm", "lru-4", "irnn", "tarnn-*", "!tarnn-euler-3")

smoke = TarnnStudy(
    tasks=("noisy-digits-60",),
    arms=("lstm", "tarnn-euler", "tarnn-euler-shared", "tarnn-euler-input"),
    budget=Budget(250),
    seeds=(0,),
)
"""effjax compare tarnn:smoke. Two CPU cores, under 60 s in all. Digits followed by noise: TARNN far above the LSTM."""

cpu = TarnnStudy(tasks=("noisy-digits-200",), arms=LAYERS, budget=Budget(20, "epochs"), seeds=(0, 1, 2))
"""effjax compare tarnn (= tarnn:cpu). Two CPU cores, about ten minutes. Expect TARNN with step sizes of every time step
above 88 %, the LSTM at chance, and much less with one step size for all times."""

gpu = TarnnStudy(
    tasks=("noisy-digits-1000",),
    arms=("lstm", "chrono-lstm", "cornn", "lru-4", "irnn", "tarnn-euler", "tarnn-convex", "tarnn-euler-input"),
    hidden=128,
    batch_size=128,
    budget=Budget(2000),
    seeds=(0, 1, 2),
)
"""effjax compare tarnn:gpu. One H200-class GPU, under 10 minutes; data built in."""

paper = TarnnStudy(
    tasks=("noisy-cifar10-1000", "noisy-mnist-1000", "mnist-pixels", "mnist-permuted", "ptb-words-300"),
    arms=LAYERS,
    hidden=128,
    batch_size=128,
    learning_rate=1e-3,
    budget=Budget(200, "epochs"),
    seeds=(0, 1, 2),
    train=TrainOptions(remat=True),
)
"""effjax compare tarnn:paper. Needs CIFAR-10, MNIST and PTB; days on one GPU: choose with --tasks and --arms. No table
of the paper could be read, so there is no figure to expect."""
