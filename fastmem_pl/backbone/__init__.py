"""The frozen language model: loading, the trunk/tail split, model families, chat pieces."""

from fastmem_pl.backbone.anatomy import find_anatomy
from fastmem_pl.backbone.backbone import Backbone
from fastmem_pl.backbone.cache import FixedCache, cache_rows, continued, room_for
from fastmem_pl.backbone.chat import ChatEncoder, ChatSettings, EncodedContext, pad
from fastmem_pl.backbone.ffn import FFN, BaseActivations, Delta, GradientFactors
from fastmem_pl.backbone.footprint import Footprint, usable_bytes
from fastmem_pl.backbone.loading import fingerprint_of
from fastmem_pl.backbone.settings import BackboneSettings, normalize_precision
from fastmem_pl.backbone.split import Tail, TailInputs

__all__ = [
    "FFN",
    "Backbone",
    "BackboneSettings",
    "BaseActivations",
    "ChatEncoder",
    "ChatSettings",
    "Delta",
    "EncodedContext",
    "FixedCache",
    "Footprint",
    "GradientFactors",
    "Tail",
    "TailInputs",
    "cache_rows",
    "continued",
    "find_anatomy",
    "fingerprint_of",
    "normalize_precision",
    "pad",
    "room_for",
    "usable_bytes",
]
