"""Presets of the iRNN study: what `effjax compare irnn:<name>` runs."""

from effjax.recipes.irnn import IrnnStudy
from effjax.recipes.spec import Budget
from effjax.train.options import TrainOptions

# All layers but those of the TARNN study.
LAYERS = ("*", "!tarnn-*", "!antisymmetric-gated")
FEW = ("lstm", "chrono-lstm", "lru-4", "irnn", "irnn-shared")

smoke = IrnnStudy(
    tasks=("noisy-digits-60",),
    arms=("lstm", "chrono-lstm", "irnn", "irnn-shared"),
    budget=Budget(250),
    seeds=(0,),
)
"""effjax compare irnn:smoke. Two CPU cores, under 60 s in all. Digits followed by noise: iRNN far above the LSTM."""

cpu = IrnnStudy(tasks=("noisy-digits-200",), arms=LAYERS, budget=Budget(25, "epochs"), seeds=(0, 1, 2))
"""effjax compare irnn (= irnn:cpu). Two CPU cores, about ten minutes. Expect iRNN with step sizes of every time step
above 85 %, the LSTM at chance, iRNN with one step size near 20 %, Chrono-LSTM between."""

series = IrnnStudy(
    tasks=("fsdd", "hmp_accel-256"),
    arms=(*FEW, "gru", "fastgrnn", "cornn", "min-gru"),
    budget=Budget(20, "epochs"),
    seeds=(0, 1, 2),
    batch_size=32,
    read="mean",
)
"""effjax compare irnn:series. Two CPU cores, about ten minutes; needs the accelerometer set (EFFJAX_DATA). Spoken
digits and movements of a wrist: real signals without a tail of noise, where no step size per time step is needed."""

synthetic = IrnnStudy(
    tasks=("add-100", "copy-50"),
    arms=(*FEW, "gru", "cornn"),
    budget=Budget(1500),
    seeds=(0,),
)
"""effjax compare irnn:synthetic. Two CPU cores, about ten minutes. The adding and the copy problem; without memory
they leave a squared error of 1/6 and 0.297 nats per step."""

pixels = IrnnStudy(
    tasks=("digits-permuted", "fashion_mnist-permuted"),
    arms=(*FEW, "gru"),
    budget=Budget(10, "epochs"),
    seeds=(0,),
    train_rows=1280,
    test_rows=1000,
)
"""effjax compare irnn:pixels. Two CPU cores, some minutes. Images pixel by pixel in a fixed random order."""

text = IrnnStudy(
    tasks=("tiny_shakespeare-chars-100", "ptb-words-300"),
    arms=(*FEW, "gru"),
    hidden=256,
    dropout=0.2,
    batch_size=128,
    budget=Budget(10, "epochs"),
    seeds=(0,),
)
"""effjax compare irnn:text. A GPU, or hours on a CPU; needs PTB (EFFJAX_DATA). Language modelling; windows start from
zero states."""

gpu = IrnnStudy(
    tasks=("noisy-digits-1000", "noisy-cifar10-1000"),
    arms=("lstm", "chrono-lstm", "cornn", "lru-4", "irnn", "irnn-shared", "tarnn-euler"),
    hidden=128,
    batch_size=128,
    budget=Budget(4000),
    seeds=(0, 1, 2),
)
"""effjax compare irnn:gpu. One H200-class GPU, under 10 minutes; needs CIFAR-10. Expect the LSTM near chance and iRNN
above 40 % on noise-padded CIFAR-10."""

paper = IrnnStudy(
    tasks=("noisy-cifar10-1000", "noisy-mnist-1000", "mnist-pixels", "mnist-permuted", "ptb-words-300"),
    arms=(*FEW, "rnn", "gru", "fastgrnn", "antisymmetric", "antisymmetric-gated", "cornn", "irnn-3", "tarnn-euler"),
    hidden=128,
    batch_size=100,
    learning_rate=1e-2,
    budget=Budget(300, "epochs"),
    seeds=(0, 1, 2),
    train=TrainOptions(remat=True),
)
"""effjax compare irnn:paper. Needs CIFAR-10, MNIST and PTB; days on one GPU: choose with --tasks and --arms. The
protocol is FastGRNN's as far as it could be read, with a constant rate. Expect 54.5 % on noise-padded CIFAR-10 with
12 thousand parameters. HAR-2, DSA-19, Google-30 and Yelp-5 are not among the data sets of effjax."""
