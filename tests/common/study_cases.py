"""Per stem, how to shrink its studies for the tests; every row of METHODS must be here."""

_FEW_TEXTS = [
    *("--tasks", "sms_spam/encoder-1x8", "--train-rows", "200", "--test-rows", "50", "--budget.amount", "2"),
]
_FEW_SEQUENCES = [
    *("--tasks", "noisy-digits-12", "--hidden", "8", "--batch-size", "8", "--train-rows", "64", "--test-rows", "40"),
]

# Words that make the smoke preset a few seconds' work without losing an arm kind.
TINY = {
    "samuel": [
        *("--budget.amount", "60", "--grid", "0.1", "--seeds", "0", "1"),
        *("--arms", "sgd-*", "cosine-*", "schedule-free", "samuel", "uniform", "one-gradient"),
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
    "fptt": [
        *("--budget.amount", "40", "--alphas", "0.02", "--hidden", "8", "--seeds", "0", "1"),
        *("--arms", "bptt", "chunked", "fptt-0.02", "fptt-epochs"),
    ],
    "irnn": [*_FEW_SEQUENCES, "--arms", "lstm", "irnn", "irnn-shared", "--budget.amount", "40", "--seeds", "0", "1"],
    "tarnn": [*_FEW_SEQUENCES, "--arms", "lstm", "tarnn-euler", "--budget.amount", "40", "--seeds", "0", "1"],
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
    "geeni": [
        *("--arms", "single", "geeni-learned", "--hidden", "8", "--members", "2", "--modes", "full"),
        *("--fractions", "0.1", "--budget.amount", "60", "--seeds", "0", "1"),
    ],
    "hybrid": [
        *("--tasks", "digits/mlp-8/mlp-16", "--arms", "margin", "router", "alternating", "oracle"),
        *("--budget.amount", "2", "--pair-steps", "40", "--coverage", "0.7", "--seeds", "0", "1"),
    ],
}

# Words that let the paper preset take one step here: built-in data, few rows, a small batch.
PAPER = {
    "samuel": [
        *("--tasks", "fashion_mnist/resnet20", "--batch-size", "4", "--budget.amount", "4"),
        *("--train-rows", "64", "--test-rows", "32", "--experts", "0.1", "0.01", "--loop", "unroll"),
    ],
    "cola": [
        *("--tasks", "sms_spam/stories260k", "--batch-size", "2", "--budget.amount", "4", "--budget.unit", "steps"),
        *("--train-rows", "16", "--test-rows", "8", "--max-length", "48"),
    ],
    "bucket_sampler": [*_FEW_TEXTS, "--seeds", "0", "--dropout", "0"],
    "token_drop": [*_FEW_TEXTS, "--seeds", "0", "--dropout", "0", "--low-dropout", "0"],
    "fptt": [
        *("--tasks", "digits-permuted", "tiny_shakespeare-chars-24", "--batch-size", "4", "--hidden", "8"),
        *("--train-rows", "32", "--test-rows", "16", "--budget.amount", "4", "--budget.unit", "steps"),
    ],
    "irnn": [*_FEW_SEQUENCES, "--budget.amount", "1"],
    "tarnn": [*_FEW_SEQUENCES, "--budget.amount", "1"],
    "fastrain": [
        *("--tasks", "cora", "--per-class", "2", "--seeds", "0", "--hidden", "8", "--epochs-per-step", "2"),
        *("--budget.amount", "4", "--budget.unit", "steps", "--calibration-epochs", "2", "--samples", "2"),
    ],
    "geeni": [
        *("--tasks", "cora", "--hidden", "8", "--members", "2", "--budget.amount", "10"),
        *("--epochs-per-step", "1", "--seeds", "0"),
    ],
    "hybrid": [
        *("--tasks", "digits/mlp-8/mlp-16", "--pair-steps", "2", "--budget.amount", "1", "--seeds", "0"),
    ],
}

# One arm of each kind in the paper preset.
PAPER_ARMS = {
    "samuel": ["fashion_mnist-resnet20-offline/sgd-0.1", "fashion_mnist-resnet20-offline/samuel"],
    "cola": ["sms_spam-stories260k/cola-3", "sms_spam-stories260k/full"],
    "bucket_sampler": ["sms_spam-encoder-1x8/static-3e-05", "sms_spam-encoder-1x8/growing-4e-05"],
    "token_drop": ["sms_spam-encoder-1x8/buckets-3e-05", "sms_spam-encoder-1x8/token-drop-3e-05"],
    "fptt": ["digits-permuted-torch-lstm-8/bptt", "tiny_shakespeare-chars-24-torch-lstm-8/fptt-0.1"],
    "irnn": ["noisy-digits-12/irnn-3", "noisy-digits-12/chrono-lstm"],
    "tarnn": ["noisy-digits-12/tarnn-convex", "noisy-digits-12/lru-4"],
    "fastrain": ["cora-2/fastrain"],
    "geeni": ["cora/geeni-learned", "cora/single", "cora/distilled"],
    "hybrid": ["digits-mlp-8-mlp-16/margin", "digits-mlp-8-mlp-16/router-gain", "digits-mlp-8-mlp-16/alternating"],
}

# One arm of the tiny study whose run is cut in a phase and, where there are several, at a phase's border.
RESUMED = {
    "samuel": "digits-mlp-64-shift/samuel",
    "cola": "digits-mlp-64-64/cola-2",
    "bucket_sampler": "sms_spam-encoder-1x8/buckets",
    "token_drop": "sms_spam-encoder-1x8/token-drop",
    "fptt": "digits-permuted-lstm-8/fptt-epochs",
    "irnn": "noisy-digits-12/irnn",
    "tarnn": "noisy-digits-12/tarnn-euler",
    "fastrain": "cora-8/fastrain-plateau",
    "geeni": "cora/geeni-learned",
    "hybrid": "digits-mlp-8-mlp-16/alternating",
}
