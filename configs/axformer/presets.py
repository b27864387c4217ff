"""Presets of the AxFormer study: what `effjax compare axformer:<name>` runs."""

from effjax.recipes.axformer import AxformerStudy
from effjax.recipes.spec import Budget
from effjax.train.options import TrainOptions

GLUE = ("glue/cola", "glue/rte", "glue/mrpc", "glue/qnli", "sst2")

smoke = AxformerStudy(
    tasks=("sms_spam/encoder-2x32",),
    budget=Budget(8, "epochs"),
    seeds=(0,),
    train_rows=1600,
    test_rows=600,
    max_length=24,
    max_shapes=1,
    learning_rates=(2e-3,),
    arms=("finetuned", "axformer-loose", "random"),
)
"""effjax compare axformer:smoke. Two CPU cores, about a minute. SMS messages, a small encoder from scratch."""

cpu = AxformerStudy(
    tasks=("sst2/encoder-4x64",),
    budget=Budget(5, "epochs"),
    seeds=(0, 1, 2),
    max_length=48,
    max_shapes=3,
)
"""effjax compare axformer (= axformer:cpu). Two CPU cores; needs SST-2 (EFFJAX_DATA or a hub). An encoder that was
trained until it over-fits: the authors' agreement of one half removes little, without it a good part goes."""

minilm = AxformerStudy(
    tasks=("sst2/minilm",),
    budget=Budget(2, "epochs"),
    seeds=(0, 1, 2),
    train_rows=3000,
    validation=0.1,
    max_length=48,
    max_shapes=2,
    learning_rates=(1e-4,),
    group_size=128,
    arms=("*", "!axformer-tolerant", "!axformer-target", "!fisher"),
)
"""effjax compare axformer:minilm. Two CPU cores; needs SST-2 and `effjax[minilm]`. A pretrained encoder of 6 layers, on
3,000 of the training texts, of which 300 are searched on; `gpu` takes all."""

own = AxformerStudy(
    tasks=("sst2/minilm",),
    budget=Budget(2, "epochs"),
    seeds=(0,),
    max_length=64,
    max_shapes=3,
    learning_rates=(1e-4,),
    group_size=128,
    arms=("finetuned", "axformer", "axformer-loose", "axformer-distilled", "random", "fisher-repair"),
)
"""effjax compare axformer --data texts.csv --model FOLDER (= axformer:own with them). Your fine-tuned classifier, or an
encoder that is fine-tuned first."""

gpu = AxformerStudy(
    tasks=("sst2/minilm", "glue/rte/minilm", "glue/cola/minilm"),
    budget=Budget(3, "epochs"),
    seeds=(0, 1, 2),
    learning_rates=(1e-4,),
    group_size=128,
)
"""effjax compare axformer:gpu. One H200-class GPU; needs SST-2, GLUE and `effjax[minilm]`."""

paper = AxformerStudy(
    tasks=tuple(f"{data}/bert-base-cased" for data in GLUE),
    budget=Budget(3, "epochs"),
    seeds=(42, 43, 44, 45, 46),
    max_length=128,
    learning_rates=(2e-5,),
    group_size=256,
    train=TrainOptions(),
)
"""effjax compare axformer:paper. BERT-base-cased (EFFJAX_MODELS, a folder as Hugging Face writes it) on GLUE's tasks of
classes; the paper's server test sets have no labels, so the held-out rows are GLUE's validation sets. WNLI is left out:
its pruned models predict one class."""
