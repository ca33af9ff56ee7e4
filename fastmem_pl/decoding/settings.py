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
        alpha: strength of the contrast. cd, cad: as it is. coiecd: of the contrast between with and without
            the context. adacad, adacd: factor of the divergence that sets the strength of a step. ck-plug:
            from 0, the context alone, to 1, the model's own knowledge alone, where the two conflict.
            ``None`` leaves it to the decoder: 0.5 for cd and cad, 1 for coiecd, adacad and adacd, and for
            ck-plug a value a step from the entropies with and without the context.
        alpha_min: adacad and adacd: least strength of a step; the paper takes 0.3 for long answers.
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
        relative_top: contrastive decoders keep tokens of at least this share of the highest probability
            (plausibility constraint, Li et al., arXiv 2210.15097); 0 keeps all. ``None`` leaves it to the
            decoder: 0.1 for dola, 0.01 for ck-plug, 0 for the others.
        entropy_bound: coiecd contrasts tokens above this share of the highest probability with the context,
            and those below the lowest one divided by it; 1 contrasts none.
        renyi_order: cocoa: order of the divergence between the predictions with and without the context.
        gap_weight: cocoa: how much that divergence, and what the context takes from the entropy, count for
            the context.
        peak_weight: cocoa: how much the lead of the most likely token over the next counts for the context.
    """

    max_new_tokens: int = 100
    alpha: float | None = None
    alpha_min: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    dola_layers: str | tuple[float, ...] = "auto"
    relative_top: float | None = None
    entropy_bound: float = 0.25
    renyi_order: float = 0.5
    gap_weight: float = 1.0
    peak_weight: float = 5.0

    def __post_init__(self) -> None:
        # Scores divided by less may be infinite.
        cool = self.temperature == 0
        # What is left open fits.
        penalty, alpha, top = (
            1.0 if value is None else value
            for value in (self.repetition_penalty, self.alpha, self.relative_top)
        )
        for name, value, fits, allowed in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("alpha", alpha, 0 <= alpha < math.inf, "0 or above, or null"),
            ("alpha_min", self.alpha_min, 0 <= self.alpha_min < math.inf, "0 or above"),
            (
                "temperature",
                self.temperature,
                cool or 0.001 <= self.temperature < math.inf,
                "0, or from 0.001",
            ),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or above"),
            ("repetition_penalty", penalty, 0 < penalty < math.inf, "above 0, or null"),
            ("seed", self.seed, self.seed >= 0, "0 or above"),
            ("stop", self.stop, not isinstance(self.stop, str) and all(self.stop), "texts, none empty"),
            ("relative_top", top, 0 <= top <= 1, "0 (all) to 1, or null"),
            ("entropy_bound", self.entropy_bound, 0 < self.entropy_bound <= 1, "above 0, at most 1"),
            ("renyi_order", self.renyi_order, 0 < self.renyi_order < 1, "above 0, below 1"),
            ("gap_weight", self.gap_weight, 0 <= self.gap_weight < math.inf, "0 or above"),
            ("peak_weight", self.peak_weight, 0 <= self.peak_weight < math.inf, "0 or above"),
        ):
            if not fits:
                raise FastMemError(f"model.decode.{name}: {value!r} is out of range; allowed: {allowed}")
        if isinstance(self.dola_layers, str) and self.dola_layers not in LAYER_RANGES:
            raise unknown("model.decode.dola_layers", self.dola_layers, [*LAYER_RANGES, "a list of layers"])
