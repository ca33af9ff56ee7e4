"""Many memories answer one prompt: the trunk runs once for rows that have said the same so far.

The trunk knows nothing of memories, so rows of one prompt that chose the same tokens share its states and
keys and values. They part where their tokens do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmem_pl.backbone import TailInputs
from fastmem_pl.decoding.loop import Prefill
from fastmem_pl.decoding.state import Path


class SharedPath:
    """Rows that grow token by token from one prompt, with one row of the trunk for all that agree.

    Args:
        path: of the one prompt.
        num_rows: ``R``.
    """

    def __init__(self, path: Path, num_rows: int) -> None:
        self._path = path
        # Trunk row of each row.
        self._branch = torch.zeros(num_rows, dtype=torch.long)

    @property
    def mask(self) -> Tensor:
        """1 on slots that hold a token, ``(branches, room)``."""
        return self._path.mask

    @property
    def position(self) -> Tensor:
        """Slot of the next token, ``(1,)``."""
        return self._path.position

    @property
    def early(self) -> Sequence[int]:
        """Numbers of the hidden states that the trunk hands over."""
        return self._path.early

    def read(self, tokens: Tensor) -> TailInputs:
        """Run the trunk on one token ``(R,)`` of every row, once for rows that agree in all so far."""
        pairs, branch = torch.stack([self._branch, tokens]).unique(dim=1, return_inverse=True)
        parents, tokens = pairs
        if not torch.equal(parents, torch.arange(self._path.mask.shape[0])):
            self._path = self._path.rows(parents)
        self._branch = branch
        return self._path.read(tokens).rows(branch)

    def move(self) -> None:
        """Go on to the next slot."""
        self._path.move()

    def rows(self, index: Tensor) -> SharedPath:
        """A copy with some rows only."""
        # Both write to the trunk's cache from now on, so it is copied as well.
        parents, branch = self._branch[index].unique(return_inverse=True)
        twin = SharedPath(self._path.rows(parents), len(index))
        twin._branch = branch
        return twin


class SharedPrefill:
    """The prefill of one prompt as that of ``R`` rows; stands in for :class:`Prefill`.

    Args:
        prefill: of one prompt.
        num_rows: ``R``.
    """

    def __init__(self, prefill: Prefill, num_rows: int) -> None:
        self._prefill, self._num_rows = prefill, num_rows
        self.backbone, self.num_layers = prefill.backbone, prefill.num_layers
        self.trunk_layers = prefill.trunk_layers
        self.ids, self.mask = (t.expand(num_rows, -1) for t in (prefill.ids, prefill.mask))
        self.keys = prefill.keys * num_rows
        self.inputs = prefill.inputs.expand(num_rows)

    def __len__(self) -> int:
        return self._num_rows

    def path(self, max_new_tokens: int) -> Path | SharedPath:
        """Go on from the prompt.

        On a GPU every row has a trunk row of its own, as the host would have to wait for each token to
        know which agree; and so with several trained layers, whose blocks above the first keep keys and
        values of their own.
        """
        path = self._prefill.path(max_new_tokens)
        if self.backbone.device.type == "cpu" and self.num_layers == 1:
            return SharedPath(path, self._num_rows)
        return path.rows(torch.zeros(self._num_rows, dtype=torch.long, device=self.mask.device))
