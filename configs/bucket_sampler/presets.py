"""Presets of the BucketSampler study: what `effjax compare bucket_sampler:<name>` runs."""

from effjax.recipes.bucket_sampler import BucketSamplerStudy
from effjax.recipes.spec import Budget
from effjax.train.options import TrainOptions

GLUE = ("glue/cola", "glue/mrpc", "glue/qnli", "glue/rte", "sst2", "glue/stsb", "glue/wnli")

smoke = BucketSamplerStudy(
    tasks=("sms_spam/encoder-1x32",),
    budget=Budget(3, "epochs"),
    seeds=(0,),
    train_rows=2000,
    dropout=0.0,
    max_shapes=3,
    arms=("static", "dynamic", "buckets", "packing"),
)
"""effjax compare bucket_sampler:smoke. Two CPU cores, under 60 s in all. SMS messages: half the
tokens of static padding, less time, the same accuracy."""

cpu = BucketSamplerStudy(
    tasks=("sst2/encoder-2x64",),
    budget=Budget(3, "epochs"),
    seeds=(0, 1, 2),
    train_rows=7000,
    learning_rates=(3e-4,),
)
"""effjax compare bucket_sampler (= bucket_sampler:cpu). Two CPU cores, about ten minutes, of which half compile; needs
SST-2 (EFFJAX_DATA or a hub), or `--tasks sms_spam/encoder-2x64`. Expect 4 x fewer tokens than static padding to 64 and
2.5 x fewer than dynamic padding, as much less time or nearly so, and the same accuracy."""

gpu = BucketSamplerStudy(
    tasks=("sst2/minilm",),
    budget=Budget(2, "epochs"),
    seeds=(0, 1, 2),
    batch_size=256,
    learning_rates=(1e-4,),
    tokens=16384,
    arms=("static", "dynamic", "buckets", "grouped", "packing", "unmerged"),
    train=TrainOptions(dtype="bfloat16"),
)
"""effjax compare bucket_sampler:gpu. One H200-class GPU, under 10 minutes; needs SST-2 and `effjax[minilm]`. The whole
of SST-2, in batches of 256, as batches of 32 would leave such a GPU waiting for the host."""

paper = BucketSamplerStudy(
    tasks=tuple(f"{data}/{model}" for model in ("electra-base", "roberta-base") for data in GLUE),
    budget=Budget(3, "epochs"),
    seeds=(0, 1, 2, 3, 4),
    max_length=128,
    batch_size=64,
    learning_rates=(3e-5, 4e-5, 5e-5),
    train=TrainOptions(dtype="bfloat16"),
)
"""effjax compare bucket_sampler:paper. Needs GLUE, and EFFJAX_MODELS, a folder that holds electra-base and roberta-base
as Hugging Face writes them. Days on one GPU: choose with --tasks. The paper's dropout of 0.025 (0 on small sets) is set
with --dropout; its MNLI and QQP are left out."""
