"""What an editor remembers of earlier edits, so that later ones do not move their keys: AlphaEdit's M, ENCORE's S.

S is a sum of k k^T, which is never formed. Keys are seen through a map (AlphaEdit's into the null space, ENCORE's by
the root of its matrix): there the system of the next edit is a multiple of the identity and one rank for every earlier
edit, so that Woodbury's identity needs a Cholesky factor of the size of their number. An edit adds a row to it: nothing
that an edit costs is cubic.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kedit.model.memory import Memory


class KeyMemory(Memory):
    """Keys of earlier edits, (layers, m) each, and what the next edit needs of them.

    For each layer those keys as they are mapped, (r, n), and the Cholesky factor (n, n) of weight I + their Gram
    matrix, which grows by a row an edit.
    """

    def __init__(self) -> None:
        super().__init__()
        self._grown: dict[int, tuple[Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Forget all."""
        super().clear()
        self._grown.clear()

    def read(
        self, position: int, mapped: Callable[[Tensor], Tensor], weight: float, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mapped keys of the layer at a position, and the factor, brought up to the last edit.

        Args:
            mapped: (m,) -> (r,), the same at every call.
            like: mapped keys of the present edit, (r, any): what type they are of and where they are.
        """
        keys, factor = self._grown.get(position, none(like))
        for entry in self.entries[keys.shape[1] :]:
            key = entry["keys"][position].to(like, copy=True)  # as in SecondMoments: replayed edits have the same bits
            keys, factor = grow(keys, factor, mapped(key), weight)
        self._grown[position] = keys, factor
        return keys, factor


def none(like: Tensor) -> tuple[Tensor, Tensor]:
    """No keys, and their factor."""
    return like[:, :0], like.new_zeros(0, 0)


def grow(keys: Tensor, factor: Tensor, key: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """One key more: keys (r, n + 1) and the Cholesky factor of weight I + their Gram matrix."""
    across = torch.linalg.solve_triangular(factor, (keys.T @ key)[:, None], upper=False)
    corner = (weight + key @ key - across.square().sum()).sqrt().view(1, 1)
    factor = torch.cat([torch.nn.functional.pad(factor, (0, 1)), torch.cat([across.T, corner], 1)])
    return torch.cat([keys, key[:, None]], 1), factor
