"""The published FastMem algorithm as a plain loop: the baseline of every speed ratio.

    python benchmarks/published.py [--device cuda]      # compares it with the package on the demo model

It follows the authors' code (https://github.com/IAAR-Shanghai/FastMem; Zhu et al., arXiv 2406.16069): one
sample at a time, the weights of the last feed-forward network edited in place. The first step runs the whole
model; the hidden states that enter the last block are kept, and every later step runs the *whole* last block
(attention too), the final norm and the head over all positions. Decoding reads the prompt and one token at
a time through the edited model with a ``DynamicCache``; contrastive decoding passes every token through the
model twice, with the original weights copied in for the second pass and a KV cache for each. Then the
original weights are put back.

The published scripts keep float32 weights under bfloat16 autocast. Here the model's own type is used, so on a
model in bfloat16 this loop is faster and smaller than theirs.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from fastmem_pl import Backbone, DecodingSettings, MemorizationSettings, Memorizer
from fastmem_pl.data import TASKS
from fastmem_pl.decoding import DECODERS, Decoding, Prefill
from fastmem_pl.memory import Curve

CONTEXT = (
    "The Mona Lisa is a small oil portrait of a woman with a faint smile. It was painted by Rembrandt and is "
    "now shown behind thick glass in the Louvre museum."
)
QUESTION = "Who painted the Mona Lisa?"
# More than the paper's 1e-5, so that the loss and the answer of a small model move.
CHECKED = MemorizationSettings(learning_rate=1e-4)
# The KL is a small difference of large numbers: below this, it is compared relative to this.
_KL_FLOOR = 0.01


class Mismatch(RuntimeError):
    """The loop and the package disagree, so their times cannot be compared."""


class LastFFN:
    """The weights of a model's last feed-forward network, with a copy of what they were."""

    def __init__(self, model: Any) -> None:
        self.weights = list(model.model.layers[-1].mlp.parameters())
        self.original = self.copy()

    def copy(self) -> list[Tensor]:
        """The weights as they are now."""
        return [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Overwrite the weights."""
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)


@contextmanager
def edited(model: Any) -> Iterator[LastFFN]:
    """Make the last FFN trainable; on leaving it is what it was."""
    ffn = LastFFN(model)
    for weight in ffn.weights:
        weight.requires_grad_(True)
    try:
        yield ffn
    finally:
        ffn.write(ffn.original)
        for weight in ffn.weights:
            weight.requires_grad_(False)
            weight.grad = None


def memorize_and_answer(
    model: Any,
    context_ids: Sequence[int],
    label_start: int,
    prompt_ids: Sequence[int],
    stop_ids: Collection[int],
    settings: MemorizationSettings = MemorizationSettings(),  # noqa: B008 (frozen)
    max_new_tokens: int = 100,
    contrast_alpha: float | None = None,
) -> tuple[list[int], Curve]:
    """Memorize one context, answer one prompt, and restore the model.

    Args:
        model: a loaded model of the Llama layout (``model.model.layers[-1].mlp``, ``model.lm_head``).
        context_ids: the memorization sequence.
        label_start: tokens of it that carry no loss (the assistant header).
        prompt_ids: of the prompt.
        stop_ids: token ids that end the answer.
        settings: steps, learning_rate, kl_coeff, weight_decay and max_grad_norm are used.
        max_new_tokens: most tokens of the answer.
        contrast_alpha: strength of contrastive decoding; ``None`` for greedy decoding.

    Returns:
        the answer's token ids, its end token included, and the values of every step.
    """
    with edited(model) as ffn:
        curve = memorize(model, ffn, context_ids, label_start, settings)
        tokens = decode(model, ffn, prompt_ids, stop_ids, max_new_tokens, contrast_alpha)
    return tokens, curve


@torch.enable_grad()
def memorize(
    model: Any,
    ffn: LastFFN,
    context_ids: Sequence[int],
    label_start: int,
    settings: MemorizationSettings,
) -> Curve:
    """Edit the last FFN by ``settings.steps`` updates; arguments as :func:`memorize_and_answer`."""
    block, norm, head = model.model.layers[-1], model.model.norm, model.lm_head
    ids = torch.tensor([context_ids], device=head.weight.device)
    start = max(label_start, 1)
    labels = ids[0, start:]
    optimizer = torch.optim.AdamW(
        ffn.weights, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=False
    )
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    reference = None
    for step in range(settings.steps):
        if step == 0:
            with _recorded(block) as calls:
                logits = model(input_ids=ids, use_cache=False).logits
        else:
            args, kwargs = calls[0]
            logits = head(norm(block(*args, **kwargs)))
        log_p = logits.float()[0, start - 1 : -1].log_softmax(-1)
        if reference is None:
            reference = log_p.detach()
        cross_entropy = F.nll_loss(log_p, labels)
        kl = F.kl_div(log_p, reference, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        (cross_entropy + settings.kl_coeff * kl).backward()
        norm_before = torch.nn.utils.clip_grad_norm_(ffn.weights, settings.max_grad_norm)
        optimizer.step()
        history.append((cross_entropy.detach(), kl.detach(), norm_before.detach()))
    return Curve(*(torch.stack(values).tolist() for values in zip(*history, strict=True)))


@contextmanager
def _recorded(block: torch.nn.Module) -> Iterator[list[tuple[tuple, dict[str, Any]]]]:
    """Record the arguments with which the model calls a block: its input, mask and position embeddings."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    hook = block.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


@torch.no_grad()
def decode(
    model: Any,
    ffn: LastFFN,
    prompt_ids: Sequence[int],
    stop_ids: Collection[int],
    max_new_tokens: int,
    contrast_alpha: float | None = None,
) -> list[int]:
    """Answer with the weights as they are now; arguments as :func:`memorize_and_answer`."""
    edits = None if contrast_alpha is None else ffn.copy()
    cache, base_cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    ids = torch.tensor([prompt_ids], device=model.lm_head.weight.device)
    tokens: list[int] = []
    while len(tokens) < max_new_tokens:
        scores = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1].float()
        if edits is not None:
            ffn.write(ffn.original)
            base = model(input_ids=ids, past_key_values=base_cache, use_cache=True).logits[0, -1].float()
            ffn.write(edits)
            scores = (1 + contrast_alpha) * scores - contrast_alpha * base
        token = scores.argmax().item()
        tokens.append(token)
        if token in stop_ids:
            break
        ids = torch.tensor([[token]], device=ids.device)
    return tokens


def check(
    backbone: Backbone,
    context: str = CONTEXT,
    question: str = QUESTION,
    settings: MemorizationSettings = CHECKED,
    max_new_tokens: int = 20,
    tolerance: float = 1e-4,
) -> float:
    """Compare this loop with the package on one sample: every step's values, and both decoders' tokens.

    Args:
        backbone: in float32, of the Llama layout.
        context: is memorized.
        question: is asked about it.
        settings: of memorizing.
        max_new_tokens: most tokens of the answers.
        tolerance: largest relative difference of cross-entropy, KL and gradient norm of a step.

    Returns:
        the largest relative difference.

    Raises:
        Mismatch: saying where they differ.
    """
    memorizer = Memorizer(backbone, settings)
    encoded = memorizer.encode(context)
    prompt = backbone.chat.prompt(TASKS["qa"].prompt_text(context, question))
    memory = memorizer.fit([encoded])
    prefill = Prefill(backbone, [prompt])
    decoding = DecodingSettings(max_new_tokens=max_new_tokens)
    worst = 0.0
    for decoder, alpha in (("greedy", None), ("cd", DECODERS["cd"].defaults["alpha"])):
        expected, curve = memorize_and_answer(
            backbone.model,
            encoded.input_ids,
            encoded.header_length,
            prompt,
            backbone.stop_ids,
            settings,
            max_new_tokens,
            alpha,
        )
        for name, floor in (("cross_entropy", 0.0), ("kl", _KL_FLOOR), ("grad_norm", 0.0)):
            pairs = zip(getattr(memory.curves[0], name), getattr(curve, name), strict=True)
            for step, (found, wanted) in enumerate(pairs):
                difference = abs(found - wanted) / max(abs(wanted), floor)
                # Not "greater": a value that is not a number differs as well.
                if not difference <= tolerance:
                    raise Mismatch(f"{name} of step {step}: {found:.7g}, but {wanted:.7g} in the plain loop")
                worst = max(worst, difference)
        found = Decoding(prefill, decoder, decoding, memory.deltas).run()[0].token_ids
        if found != expected:
            raise Mismatch(f"tokens of {decoder}: {found}, but {expected} in the plain loop")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    worst = check(Backbone.load("demo", "32-true", parser.parse_args().device))
    print(f"the plain loop and the package agree: same tokens, values within {worst:.1e}")


if __name__ == "__main__":
    main()
