"""Data set, preprocessing, model, loss and metrics, by modality."""
