"""Per stem, how to shrink its studies for the tests; every row of METHODS must be here."""

# Words that make the smoke preset a few seconds' work without losing an arm kind.
TINY = {
    "samuel": ["--budget.amount", "60", "--grid", "0.1", "--others", "schedule-free", "--seeds", "0", "1"],
}

# Words that let the paper preset take one step here: built-in data, few rows, a small batch.
PAPER = {
    "samuel": [
        *("--tasks", "fashion_mnist/resnet20", "--batch-size", "4", "--budget.amount", "4"),
        *("--train-rows", "64", "--test-rows", "32", "--experts", "0.1", "0.01", "--loop", "unroll"),
    ],
}

# One arm of each kind in the paper preset.
PAPER_ARMS = {"samuel": ["fashion_mnist-resnet20-offline/sgd-0.1", "fashion_mnist-resnet20-offline/samuel"]}
