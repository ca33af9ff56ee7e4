"""The settings of decoding, with the paper's defaults for question answering."""

import math
from dataclasses import dataclass

from fastmem_pl.base.errors import FastMemError, unknown

LAYER_RANGES = ("auto", "low", "high")


@dataclass(frozen=True)
class DecodingSettings:
    """How tokens are chosen; every decoder is built from these.

    Args:
        max_new_tokens: most tokens of an answer, the end token included.
        alpha: strength of the contrast (cd and cad); 0 is no contrast.
        temperature: 0 takes the token of the highest score; above 0, tokens are drawn from the softmax of
            the decoder's scores divided by it.
        top_p: draw from the fewest tokens whose probabilities reach this sum.
        top_k: draw from this many most likely tokens; 0 for all.
        repetition_penalty: divides positive and multiplies negative scores of tokens that prompt or answer
            hold already (Keskar et al., arXiv 1909.05858); ``None`` leaves it to the decoder: 1.2 for dola,
            as its paper advises, 1 (none) for the others.
        seed: of the draws; up to rounding, an answer depends on it and on its sample, not on the batch.
        stop: texts that end an answer; the answer is cut before them.
        dola_layers: premature layers that dola chooses from: "high" (upper half of the model), "low"
            (lower half), "auto" (high, but at most the upper 20 layers), or a list of hidden-state
            numbers or fractions of the depth.
        relative_top: dola keeps tokens of at least this share of the highest probability.
    """

    max_new_tokens: int = 100
    alpha: float = 0.5
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    dola_layers: str | tuple[float, ...] = "auto"
    relative_top: float = 0.1

    def __post_init__(self) -> None:
        penalty = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        for name, value, fits, allowed in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("alpha", self.alpha, 0 <= self.alpha < math.inf, "0 or above"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or above"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or above"),
            ("repetition_penalty", penalty, 0 < penalty < math.inf, "above 0, or null"),
            ("seed", self.seed, self.seed >= 0, "0 or above"),
            ("stop", self.stop, not isinstance(self.stop, str) and all(self.stop), "texts, none empty"),
            ("relative_top", self.relative_top, 0 < self.relative_top <= 1, "above 0, at most 1"),
        ):
            if not fits:
                raise FastMemError(f"model.decode.{name}: {value!r} is out of range; allowed: {allowed}")
        if isinstance(self.dola_layers, str) and self.dola_layers not in LAYER_RANGES:
            raise unknown("model.decode.dola_layers", self.dola_layers, [*LAYER_RANGES, "a list of layers"])
