"""Presets of the ICPC study: what `effjax compare icpc:<name>` runs."""

from effjax.recipes.icpc import IcpcStudy
from effjax.recipes.spec import Budget

smoke = IcpcStudy(
    tasks=("fashion_mnist/vit-32-2",),
    scales=(0.43, 0.71, 1.0),
    shares=(1, 1, 1),
    batch_size=60,
    train_rows=6000,
    test_rows=2000,
    budget=Budget(3, "epochs"),
    learning_rate=4e-3,
    seeds=(0,),
    certify="search",
    arms=("full", "icpc"),
)
"""effjax compare icpc:smoke. Two CPU cores, a minute in all by estimate. Fashion-MNIST at 12, 20 and 28 pixels: the
model trained on all three is some twenty points above the other at 12 pixels, and below it at 28."""

cpu = IcpcStudy(
    train_rows=10_000,
    test_rows=4000,
    budget=Budget(6, "epochs"),
    seeds=(0, 1),
    arms=("*", "!icpc-fractional", "!icpc-spread"),
)
"""effjax compare icpc (= icpc:cpu). Two CPU cores, half an hour by estimate. Fashion-MNIST at five sizes, 6 epochs from
scratch, all arms but two ways of positions: no gain at full size is expected from scratch, but robustness and cost are.
"""

cifar10 = IcpcStudy(
    tasks=("cifar10/vit-64-4",),
    scales=(0.5, 0.625, 0.75, 0.875, 1.0),
    train_rows=8000,
    test_rows=3000,
    budget=Budget(6, "epochs"),
    seeds=(0, 1),
    crop=4,
    arms=("*", "!icpc-fractional", "!icpc-spread"),
)
"""effjax compare icpc:cifar10. Two CPU cores, half an hour by estimate; needs CIFAR-10 (EFFJAX_DATA or a hub)."""

audio = IcpcStudy(
    tasks=("spoken_digits/vit-64-2",),
    scales=(0.5, 0.75, 1.0),
    shares=(1, 1, 1),
    batch_size=60,
    budget=Budget(20, "epochs"),
    seeds=(0, 1),
    certify="search",
    arms=("full", "full-short", "icpc", "icpc-interp", "icpc-late", "progressive"),
)
"""effjax compare icpc:audio. Two CPU cores, some minutes by estimate; needs the spoken digits (EFFJAX_DATA).
Spectrograms with fewer frames and bands."""

text = IcpcStudy(
    tasks=("sst2/encoder-2x64",),
    batch_size=40,
    learning_rate=1e-3,
    weight_decay=0.0,
    budget=Budget(6, "epochs"),
    seeds=(0, 1, 2),
    certify="search",
)
"""effjax compare icpc:text. Two CPU cores; needs SST-2 (EFFJAX_DATA or a hub). Texts without all, half and none of
their stop words, an encoder from scratch: a sixth of the tokens goes, so that no large saving can be seen."""

gpu = IcpcStudy(
    tasks=("cifar10/vit_small_patch4_32",),
    scales=(0.5, 0.625, 0.75, 1.0),
    shares=(1, 1, 1, 1),
    batch_size=512,
    learning_rate=1e-3,
    budget=Budget(30, "epochs"),
    crop=4,
    seeds=(0,),
)
"""effjax compare icpc:gpu. One H200-class GPU, under 10 minutes by estimate; needs CIFAR-10. ViT-S, patches of 4."""

paper = IcpcStudy(
    tasks=("cifar10/vit_base_patch16_384",),
    pixels=384,
    scales=tuple(side / 384 for side in range(112, 385, 16)),
    shares=(1,) * 18,
    batch_size=504,
    learning_rate=5e-6,
    weight_decay=0.0,
    warmup=0.0,
    budget=Budget(200, "epochs"),
    crop=4,
    seeds=(0,),
    arms=("full", "icpc", "icpc-interp"),
)
"""effjax compare icpc:paper. The sizes, batch and rate of the paper on CIFAR-10, images enlarged to 112 to 384 pixels;
from scratch, where the paper fine-tunes a pretrained model. Days on one GPU."""
