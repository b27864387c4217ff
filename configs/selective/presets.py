"""Presets of the selective study: what `effjax compare selective:<name>` runs."""

from effjax.recipes.selective import SelectiveStudy
from effjax.train.options import Budget

smoke = SelectiveStudy(
    budget=Budget(2, "epochs"),
    seeds=(0,),
    train_rows=4000,
    arms=("ce", "osp-30", "osp-saddle", "gamblers", "sat", "selectivenet"),
)
"""effjax compare selective:smoke. Two CPU cores, under 60 s in all. Fashion-MNIST at 14 x 14, two epochs: every arm
trains and gets its thresholds; too short for their order to mean anything."""

cpu = SelectiveStudy(budget=Budget(8, "epochs"), seeds=(0, 1, 2, 3, 4), train_rows=6000)
"""effjax compare selective (= selective:cpu). Two CPU cores, some minutes. Fashion-MNIST at 14 x 14, 6,000 images to
train on, 4,000 for the thresholds. Expect AURC to fall with mu, and mu = 30 to be 0.002 below the cross-entropy."""

own = SelectiveStudy(
    tasks=("digits/mlp-64",),
    pool=1,
    calibration_rows=None,
    joint_errors=(0.05, 0.1, 0.2),
    budget=Budget(20, "epochs"),
    batch_size=32,
)
"""effjax compare selective --data photos/ (= selective:own). Your images as they are, three seeds, every arm; a fifth
of the training images is held out for thresholds at joint errors of 5, 10 and 20 %. Without --data: 8 x 8 digits."""

online = SelectiveStudy(
    budget=Budget(8, "epochs"),
    seeds=(0, 1, 2),
    train_rows=6000,
    stream_rounds=3000,
    arms=("ce", "osp-1", "osp-10", "osp-30"),
)
"""effjax compare selective:online. Two CPU cores, about a minute. As cpu, and then 3,000 test images are played as a
stream: the learner chooses among 20 thresholds of the arm's network and sees a label only where it abstains. Expect
fewer mistakes and more abstentions the less it tolerates, and few abstentions beyond the best threshold in hindsight.
"""

cifar10 = SelectiveStudy(
    tasks=("cifar10/pretrained-resnet20",),
    pool=1,
    calibration_rows=4000,
    train_rows=20_000,
    budget=Budget(20, "epochs"),
    learning_rate=1e-3,
    seeds=(0, 1, 2, 3, 4),
)
"""effjax compare selective:cifar10. Two CPU cores, some minutes; needs EFFJAX_DATA and EFFJAX_MODELS. A linear layer on
the features of a pretrained ResNet-20, as in the authors' first program; thresholds from 4,000 of the test images, the
others to report on. The network fits its training images, so that every loss has little to learn from them."""

gpu = SelectiveStudy(
    tasks=("cifar10/resnet20",),
    pool=1,
    calibration_rows=5000,
    budget=Budget(60, "epochs"),
    schedule="cosine",
    learning_rate=1e-2,
    weight_decay=5e-4,
    seeds=(0, 1, 2),
)
"""effjax compare selective:gpu. One H200-class GPU; needs CIFAR-10 (EFFJAX_DATA or a hub). No augmentation: expect
coverages below the paper's, and the order of the arms."""

paper = SelectiveStudy(
    tasks=("cifar10/resnet32",),
    pool=1,
    calibration_rows=5000,
    budget=Budget(200, "epochs"),
    schedule="cosine",
    learning_rate=1e-2,
    weight_decay=5e-4,
    prices=(0.0, 0.49, 1.0, 1.67, 3.0, 10.0, 30.0),
    seeds=(0, 1, 2),
)
"""effjax compare selective:paper. CIFAR-10, 45,000 / 5,000 / 10,000 images, ResNet-32, 200 epochs, AdamW at 0.01 with
a cosine, as in the authors' later program, without its augmentation."""

overhead = SelectiveStudy(
    tasks=("fashion_mnist/cnn",),
    pool=1,
    train_rows=2000,
    budget=Budget(100),
    seeds=(0,),
    arms=("ce", "osp-30", "osp-saddle", "gamblers", "sat", "selectivenet"),
)
"""effjax compare selective:overhead --cost-only. Two CPU cores, a minute. Step times of a network of convolutions under
every loss."""
