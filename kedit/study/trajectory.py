"""One model edited by one method in one order; and the units of work that a run is made of.

The functions at the end are what workers do. Arguments and results are plain and everything else is
in the store, so a worker may be any process on any machine that sees the store's folder.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.editors import editor
from kedit.editors.second_moments import SecondMoments
from kedit.evaluation import damage, refusal, success
from kedit.evaluation.harness import evaluate
from kedit.model import lm as models
from kedit.model.journal import FORMAT, Edit, EditFailed
from kedit.store import Store, digest

if TYPE_CHECKING:
    from kedit.study.params import Method, Params


log = logging.getLogger(__name__)


class Trajectory:
    """One model edited by one method in one order, brought to any checkpoint on demand.

    Attributes:
        states: for each count of edits, from 0, the hash of all that the edited model depends on, under
            which the store keeps the last of these edits.
    """

    def __init__(self, lm, method: "Method", requests: Sequence, statistics: Any, store: Store):

        self.lm, self.store, self.requests = lm, store, requests
        self.editor = editor(method.method, lm, hparams=method.hparams, statistics=statistics)
        self.editable = method.method != "control"
        lm.journal.reset()
        self.states = [digest("model", lm.fingerprint)]
        recipe = self.editor.key()
        for request in requests:
            self.states.append(digest(FORMAT, self.states[-1], recipe, request.key()))

    def advance(self, count: int) -> None:
        """Bring the model from no edit to ``count``, replaying what is stored and storing what is new."""

        journal = self.lm.journal
        journal.reset()
        for state, request in zip(self.states[1 : count + 1], self.requests, strict=False):
            if (stored := self.store.get(state)) is not None:
                journal.replay(Edit.from_bytes(stored))
                continue
            try:
                edit = self.editor.apply(request)
            except EditFailed as error:
                log.warning("edit %d (%s) failed: %s", len(journal.edits) + 1, request.id, error)
                edit = Edit(self.editor.name, request.id, info={"failed": str(error)})
                journal.replay(edit)
            if self.editable and not edit.changes and not {"failed", "skipped"} & set(edit.info):
                raise RuntimeError(f"{self.editor.name} left the model unchanged at {request.id}")
            self.store.put(state, edit.to_bytes())


# What workers do -----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _loaded(model: str, dtype: str, statistics: tuple) -> tuple:
    """(LM, second moments) of the model that a worker is at."""
    import torch

    device = ("cpu", "cuda", "auto")[min(torch.cuda.device_count(), 2)]  # of several GPUs each holds a part
    lm = models.load(model, device=device, dtype=getattr(torch, dtype))
    return lm, SecondMoments(lm, **dict(statistics))


def _trajectory(params: "Params", model: str, position: int, order: int, folder: Path) -> Trajectory:
    lm, statistics = _loaded(model, params.dtype, tuple(params.statistics.items()))
    return Trajectory(lm, params.methods[position], params.requests(order), statistics, Store(folder))


def survey(params: "Params", model: str, folder: Path) -> tuple[dict[str, Any], dict[tuple[int, int], list[str]]]:
    """What is to be known of a model before work is shared out.

    Returns:
        what a manifest says of it, with the ``memory`` a worker needs and the positions in
        ``params.methods`` of those that must ``prepare``; the states of each trajectory, by (position, order).
    """
    lm, _ = _loaded(model, params.dtype, tuple(params.statistics.items()))
    places = [(position, order) for position in range(len(params.methods)) for order in params.orders]
    trajectories = {place: _trajectory(params, model, *place, folder) for place in places}
    editors = {position: trajectory.editor for (position, _), trajectory in trajectories.items()}
    weights = sum(weight.numel() * weight.element_size() for weight in lm.model.parameters())
    about = {
        "fingerprint": lm.fingerprint,
        "parameters": sum(weight.numel() for weight in lm.model.parameters()),
        "begin_token": lm.tokenizer.convert_ids_to_tokens(lm.begin),
        # the weights, the original bits of what is edited, activations; libraries
        "memory": 3 * weights + 1_500_000_000,
        "prepare": [position for position, editor in editors.items() if editor.trained or editor.moments_of],
    }
    return about, {place: trajectory.states for place, trajectory in trajectories.items()}


def prepare(params: "Params", model: str, positions: Sequence[int], folder: Path) -> None:
    """What methods need before their first edit: second moments for all in one pass, and training."""
    editors = [_trajectory(params, model, position, params.orders[0], folder).editor for position in positions]
    _, statistics = _loaded(model, params.dtype, tuple(params.statistics.items()))
    statistics.prepare(sorted({layer for editor in editors for layer in editor.moments_of}))
    for method in editors:
        method.prepare()


def advance(params: "Params", model: str, position: int, order: int, folder: Path) -> None:
    """Make all edits of a trajectory."""
    _trajectory(params, model, position, order, folder).advance(max(params.edits))


def measure(
    params: "Params",
    model: str,
    position: int,
    order: int,
    count: int,
    keys: Mapping[str, tuple[str, str]],
    folder: Path,
) -> None:
    """Compute cells of one checkpoint.

    Args:
        keys: for each benchmark the key of the cell and that of the unedited model's. What the unedited
            model generated are the guesses that make generating cheaper, whichever worker does it.
    """

    trajectory = _trajectory(params, model, position, order, folder)
    trajectory.advance(count)
    lm, store = trajectory.lm, trajectory.store
    for benchmark, (key, unedited) in keys.items():
        guesses = store.get_json(unedited)["drafts"] if key != unedited else ()
        lm.drafts = {tuple(prompt): tokens for prompt, tokens in guesses}
        start = time.perf_counter()
        if benchmark == "edit":  # the unedited model is asked about all edits to come, a checkpoint about those made
            items = success.measure(lm, trajectory.requests[: count or None])
        elif benchmark == "structure":
            items = damage.measure(lm, params.statistics["text"], skip=params.statistics["tokens"])
        elif benchmark == "refusal":
            items = refusal.refusals(lm)
        else:
            items = evaluate(lm, benchmark, params.limit)
        found = {"seconds": round(time.perf_counter() - start, 3), "items": items}
        if key == unedited:
            found["drafts"] = list(lm.drafts.items())
        store.put_json(key, found)
