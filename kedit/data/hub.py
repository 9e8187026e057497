"""Where data sets come from: the hub, or a local folder laid out like it, named by ``KEDIT_MIRROR``."""

import os
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from kedit import KeditError

SECONDS = 5
"""How long the hub may take to say that a data set is there."""


def mirror() -> Path | None:
    """The folder that ``KEDIT_MIRROR`` names, None if it is not set.

    Raises:
        KeditError: it is no folder.
    """
    if not (name := os.environ.get("KEDIT_MIRROR")):
        return None
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        raise KeditError(
            f"KEDIT_MIRROR is {name!r}, which is no folder; give one that holds owner/dataset, or unset it."
        )
    return folder


def dataset(name: str) -> str:
    """What to hand to ``datasets.load_dataset`` for a hub id: the mirror's folder, or the id if the hub has it.

    With ``HF_HUB_OFFLINE=1`` the hub is not asked, and what is in the cache of ``datasets`` will do.

    Raises:
        KeditError: not in the mirror; or the hub is out of reach, has no such data set, or keeps it behind a gate.
    """
    if folder := mirror():
        if not (folder / name).is_dir():
            raise KeditError(f"KEDIT_MIRROR has no data set {name}; put it there, or unset it to use the hub.")
        return str(folder / name)
    if constants.HF_HUB_OFFLINE:
        return name
    try:
        HfApi().dataset_info(name, timeout=SECONDS)
    except RepositoryNotFoundError as error:  # a gated one is found by those who may read it
        raise KeditError(
            f"data set {name} is not on the hub, or is gated; ask for access on its page and set HF_TOKEN, or set "
            "KEDIT_MIRROR."
        ) from error
    except Exception as error:  # whatever its HTTP client raises: for us the hub is out of reach
        raise KeditError(
            f"data set {name} is not here and the hub is out of reach ({type(error).__name__}); set KEDIT_MIRROR to a "
            "folder that holds it, or HF_HUB_OFFLINE=1 if it was downloaded before."
        ) from error
    return name
