"""Decodes of short prompts, and plain loops over whole models with edited weights."""

import math
import re
from collections import Counter

import numpy as np
import torch
from conftest import make_model, make_tokenizer
from memories import generated, merged, plain_fit
from runs import RECORDS, SUMMARIES, SUMMARY_TASKS, shown

from fastmem_pl import Backbone
from fastmem_pl.backbone import EncodedContext
from fastmem_pl.decoding import Decoding, DecodingSettings, Prefill

PROMPTS = ["Who?", "A much longer question about what stands where, and why?", "x"]
BARE = ["Who", "Why and where?", "x y"]
STRONG = {"steps": 5, "learning_rate": 3e-3}
SAMPLED = {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.3, "seed": 3}
LAYERS = (0, 1, 2)
DECODER_NAMES = ("greedy", "cd", "cad", "dola", "adacad", "adacd", "coiecd", "cocoa", "ck-plug")
# Those that choose a strength at every step.
ADAPTIVE = DECODER_NAMES[4:]
ICL = (
    "Please extract from the context the span that best answers the question and provide the answer in the "
    'following format: "The answer is: ...".\nContext: '
)
TEXTS = {  # what stands for {context} and {question} in the prompts
    "nqswap": [(r["sub_context"], r["input"] + "?") for r in RECORDS["nq"]],
    "nq": [(r["context"], r["input"] + "?") for r in RECORDS["nq"]],
    "nqswap_icl": [(ICL + r["sub_context"], r["input"] + "?") for r in RECORDS["nq"]],
    "nq_icl": [(ICL + r["context"], r["input"] + "?") for r in RECORDS["nq"]],
    "memotrap": [
        (
            'Write a quote that ends in the word "first".',
            'He laughs best who laughs\nCandidates: "first" or "last"',
        )
    ],
    "hotpotqa": [("The Long is a river.  It is long.\nShort.", "Which river is longer?")],
    "qa": [(r["context"], r["question"]) for r in RECORDS["qa"]],
    **{task: [(r["article"], "") for r in SUMMARIES] for task in SUMMARY_TASKS},
}
TOKENIZER = make_tokenizer()
START, END = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])


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
    """A decode of texts; ``prompts`` and ``bare`` may be prefills or ids as well."""
    num_layers = num_layers or (memory.num_layers if memory else 1)
    made = DecodingSettings(**{"max_new_tokens": 8, "dola_layers": LAYERS, **settings})

    def prefill(texts):
        if isinstance(texts, Prefill):
            return texts
        ids = [text if isinstance(text, list) else backbone.chat.prompt(text) for text in texts]
        return Prefill(backbone, ids, num_layers, LAYERS)

    shown, hidden = prefill(prompts), prefill(bare if isinstance(bare, Prefill) else bare[: len(prompts)])
    return Decoding(shown, decoder, made, memory and memory.deltas, hidden, keys)


def token_ids(backbone, *args, **kwargs):
    return [generated.token_ids for generated in start(backbone, *args, **kwargs).run()]


def assert_generate(backbone, prompts, found, tokens=8):
    """Answers are those of the model's own generate, one prompt at a time."""
    for prompt, ids in zip(prompts, found, strict=True):
        assert [ids] == generated(backbone.model, [prompt], max_new_tokens=tokens), len(prompt)


@torch.no_grad()
def plain_scores(decoder, model, base, ids, bare, settings, histogram, softcap=None):
    """Scores of the next token by whole forward passes; DoLa as golden/README.md states it."""
    decoder, penalty = decoder.split("+")[-1], settings.get("repetition_penalty")
    alpha, top = settings.get("alpha", 0.5), settings.get("relative_top")
    found = model(torch.tensor([ids]), output_hidden_states=True)
    scores = found.logits[0, -1]
    if decoder in ("cd", "cad"):
        other = base(torch.tensor([ids if decoder == "cd" else bare])).logits[0, -1]
        kept = scores >= scores.max() + math.log(top or 1e-30)
        scores = torch.where(kept, (1 + alpha) * scores - alpha * other, -torch.inf)
    elif decoder in ADAPTIVE:
        other = base(torch.tensor([ids if decoder == "adacd" else bare])).logits[0, -1]
        settings = {**settings, "relative_top": top or (0.01 if decoder == "ck-plug" else 1e-30)}
        scores = torch.tensor(plain_adaptive(decoder, scores, other, settings)[0])
    elif decoder == "dola":
        mature, penalty, divergence, early = scores.log_softmax(-1), penalty or 1.2, {}, {}
        for i in settings["dola_layers"]:
            logits = model.get_output_embeddings()(found.hidden_states[i][0, -1])
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            early[i] = logits.log_softmax(-1)
            middle = (mature.exp() + early[i].exp()) / 2
            divergence[i] = (middle * (2 * middle.log() - mature - early[i])).sum().item()
        chosen = max(divergence, key=divergence.get)
        histogram[chosen] += 1
        kept = mature >= mature.max() + math.log(top or 0.1)
        scores = torch.where(kept, mature - early[chosen], -torch.inf)
    seen = torch.tensor(sorted(set(ids)))
    if penalty:
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    return scores


def plain_adaptive(decoder, shown, hidden, settings):
    """Scores and strength of a decoder that chooses one, token by token in double precision."""
    q, p = (logits.double().softmax(-1).tolist() for logits in (shown, hidden))
    alpha, top = settings.get("alpha"), settings.get("relative_top", 1e-30)

    def entropy(probabilities):
        return -sum(x * math.log(x) for x in probabilities if x > 0)

    def log(x):
        return math.log(x) if x > 0 else -math.inf

    def kl(one, two):
        return sum(x * math.log(x / y) for x, y in zip(one, two, strict=True) if x > 0)

    pairs = list(zip(q, p, strict=True))
    if decoder == "ck-plug":
        least = [min(top * max(side), sorted(side)[-min(10, len(side))]) for side in (q, p)]
        head = [x >= least[0] or y >= least[1] for x, y in pairs]
        kept = np.array(pairs)[head]
        doubt, sure = (entropy(side / side.sum()) for side in kept.T)
        scores, dial = [log(x) for x in q], math.nan
        if doubt > sure:
            dial = doubt / (doubt + sure) if alpha is None else alpha
            scores = [dial * log(y) + (1 - dial) * (log(x) - log(y)) for x, y in pairs]
        return [s if keep else -math.inf for s, keep in zip(scores, head, strict=True)], dial
    if decoder in ("adacad", "adacd"):
        middle = [(x + y) / 2 for x, y in pairs]
        strength = (1.0 if alpha is None else alpha) * (kl(q, middle) + kl(p, middle)) / 2
        strength = max(strength, settings.get("alpha_min", 0.0))
        scores = ((1 + strength) * shown.double() - strength * hidden.double()).tolist()
    elif decoder == "coiecd":
        bound, alpha = settings.get("entropy_bound", 0.25), 1.0 if alpha is None else alpha
        # The softmax of every token's information, which is its inverse probability made to sum to 1.
        information = np.array([1 / x for x in q]) / sum(1 / x for x in q)
        low = information < min(information) / bound
        low = low & (low.sum() != 1)
        outside = low | (information > max(information) * bound)
        start = [log(x if out else y) for x, y, out in zip(q, p, outside, strict=True)]
        scores = [s + alpha * (log(x) - log(y)) for s, x, y in zip(start, q, p, strict=True)]
        strength = sum(x for x, out in zip(q, outside, strict=True) if out)
    else:
        order = settings.get("renyi_order", 0.5)
        shared = sum(y**order * x ** (1 - order) for x, y in pairs)
        divergence = math.log(shared) / (order - 1)
        first, second = sorted(q)[:-3:-1]
        weight = settings.get("gap_weight", 1.0) * (entropy(p) - entropy(q) + divergence / (1 + divergence))
        weight += settings.get("peak_weight", 5.0) * (first - second)
        strength = 1 / (1 + math.exp(-weight))
        scores = [strength * log(x) + (1 - strength) * log(y) for x, y in pairs]
    return [s if x >= top * max(q) else -math.inf for s, x in zip(scores, q, strict=True)], strength


def expected_tokens(backbone, decoder, memory, row, prompt, bare, tokens=8, **settings):
    """One row, decoded with whole forward passes of whole models and the formulas as published."""
    models, ids = (merged(backbone, memory, row), backbone.model), []
    settings, softcap = {"dola_layers": LAYERS, **settings}, backbone.tail().softcap
    while len(ids) < tokens and (not ids or ids[-1] not in backbone.stop_ids):
        read = (prompt + ids, bare + ids)
        ids.append(int(plain_scores(decoder, *models, *read, settings, Counter(), softcap).argmax()))
    return ids


def plain_ids(text: str) -> list[int]:
    """Ids of text, one a byte; nothing in it is a control token."""
    return [i for character in text for i in TOKENIZER.encode(character, add_special_tokens=False)]


def plain_prompt(task: str, form: str, sample: int) -> list[int]:
    named = dict(zip(("{context}", "{question}"), TEXTS[task][sample], strict=True))
    text = re.sub("{context}|{question}", lambda found: named[found[0]], shown(task)[form])
    return [START, *plain_ids(f"user\n{text}"), END, *plain_ids("\n"), START, *plain_ids("assistant\n")]


def plain_memorize(context: str, steps: int = 2, layers: int = 1, kl_coeff: float = 0.1):
    """The published algorithm on a text: the edited model and its curve."""
    header = [START, *plain_ids("assistant\n")]
    encoded = EncodedContext([*header, *plain_ids(context), END], len(header), 0, 0)
    backbone = Backbone(make_model(), TOKENIZER)
    curve, _, model = plain_fit(backbone, [[encoded]], steps, 0.01, kl_coeff, layers)
    return model, dict(zip(("cross_entropy", "kl", "grad_norm"), curve.T.tolist(), strict=True))
