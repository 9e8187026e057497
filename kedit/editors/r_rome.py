"""R-ROME: ROME with one key throughout.

Gupta et al., "Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing", 2024. ROME's
released code makes the direction of the update from the averaged key but divides by the bare prompt's key;
where the two disagree the update explodes. Here the averaged key stands in both places.
"""

from torch import Tensor

from kedit.editors.rome import ROME


class RROME(ROME):
    """W gains (v* - W kbar) u^T / (kbar . u), u = C^-1 kbar: the edited W maps the averaged key to v*."""

    name = "r-rome"
    style = ("#d55e00", "D", "--")

    def _mapped(self, keys: Tensor) -> Tensor:
        return keys.mean(0)
