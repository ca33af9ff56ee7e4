"""Decoding: the loop, the decoders, and the methods made of them."""

from fastmem_pl.decoding import adaptive as _adaptive  # noqa: F401 (registers its decoders)
from fastmem_pl.decoding.decoders import (
    DECODERS,
    Decoder,
    DecoderFactory,
    DoLa,
    StepLogits,
    decoders_using,
)
from fastmem_pl.decoding.graphs import GraphPool
from fastmem_pl.decoding.loop import Decoding, Generated, decode
from fastmem_pl.decoding.methods import BASELINE, METHODS, Method, select_methods
from fastmem_pl.decoding.prefill import Prefill, Prefills, PromptCache
from fastmem_pl.decoding.settings import DecodingSettings

__all__ = [
    "BASELINE",
    "DECODERS",
    "METHODS",
    "Decoder",
    "DecoderFactory",
    "Decoding",
    "DecodingSettings",
    "DoLa",
    "Generated",
    "GraphPool",
    "Method",
    "Prefill",
    "Prefills",
    "PromptCache",
    "StepLogits",
    "decode",
    "decoders_using",
    "select_methods",
]
