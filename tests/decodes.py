"""Decodes of short prompts, and what whole models with edited weights say to them."""

import copy
import math
from collections import Counter

import torch

from fastmem_pl.backbone.families import find_anatomy
from fastmem_pl.decoding import Decoding, DecodingSettings, Prefill

PROMPTS = ["Who?", "A much longer question about what stands where, and why?", "x"]
BARE = ["Who", "Why and where?", "x y"]
STRONG = {"steps": 5, "learning_rate": 3e-3}
SAMPLED = {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.3, "seed": 3}
LAYERS = (0, 1, 2)
DECODER_NAMES = ("greedy", "cd", "cad", "dola")


def start(
    backbone,
    decoder="greedy",
    memory=None,
    prompts=PROMPTS,
    bare=BARE,
    num_layers=None,
    keys=None,
    **settings,
):
    """A decode of texts; ``prompts`` and ``bare`` may be prefills as well."""
    num_layers = num_layers or (memory.num_layers if memory else 1)
    made = DecodingSettings(**{"max_new_tokens": 8, "dola_layers": LAYERS, **settings})

    def prefill(texts):
        if isinstance(texts, Prefill):
            return texts
        return Prefill(backbone, [backbone.chat.prompt(text) for text in texts], num_layers, LAYERS)

    shown, hidden = prefill(prompts), prefill(bare if isinstance(bare, Prefill) else bare[: len(prompts)])
    return Decoding(shown, decoder, made, memory and memory.deltas, hidden, keys)


def token_ids(backbone, *args, **kwargs):
    return [generated.token_ids for generated in start(backbone, *args, **kwargs).run()]


def merged(backbone, memory, row):
    """A copy of the model whose weights hold one memory."""
    model = copy.deepcopy(backbone.model)
    if memory is None:
        return model
    anatomy, first = find_anatomy(model), backbone.num_blocks - memory.num_layers
    with torch.no_grad():
        for layer, deltas in enumerate(memory.deltas):
            for name, projection in anatomy.projections(first + layer).items():
                projection.weight.add_(deltas[name][row])
    return model


@torch.no_grad()
def plain_scores(decoder, model, base, ids, bare, settings, histogram, softcap=None):
    """Scores of the next token by whole forward passes; DoLa as golden/README.md states it."""
    alpha, penalty = settings.get("alpha", 0.5), settings.get("repetition_penalty")
    found = model(torch.tensor([ids]), output_hidden_states=True)
    scores = found.logits[0, -1]
    if decoder.endswith("cd"):
        scores = (1 + alpha) * scores - alpha * base(torch.tensor([ids])).logits[0, -1]
    elif decoder.endswith("cad"):
        scores = (1 + alpha) * scores - alpha * base(torch.tensor([bare])).logits[0, -1]
    elif decoder.endswith("dola"):
        mature, penalty, divergence, early = scores.log_softmax(-1), penalty or 1.2, {}, {}
        for i in settings["dola_layers"]:
            logits = model.get_output_embeddings()(found.hidden_states[i][0, -1])
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            early[i] = logits.log_softmax(-1)
            middle = (mature.exp() + early[i].exp()) / 2
            divergence[i] = (middle * (2 * middle.log() - mature - early[i])).sum().item()
        chosen = max(divergence, key=divergence.get)
        histogram[chosen] += 1
        kept = mature >= mature.max() + math.log(settings.get("relative_top", 0.1))
        scores = torch.where(kept, mature - early[chosen], -torch.inf)
    seen = torch.tensor(sorted(set(ids)))
    if penalty:
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    return scores


def expected_tokens(backbone, decoder, memory, row, prompt, bare, tokens=8):
    """One row, decoded with whole forward passes of whole models and the formulas as published."""
    models, ids = (merged(backbone, memory, row), backbone.model), []
    settings, softcap = {"dola_layers": LAYERS}, backbone.anatomy.softcap
    while len(ids) < tokens and (not ids or ids[-1] not in backbone.stop_ids):
        read = (prompt + ids, bare + ids)
        ids.append(int(plain_scores(decoder, *models, *read, settings, Counter(), softcap).argmax()))
    return ids
