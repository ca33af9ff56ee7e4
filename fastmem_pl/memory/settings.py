"""The settings of memorizing, with the paper's defaults for question answering."""

import math
from dataclasses import asdict, dataclass

from fastmem_pl.base.errors import FastMemError, unknown

OPTIMIZER_STATES = ("auto", "float32")
EXPERTS = ("auto", "shared", "routed")
_AT_LEAST = {"steps": 0, "kl_coeff": 0, "num_layers": 1, "weight_decay": 0}
_AT_LEAST |= {"max_context_tokens": 1, "kl_gain": 0, "max_experts": 1}
_ABOVE_ZERO = ("learning_rate", "max_grad_norm", "kl_target")


@dataclass(frozen=True)
class MemorizationSettings:
    """How a context is memorized (Zhu et al., arXiv 2406.16069, section 3 and appendix).

    Args:
        steps: full-context updates (the paper's epochs); 0 leaves the model as it is.
        learning_rate: constant AdamW learning rate.
        kl_coeff: weight of ``KL(p_0 || p_n)``, which holds the model near itself.
        num_layers: train the FFNs of this many last blocks.
        weight_decay: decoupled AdamW decay of the trained weights.
        max_grad_norm: bound of each sample's own gradient norm.
        max_context_tokens: context tokens memorized at most; the rest is cut off.
        kl_target: adapt ``kl_coeff`` from step to step so that the KL approaches this value
            (nats a token); ``None`` keeps it constant.
        kl_gain: how fast it adapts.
        optimizer_state: ``auto`` keeps deltas and first moments in bfloat16 where the kernel updates them
            (bfloat16 on CUDA); ``float32`` keeps everything in float32, which takes more of both time and
            memory.
        experts: of a mixture, those whose FFN is trained: ``shared``, the one that all positions go through;
            ``routed``, those that the context is sent to; ``auto``, the shared one if there is one.
        max_experts: routed experts trained for a context at most, those most used first; by default as many
            as have 16,384 hidden units together.
    """

    steps: int = 10
    learning_rate: float = 1e-5
    kl_coeff: float = 0.1
    num_layers: int = 1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_context_tokens: int = 7500
    kl_target: float | None = None
    kl_gain: float = 0.1
    optimizer_state: str = "auto"
    experts: str = "auto"
    max_experts: int | None = None

    def __post_init__(self) -> None:
        if self.experts not in EXPERTS:
            raise unknown("model.memorize.experts", self.experts, EXPERTS)
        if self.optimizer_state not in OPTIMIZER_STATES:
            raise unknown("model.memorize.optimizer_state", self.optimizer_state, OPTIMIZER_STATES)
        for name in (*_AT_LEAST, *_ABOVE_ZERO):
            value, least = getattr(self, name), _AT_LEAST.get(name)
            if value is None:
                continue
            fits = value > 0 if least is None else value >= least
            if not (fits and math.isfinite(value)):
                allowed = "above 0" if least is None else f"at least {least}"
                raise FastMemError(f"model.memorize.{name}: {value} is out of range; allowed: {allowed}")

    def as_dict(self) -> dict[str, float | bool | str | None]:
        """Plain values by name."""
        return asdict(self)


POLICIES = ("joint", "sequential", "cut")


@dataclass(frozen=True)
class WindowSettings:
    """How a text that is longer than the model's context is cut into windows and memorized.

    Args:
        policy: ``joint``: every update is on all windows, with the loss averaged over all tokens;
            ``sequential``: the windows one after the other, each with all updates and a fresh optimizer,
            going on from the memory so far; ``cut``: the first window only, as the paper does.
        window: most tokens of the text in a window; as many as model and settings allow by default.
        overlap: tokens that a window repeats from the one before, as context without loss; an eighth of a
            window by default.
    """

    policy: str = "joint"
    window: int | None = None
    overlap: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise unknown("windows", self.policy, POLICIES)
        for name, value, least in (("window", self.window, 1), ("overlap", self.overlap, 0)):
            if value is not None and not (isinstance(value, int) and value >= least):
                raise FastMemError(f"{name}: {value} is out of range; allowed: whole numbers from {least}")

    def resolved(self, limit: int) -> tuple[int, int]:
        """Window and overlap where at most ``limit`` tokens fit a window."""
        window = limit if self.window is None else self.window
        overlap = window // 8 if self.overlap is None else self.overlap
        if window > limit:
            raise FastMemError(
                f"window: {window} is out of range; allowed: at most {limit}, the context limit"
            )
        if overlap >= window:
            raise FastMemError(f"overlap: {overlap} is out of range; allowed: less than the window, {window}")
        return window, overlap
