"""Presets of the TokenDrop study: what `effjax compare token_drop:<name>` runs."""

from effjax.recipes.spec import Budget
from effjax.recipes.token_drop import TokenDropStudy
from effjax.train.options import TrainOptions

GLUE = ("glue/cola", "glue/mrpc", "glue/qnli", "glue/rte", "sst2", "glue/stsb", "glue/wnli")

smoke = TokenDropStudy(
    tasks=("sms_spam/encoder-1x32",),
    budget=Budget(3, "epochs"),
    seeds=(0,),
    train_rows=2000,
    dropout=0.0,
    max_shapes=3,
    arms=("buckets", "token-drop", "random", "truncated"),
)
"""effjax compare token_drop:smoke. Two CPU cores, under 60 s in all. SMS messages: a tenth of the
tokens go."""

cpu = TokenDropStudy(
    tasks=("sst2/encoder-2x64", "sms_spam/encoder-2x64"),
    budget=Budget(3, "epochs"),
    seeds=(0, 1, 2),
    train_rows=4000,
    learning_rates=(3e-4,),
)
"""effjax compare token_drop (= token_drop:cpu). Two CPU cores, about ten minutes, of which half compile; needs SST-2
(EFFJAX_DATA or a hub). Expect a tenth to a fifth fewer tokens than BucketSampler alone and as much less time."""

gpu = TokenDropStudy(
    tasks=("sst2/minilm",),
    budget=Budget(2, "epochs"),
    seeds=(0, 1, 2),
    batch_size=256,
    caps=(256,),
    learning_rates=(1e-4,),
    tokens=16384,
    train=TrainOptions(dtype="bfloat16"),
)
"""effjax compare token_drop:gpu. One H200-class GPU, under 10 minutes; needs SST-2 and `effjax[minilm]`."""

paper = TokenDropStudy(
    tasks=tuple(f"{data}/{model}" for model in ("electra-base", "roberta-base") for data in GLUE),
    budget=Budget(3, "epochs"),
    seeds=(0, 1, 2, 3, 4),
    max_length=128,
    batch_size=64,
    caps=(64, 256, 512),
    max_shapes=24,
    learning_rates=(3e-5, 4e-5, 5e-5),
    low_dropout=0.025,
    train=TrainOptions(dtype="bfloat16"),
)
"""effjax compare token_drop:paper. Needs GLUE, and EFFJAX_MODELS, a folder that holds electra-base and roberta-base as
Hugging Face writes them. Days on one GPU: choose with --tasks. On small sets (CoLA, MRPC, RTE, STS-B, WNLI) the paper
has --low-dropout 0; its MNLI and QQP are left out."""
