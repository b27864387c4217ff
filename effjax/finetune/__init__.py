"""Fine-tuning: low-rank adapters and chains of them."""
