"""Programs compiled as a user's are, where the tests' quicker settings would show in them."""

import os


def as_users_compile() -> dict[str, bool]:
    """Options of ``Lowered.compile`` that undo the setting of ``XLA_FLAGS`` in ``conftest.py``."""
    return {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ.get("XLA_FLAGS", "") else {}
