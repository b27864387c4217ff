"""Per stem, how to shrink its studies for the tests; every row of METHODS must be here."""

_FEW_TEXTS = [
    *("--tasks", "sms_spam/encoder-1x8", "--train-rows", "200", "--test-rows", "50", "--budget.amount", "2"),
]
_FEW_SEQUENCES = [
    *("--tasks", "noisy-digits-12", "--hidden", "8", "--batch-size", "8", "--train-rows", "64", "--test-rows", "40"),
]

_FEW_IMAGES = [
    *("--train-rows", "128", "--calibration-rows", "300", "--test-rows", "100", "--batch-size", "32"),
    *("--joint-errors", "0.2", "--prices", "0", "30"),
]

_FEW_MAPS = [
    *("--tasks", "digits", "--shrink", "1", "--widths", "3", "--deep-blocks", "1", "--batch-size", "8"),
    *("--inference-batch", "8", "--train-rows", "64", "--test-rows", "40"),
]

_SMALL_IMAGES = [
    *("--tasks", "digits/resnet-4", "--depth", "1", "--train-rows", "64", "--test-rows", "32", "--batch-size", "16"),
]

# Words that make the smoke preset a few seconds' work without losing an arm kind.
TINY = {
    "samuel": [
        *("--budget.amount", "60", "--grid", "0.1", "--seeds", "0", "1"),
        *("--arms", "sgd-*", "cosine-*", "schedule-free", "samuel", "uniform", "one-gradient"),
    ],
    "dcl": [
        *("--budget.amount", "60", "--batch-size", "16", "--tasks", "digits/mlp-16", "--noise-rows", "200"),
        *("--tail-rows", "300", "--settings", "noise", "tail", "--seeds", "0", "1"),
        *("--arms", "erm", "fixed-1", "dcl-0.1", "marginal", "risk"),
    ],
    "cola": [
        *("--budget.amount", "60", "--links", "2", "--arms", "lora", "cola-2", "resets", "--seeds", "0", "1"),
    ],
    "bucket_sampler": [
        *(*_FEW_TEXTS, "--max-length", "16", "--max-shapes", "2", "--arms", "static", "dynamic", "buckets"),
        *("--seeds", "0", "1"),
    ],
    "token_drop": [
        *(*_FEW_TEXTS, "--max-length", "16", "--max-shapes", "2", "--arms", "buckets", "token-drop", "random"),
        *("--seeds", "0", "1"),
    ],
    "icpc": [
        *("--tasks", "digits/vit-16-1", "--patch", "2", "--scales", "0.5", "1", "--shares", "1", "1"),
        *("--train-rows", "200", "--test-rows", "60", "--batch-size", "20", "--budget.amount", "4"),
        *("--arms", "full", "icpc-late", "--seeds", "0", "1"),
    ],
    "axformer": [
        *(*_FEW_TEXTS, "--max-length", "16", "--max-shapes", "1", "--group-size", "8", "--validation", "0.3"),
        *("--arms", "finetuned", "axformer-loose", "axformer-tuned", "axformer-distilled", "--seeds", "0", "1"),
    ],
    "fptt": [
        *("--budget.amount", "40", "--alphas", "0.02", "--hidden", "8", "--seeds", "0", "1"),
        *("--arms", "bptt", "chunked", "fptt-0.02", "fptt-epochs"),
    ],
    "irnn": [*_FEW_SEQUENCES, "--arms", "lstm", "irnn", "irnn-shared", "--budget.amount", "40", "--seeds", "0", "1"],
    "tarnn": [*_FEW_SEQUENCES, "--arms", "lstm", "tarnn-euler", "--budget.amount", "40", "--seeds", "0", "1"],
    "global_layer": [
        *(*_FEW_MAPS, "--arms", "shallow", "global", "--budget.amount", "2", "--seeds", "0", "1"),
    ],
    "fastrain": [
        *(
            "--arms",
            "fastrain-plateau",
            "st-deep-plateau",
            "lp",
            "--budget.amount",
            "8",
            "--budget.unit",
            "steps",
            "--hidden",
            "8",
        ),
        *("--epochs-per-step", "5", "--samples", "2", "--threshold", "0.3"),
    ],
    "disk": [
        *("--tasks", "digits/mlp-4", "--teacher", "mlp-16", "--teacher-epochs", "2", "--shrink", "1", "--rounds", "3"),
        *("--train-rows", "120", "--test-rows", "60", "--batch-size", "20", "--budget.amount", "4"),
        *("--seeds", "0", "1", "--arms", "ce", "kd", "support", "disk", "disk-separate", "disk-best"),
    ],
    "geeni": [
        *("--arms", "single", "geeni-learned", "--hidden", "8", "--members", "2", "--modes", "full"),
        *("--fractions", "0.1", "--budget.amount", "60", "--seeds", "0", "1"),
    ],
    "selective": [
        *(*_FEW_IMAGES, "--tasks", "fashion_mnist/mlp-8", "--budget.amount", "20", "--budget.unit", "steps"),
        *("--arms", "ce", "osp-30", "osp-saddle", "sat", "--seeds", "0", "1"),
    ],
    "hybrid": [
        *("--tasks", "digits/mlp-8/mlp-16", "--arms", "margin", "router", "alternating", "oracle"),
        *("--budget.amount", "2", "--pair-steps", "40", "--coverage", "0.7", "--seeds", "0", "1"),
    ],
    "si_cnn": [
        *("--tasks", "digits/resnet-4", "--shrink", "1", "--train-rows", "128", "--test-rows", "60"),
        *("--batch-size", "32", "--budget.amount", "6", "--seeds", "0", "1", "--arms", "dense", "si"),
    ],
    "dynamic_inference": [
        *(*_SMALL_IMAGES, "--budget.amount", "12", "--seeds", "0", "1", "--arms", "dense", "layers", "random"),
    ],
}

# Words that let the paper preset take one step here: built-in data, few rows, a small batch.
PAPER = {
    "samuel": [
        *("--tasks", "fashion_mnist/cnn", "--batch-size", "4", "--budget.amount", "4"),
        *("--train-rows", "64", "--test-rows", "32", "--experts", "0.1", "0.01", "--loop", "unroll"),
    ],
    "dcl": [
        *("--tasks", "fashion_mnist/resnet20", "--batch-size", "4", "--budget.amount", "4", "--budget.unit", "steps"),
        *("--noise-rows", "64", "--test-rows", "32"),
    ],
    "cola": [
        *("--tasks", "sms_spam/stories260k", "--batch-size", "2", "--budget.amount", "4", "--budget.unit", "steps"),
        *("--train-rows", "16", "--test-rows", "8", "--max-length", "48"),
    ],
    "bucket_sampler": [*_FEW_TEXTS, "--seeds", "0", "--dropout", "0"],
    "token_drop": [*_FEW_TEXTS, "--seeds", "0", "--dropout", "0", "--low-dropout", "0"],
    "icpc": [
        *("--tasks", "digits/vit-8-1", "--patch", "4", "--pixels", "8", "--scales", "0.5", "1", "--shares", "1", "1"),
        *("--train-rows", "32", "--test-rows", "16", "--batch-size", "4", "--budget.amount", "1"),
        *("--certify", "search"),
    ],
    "axformer": [*_FEW_TEXTS, "--max-length", "16", "--seeds", "0", "--dropout", "0", "--group-size", "8"],
    "fptt": [
        *("--tasks", "digits-permuted", "tiny_shakespeare-chars-24", "--batch-size", "4", "--hidden", "8"),
        *("--train-rows", "32", "--test-rows", "16", "--budget.amount", "4", "--budget.unit", "steps"),
    ],
    "irnn": [*_FEW_SEQUENCES, "--budget.amount", "1"],
    "tarnn": [*_FEW_SEQUENCES, "--budget.amount", "1"],
    "global_layer": [*_FEW_MAPS, "--budget.amount", "4", "--budget.unit", "steps"],
    "fastrain": [
        *("--tasks", "cora", "--per-class", "2", "--seeds", "0", "--hidden", "8", "--epochs-per-step", "2"),
        *("--budget.amount", "4", "--budget.unit", "steps", "--calibration-epochs", "2", "--samples", "2"),
    ],
    "disk": [
        *("--tasks", "digits/resnet-4-8", "--teacher", "mlp-16", "--teacher-epochs", "1", "--rounds", "2"),
        *("--train-rows", "64", "--test-rows", "32", "--batch-size", "8", "--budget.amount", "1"),
    ],
    "geeni": [
        *("--tasks", "cora", "--hidden", "8", "--members", "2", "--budget.amount", "10"),
        *("--epochs-per-step", "1", "--seeds", "0"),
    ],
    "selective": [
        *(*_FEW_IMAGES, "--tasks", "fashion_mnist/resnet20", "--pool", "2", "--batch-size", "4"),
        *("--budget.amount", "4", "--budget.unit", "steps"),
    ],
    "hybrid": [
        *("--tasks", "digits/mlp-8/mlp-16", "--pair-steps", "2", "--budget.amount", "1", "--seeds", "0"),
    ],
    "si_cnn": [
        *("--tasks", "digits/inverted-4", "--expansion", "2", "--train-rows", "64", "--test-rows", "32"),
        *("--batch-size", "4", "--budget.amount", "1", "--crop", "1", "--seeds", "0"),
    ],
    "dynamic_inference": [*_SMALL_IMAGES, "--budget.amount", "2", "--budget.unit", "steps"],
}

# One arm of each kind in the paper preset.
PAPER_ARMS = {
    "samuel": ["fashion_mnist-cnn-offline/sgd-0.1", "fashion_mnist-cnn-offline/samuel"],
    "dcl": ["fashion_mnist-resnet20-noise/erm", "fashion_mnist-resnet20-noise/dcl-0.1"],
    "cola": ["sms_spam-stories260k/cola-3", "sms_spam-stories260k/full"],
    "bucket_sampler": ["sms_spam-encoder-1x8/static-3e-05", "sms_spam-encoder-1x8/growing-4e-05"],
    "token_drop": ["sms_spam-encoder-1x8/buckets-3e-05", "sms_spam-encoder-1x8/token-drop-3e-05"],
    "icpc": ["digits-vit-8-1/icpc", "digits-vit-8-1/full"],
    "axformer": ["sms_spam-encoder-1x8/axformer", "sms_spam-encoder-1x8/fisher-repair"],
    "fptt": ["digits-permuted-torch-lstm-8/bptt", "tiny_shakespeare-chars-24-torch-lstm-8/fptt-0.1"],
    "irnn": ["noisy-digits-12/irnn-3", "noisy-digits-12/chrono-lstm"],
    "tarnn": ["noisy-digits-12/tarnn-convex", "noisy-digits-12/lru-4"],
    "global_layer": ["digits/global-many", "digits/implicit"],
    "fastrain": ["cora-2/fastrain"],
    "disk": ["digits-resnet-4-8/kd", "digits-resnet-4-8/disk-separate", "digits-resnet-4-8/disk-paper"],
    "geeni": ["cora/geeni-learned", "cora/single", "cora/distilled"],
    "selective": ["fashion_mnist-resnet20/osp-30", "fashion_mnist-resnet20/osp-saddle", "fashion_mnist-resnet20/sat"],
    "hybrid": ["digits-mlp-8-mlp-16/margin", "digits-mlp-8-mlp-16/router-gain", "digits-mlp-8-mlp-16/alternating"],
    "si_cnn": ["digits-inverted-4/si-gated"],
    "dynamic_inference": ["digits-resnet-4/layers-channels", "digits-resnet-4/block-drop"],
}

# One arm of the tiny study whose run is cut in a phase and, where there are several, at a phase's border.
RESUMED = {
    "samuel": "digits-mlp-64-shift/samuel",
    "dcl": "digits-mlp-16-noise/dcl-0.1",
    "cola": "digits-mlp-64-64/cola-2",
    "bucket_sampler": "sms_spam-encoder-1x8/buckets",
    "token_drop": "sms_spam-encoder-1x8/token-drop",
    "icpc": "digits-vit-16-1/icpc-late",
    "axformer": "sms_spam-encoder-1x8/axformer-tuned",
    "fptt": "digits-permuted-lstm-8/fptt-epochs",
    "irnn": "noisy-digits-12/irnn",
    "tarnn": "noisy-digits-12/tarnn-euler",
    "global_layer": "digits/global",
    "fastrain": "cora-8/fastrain-plateau",
    "disk": "digits-mlp-4/disk-separate",
    "geeni": "cora/geeni-learned",
    "selective": "fashion_mnist-mlp-8/sat",
    "hybrid": "digits-mlp-8-mlp-16/alternating",
    "si_cnn": "digits-resnet-4/si",
    "dynamic_inference": "digits-resnet-4/layers",
}
