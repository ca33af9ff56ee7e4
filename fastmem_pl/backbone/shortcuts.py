"""Common forms of what follows the last FFN, found on loading by comparison with the model's own code.

Where there is one, nothing is replayed, and the kernels can be used.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmem_pl.backbone.anatomy import Anatomy
from fastmem_pl.backbone.replay import Record, Replay
from fastmem_pl.base.errors import FastMemError


@dataclass(frozen=True)
class Shortcuts:
    """Common forms of what follows an FFN, for which nothing is replayed, with the names of their norms.

    ``block``: a block returns ``residual + scale * post_norm(output)``; ``top``: the head's input is
    ``scale * norm(state)``. ``None`` where the model does something else. Logits are
    ``softcap * tanh(logit_scale * head / softcap)``, with ``None`` for no cap. A block ``mixes`` positions
    after its FFN where a convolution or a recurrence follows, whose state then depends on the memory.
    """

    block: tuple[float, str | None] | None
    top: tuple[float, str | None] | None
    logit_scale: float = 1.0
    softcap: float | None = None
    mixes: bool = False


@torch.no_grad()
def find_shortcuts(anatomy: Anatomy, record: Record, output: Tensor) -> Shortcuts:
    """Compare common forms with replays of a pass, for its FFN's ``output`` ``(B, T, D)`` and another."""
    replay = Replay(anatomy, len(anatomy.blocks) - 1, anatomy.head.weight.device)
    generator = torch.Generator("cpu").manual_seed(0)
    other = torch.randn(output.shape, generator=generator, device="cpu").to(output) * output.std()
    zero, *states = (replay.block(value, record) for value in (torch.zeros_like(output), output, other))
    changes = [state - zero for state in states]
    norms = {None: nn.Identity(), **replay.after}
    block = next(_scales(norms, [output, other], changes), None) if zero.shape == output.shape else None
    heads = [replay.top(state, record) for state in states]
    moved = output.clone()
    moved[:, 0] = other[:, 0]
    later = [head[:, 1:] for head in (heads[0], replay.top(replay.block(moved, record), record))]
    mixes = not torch.allclose(*later, rtol=1e-4, atol=1e-5 * later[0].abs().max().item())
    block = None if mixes else block
    top = next(_scales({None: nn.Identity(), **replay.above}, states, heads), None)
    probe = torch.linspace(-3, 3, anatomy.head.weight.shape[0], device=output.device).expand(
        *record.ids.shape, -1
    )
    found, capped = (replay.logits(value, record, states[0]).float() for value in (probe, 1e6 * probe.sign()))
    limit, slope = capped.abs().max().item(), (found[..., -1] / 3).mean().item()
    if limit < 1e5:
        scale = limit * math.atanh(slope * 3 / limit) / 3
        fits = torch.allclose(limit * torch.tanh(scale * probe / limit), found, rtol=1e-3, atol=1e-4)
    else:
        limit, scale = None, slope
        fits = torch.allclose(scale * probe, found, rtol=1e-3, atol=1e-4)
    if not fits:
        raise FastMemError(
            f"model.backbone: {type(anatomy.model).__name__} changes the output of its LM head in a way that "
            "is not known; allowed: a scale and a soft-cap"
        )
    return Shortcuts(block, top, _rounded(scale), limit and _rounded(limit), mixes)


def _scales(
    norms: Mapping[str | None, nn.Module], given: Sequence[Tensor], wanted: Sequence[Tensor]
) -> Iterator[tuple[float, str | None]]:
    """Modules that take what is given to what is wanted, up to a factor, and leave zero what it is."""
    for path, norm in norms.items():
        try:
            found = [norm(value) for value in given]
            rest = norm(torch.zeros_like(given[0])).abs().max()
        except Exception:  # it takes something else than hidden states
            continue
        if not all(isinstance(f, Tensor) and f.shape == w.shape for f, w in zip(found, wanted, strict=True)):
            continue
        scale = ((found[0] * wanted[0]).sum() / found[0].square().sum()).item()
        errors = [(scale * f - w).norm() / w.norm() for f, w in zip(found, wanted, strict=True)]
        if max(errors) < 1e-5 and rest == 0:
            yield _rounded(scale), path


def _rounded(value: float) -> float:
    """Without what rounding adds to a constant of a few digits."""
    short = float(f"{value:.5g}")
    return short if abs(short - value) < 2e-6 * abs(value) else value
