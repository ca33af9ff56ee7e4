"""Token id lists of different lengths as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad token id lists to ``(ids, mask)``, both ``(B, T)``; mask is 1 on real tokens.

    On a GPU the width of rows that fill up on the right is a multiple of 8: its matrix units are several
    times slower on other shapes.

    >>> pad([[5, 6], [7]], 0, "left", torch.device("cpu"))[0].tolist()
    [[5, 6], [0, 7]]
    """
    multiple = 1 if device.type == "cpu" or side == "left" else 8
    width = -(-max(len(row) for row in rows) // multiple) * multiple
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return ids.to(device), mask.to(device)
