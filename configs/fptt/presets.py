"""Presets of the FPTT study: what `effjax compare fptt:<name>` runs."""

from effjax.recipes.fptt import FpttStudy
from effjax.recipes.spec import Budget

QUALITY = ("*", "!fptt", "!bptt-remat")
COSTS = ("bptt", "bptt-remat", "tbptt", "chunked", "fptt")

smoke = FpttStudy(
    tasks=("digits-permuted",),
    budget=Budget(200),
    seeds=(0,),
    alphas=(0.1, 0.02),
    arms=("bptt", "bptt-losses", "tbptt", "chunked", "fptt-[0-9]*"),
)
"""effjax compare fptt:smoke. Two CPU cores, under 60 s in all. Permuted digits, 9 epochs: updates in every part
of the sequence learn faster than one at its end."""

cpu = FpttStudy(
    tasks=("digits-permuted",),
    cells=("torch-lstm", "lstm"),
    budget=Budget(660),
    seeds=(0, 1, 2),
    bptt_rates=(1e-2,),
    arms=QUALITY,
)
"""effjax compare fptt (= fptt:cpu). Two CPU cores, about five minutes, data built in. Permuted digits pixel by pixel,
30 epochs: from the authors' initial values updates in every part are far ahead of BPTT; from better ones, and with
BPTT at a rate of its own, little of that is left."""

text = FpttStudy(
    tasks=("tiny_shakespeare-chars-96",),
    budget=Budget(660),
    seeds=(0, 1),
    bptt_rates=(1e-2,),
    arms=QUALITY,
)
"""effjax compare fptt:text. Two CPU cores, about five minutes, data built in. 64 streams of characters, windows of 96,
the state carried from window to window. Expect updates in every part ahead of BPTT at the same rate."""

add = FpttStudy(
    tasks=("add-200",),
    cells=("torch-lstm", "lstm"),
    budget=Budget(1600),
    seeds=(0,),
    parts=10,
    alphas=(0.5, 0.02),
    arms=(*QUALITY, "!bptt-small", "!fptt-epochs"),
)
"""effjax compare fptt:add. Two CPU cores, about twelve minutes. The adding problem over 200 steps, 1600 batches, where
the authors' initial values and better ones part: with a forget gate that starts open BPTT solves it too."""

add100 = FpttStudy(
    tasks=("add-100",),
    cells=("torch-lstm",),
    budget=Budget(2000),
    seeds=(0,),
    parts=10,
    alphas=(0.5, 0.02),
    arms=(*QUALITY, "!bptt-small", "!fptt-epochs"),
)
"""effjax compare fptt:add100. Two CPU cores, about five minutes. The adding problem over 100 steps, 2000 batches, from
the authors' initial values. Expect updates in every part and FPTT to solve it, BPTT not; a Chrono-LSTM solves it by
BPTT, to a smaller error."""

memory = FpttStudy(
    tasks=("add-100", "add-300", "add-1000", "add-3000", "add-10000"),
    arms=COSTS,
    budget=Budget(100),
    seeds=(0,),
    parts=None,
    part_length=20,
    batch_size=8,
    train_rows=8,
    test_rows=8,
)
"""effjax compare fptt:memory --cost-only. Two CPU cores, some minutes. Temporary bytes of a step on sequences of 100 to
10,000 steps in parts of 20: the same for FPTT, in proportion to the length for BPTT."""

overhead = FpttStudy(
    tasks=("add-200", "add-1000"),
    arms=COSTS,
    budget=Budget(100),
    seeds=(0,),
    hidden=(64, 128),
    parts=10,
    train_rows=64,
    test_rows=64,
)
"""effjax compare fptt:overhead --cost-only. Two CPU cores, some minutes. Time of a step with ten parts, all arms
interleaved."""

gpu = FpttStudy(
    tasks=("add-500",),
    cells=("torch-lstm",),
    budget=Budget(2000),
    seeds=(0,),
    hidden=(128,),
    parts=10,
    alphas=(0.5, 0.02),
    batch_size=128,
    learning_rate=1e-3,
    arms=("bptt", "chunked", "fptt-[0-9]*", "chrono-lstm", "lru"),
)
"""effjax compare fptt:gpu. One H200-class GPU, under 10 minutes. The authors' adding problem at 500 steps. Not measured
yet."""

paper = FpttStudy(
    tasks=("mnist-pixels", "mnist-permuted", "cifar10-pixels"),
    cells=("torch-lstm",),
    budget=Budget(200, "epochs"),
    seeds=(0, 1, 2),
    hidden=(128,),
    parts=10,
    alphas=(0.1, 0.02),
    auxiliary="uniform",
    batch_size=128,
    learning_rate=1e-3,
    decay_at=(0.25, 0.375, 0.45),
    arms=QUALITY,
)
"""effjax compare fptt:paper. Needs MNIST and CIFAR-10 (EFFJAX_DATA or a hub); a day on one GPU: see --tasks. The
authors' set-up but for their second linear layer, the dropout of 0.05 on the logits and the targets of the auxiliary
loss, which they estimate after 20 epochs. They report 98.7, 94.8 and 71.0 %, and 97.7, 88.9 and 60.1 % for BPTT."""

words = FpttStudy(
    tasks=("ptb-words-300",),
    cells=("torch-lstm",),
    budget=Budget(100, "epochs"),
    seeds=(0, 1, 2),
    hidden=(256,),
    parts=6,
    alphas=(0.5,),
    lmbda=2.0,
    batch_size=128,
    optimizer="sgd",
    learning_rate=2.0,
    decay_at=(0.5, 0.75),
    clip=None,
    arms=("bptt", "tbptt", "chunked", "fptt-[0-9]*", "chrono-lstm", "lru"),
)
"""effjax compare fptt:words. Needs PTB (EFFJAX_DATA or a hub); hours on one GPU. The authors' PTB-300, but for the
dropout of 0.2, and with a rate that falls at fixed times. They report a perplexity of 103, nats 4.64; with this rate
lambda is of the size of the gradient, and the regulariser does most."""
