"""Shared settings: eight virtual CPU devices are asked for by subprocess tests only; here one device, offline."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import typecheck

typecheck.install()
