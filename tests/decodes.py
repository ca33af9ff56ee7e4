"""Decodes of short prompts, and plain loops over whole models with edited weights."""

import math
import re
from collections import Counter

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
DECODER_NAMES = ("greedy", "cd", "cad", "dola")
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
