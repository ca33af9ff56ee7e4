"""Decoding: the loop, the decoders, and the methods made of them."""

from fastmem_pl.decoding.decoders import (
    DECODERS,
    ContextAware,
    Contrastive,
    Decoder,
    DoLa,
    Greedy,
    StepLogits,
)
from fastmem_pl.decoding.graphs import GraphPool
from fastmem_pl.decoding.loop import Decoding, Generated, Prefill, PrefillCache, PromptCache
from fastmem_pl.decoding.methods import BASELINE, METHODS, Method, select_methods
from fastmem_pl.decoding.settings import DecodingSettings
from fastmem_pl.decoding.shared import SharedPrefill

__all__ = [
    "BASELINE",
    "DECODERS",
    "METHODS",
    "ContextAware",
    "Contrastive",
    "Decoder",
    "Decoding",
    "DecodingSettings",
    "DoLa",
    "Generated",
    "GraphPool",
    "Greedy",
    "Method",
    "Prefill",
    "PrefillCache",
    "PromptCache",
    "SharedPrefill",
    "StepLogits",
    "select_methods",
]
