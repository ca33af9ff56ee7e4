"""Decoding: the loop, the decoders, and the methods made of them."""

from fastmem_pl.decoding.decoders import (
    DECODERS,
    ContextAware,
    Contrastive,
    Decoder,
    DecoderFactory,
    DoLa,
    Greedy,
    StepLogits,
)
from fastmem_pl.decoding.graphs import GraphPool
from fastmem_pl.decoding.loop import Decoded, Decoding, Generated, begin, decode
from fastmem_pl.decoding.methods import BASELINE, METHODS, Method, select_methods
from fastmem_pl.decoding.prefill import Prefill, Prefills, PromptCache
from fastmem_pl.decoding.settings import DecodingSettings

__all__ = [
    "BASELINE",
    "DECODERS",
    "METHODS",
    "ContextAware",
    "Contrastive",
    "Decoded",
    "Decoder",
    "DecoderFactory",
    "Decoding",
    "DecodingSettings",
    "DoLa",
    "Generated",
    "GraphPool",
    "Greedy",
    "Method",
    "Prefill",
    "Prefills",
    "PromptCache",
    "StepLogits",
    "begin",
    "decode",
    "select_methods",
]
