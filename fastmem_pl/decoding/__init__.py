"""Decoding: the loop, the decoders, and the methods made of them."""

from fastmem_pl.decoding.decoders import (
    DECODERS,
    Contrastive,
    Decoder,
    DecodingSettings,
    Greedy,
    StepLogits,
)
from fastmem_pl.decoding.loop import Prefill
from fastmem_pl.decoding.methods import BASELINE, METHODS, Method, select_methods

__all__ = [
    "BASELINE",
    "DECODERS",
    "METHODS",
    "Contrastive",
    "Decoder",
    "DecodingSettings",
    "Greedy",
    "Method",
    "Prefill",
    "StepLogits",
    "select_methods",
]
