"""A short hash by which a memory knows the model that it belongs to."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from fastmem_pl.backbone.quantization import stored_tensors
from fastmem_pl.backbone.sharding import whole

# What is hashed of the config, and how it samples the weights.
_CONSTANTS = ("rope_parameters", "rms_norm_eps", "hidden_act", "sliding_window", "num_attention_heads")
_SAMPLED, _STRIDE = 256, 1_000_003


def fingerprint_of(model: Any) -> str:
    """A short hash of a model's architecture, its constants, and a sample of every weight."""
    config = model.config.get_text_config()
    constants = {name: getattr(config, name, None) for name in _CONSTANTS}
    digest = hashlib.sha256(f"{type(model).__name__}{constants}".encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        for tensor in stored_tensors(whole(parameter)):
            flat = tensor.detach().flatten()
            # A stride prime to any row length, so that the sample is spread over rows and columns.
            places = torch.arange(_SAMPLED, device=flat.device) * _STRIDE % flat.numel()
            sample = flat[places].cpu()
            # As bfloat16, so that a model has one fingerprint in every precision; packed ones as stored.
            if sample.is_floating_point():
                sample = sample.to(torch.bfloat16).view(torch.int16)
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
