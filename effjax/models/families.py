"""The families of pretrained transformers by ``model_type``, which ``pretrained`` reads."""

from effjax.models.decoder_families import DECODERS
from effjax.models.encoder_families import ENCODERS
from effjax.models.family_parts import Family

__all__: list[str] = []

FAMILIES: dict[str, Family] = {**ENCODERS, **DECODERS}
