"""One model edited by one method in one order; and the jobs that a run consists of.

The functions at the end are what workers do. Arguments and results are plain and everything else is
in the store, so a worker may be any process on any machine that sees the store's folder.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from kedit.data.requests import EditRequest
from kedit.editors import editor
from kedit.editors.second_moments import SecondMoments
from kedit.evaluation import Examiner
from kedit.model import lm as models
from kedit.model.journal import FORMAT, Edit, EditFailed
from kedit.store import Store, claim, digest
from kedit.study.params import Params

log = logging.getLogger(__name__)

PAUSE = 1.0
"""Seconds that a worker waits where others are at all that it was to do."""


class Line(NamedTuple):
    """Which trajectory of a model: the method's position in ``Params.methods``, and the order of the edits."""

    position: int
    order: int


def states_of(
    fingerprint: str, recipe: Mapping[str, Any], requests: Sequence[EditRequest], steps: Sequence[int] | None = None
) -> dict[int, str]:
    """For each count of edits after a step, from 0, the hash of all that the edited model depends on.

    The store keeps the last step's edit under it.

    Args:
        fingerprint: the model's.
        recipe: the editor's (``Editor.recipe``).
        steps: those counts (``Params.steps``); by default a step is one request.
    """
    states = {0: digest("model", fingerprint)}
    for before, count in pairwise(steps or range(len(requests) + 1)):
        turn = [request.key() for request in requests[before:count]]
        states[count] = digest(FORMAT, states[before], recipe, turn if len(turn) > 1 else turn[0])
    return states


class Trajectory:
    """One model edited by one method in one order, brought to any checkpoint on demand."""

    def __init__(self, params: Params, model: str, line: Line):
        self.lm, self.moments, self.examiner = _loaded(
            model, params.dtype, tuple(params.statistics.model_dump().items())
        )
        method = params.methods[line.position]
        self.lm.journal.reset()
        self.store, self.requests = Store(), params.requests(line.order)
        self.editor = editor(method.method, self.lm, hparams=method.hparams, statistics=self.moments)
        self.states = states_of(self.lm.fingerprint, self.editor.key(), self.requests, params.steps(method))

    def advance(self, count: int) -> None:
        """Bring the model from no edit to ``count``, replaying what is stored and storing what is new."""
        journal = self.lm.journal
        journal.reset()
        for before, after in pairwise(step for step in self.states if step <= count):
            if (stored := self.store.get(self.states[after])) is not None:
                journal.replay(Edit.from_bytes(stored))
                continue
            turn = self.requests[before:after]
            try:
                edit = self.editor.apply(turn)
            except EditFailed as error:
                ids = [request.id for request in turn]
                log.warning("edit %d (%s) failed: %s", before + 1, " to ".join(dict.fromkeys((ids[0], ids[-1]))), error)
                edit = Edit(self.editor.name, ids if len(ids) > 1 else ids[0], info={"failed": str(error)})
                journal.replay(edit)
            self.store.put(self.states[after], edit.to_bytes())


# What workers do -----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _loaded(model: str, dtype: str, statistics: tuple) -> tuple[models.LM, SecondMoments, Examiner]:
    """The model that a worker is at, loaded once."""
    device = ("cpu", "cuda", "auto")[min(torch.cuda.device_count(), 2)]  # of several GPUs each holds a part
    lm = models.load(model, device=device, dtype=getattr(torch, dtype))
    return lm, SecondMoments(lm, **dict(statistics)), Examiner(lm)


def survey(params: Params, model: str) -> tuple[dict[str, Any], dict[Line, dict[int, str]], list[int]]:
    """Load a model and look at every trajectory of it, before jobs are handed out.

    Returns:
        what a manifest says of the model; the states of each trajectory; positions of the methods that must
        ``prepare`` before they edit, which the others need not wait for.
    """
    lines = [Line(position, order) for position in range(len(params.methods)) for order in params.orders]
    trajectories = {line: Trajectory(params, model, line) for line in lines}
    lm = trajectories[lines[0]].lm
    about = {
        "fingerprint": lm.fingerprint,
        "parameters": sum(weight.numel() for weight in lm.model.parameters()),
        "begin_token": lm.tokenizer.convert_ids_to_tokens(lm.begin),
    }
    states = {line: trajectory.states for line, trajectory in trajectories.items()}
    editors = {line.position: trajectory.editor for line, trajectory in trajectories.items()}
    return about, states, [position for position, each in editors.items() if each.trained or each.moments_of]


def prepare(params: Params, model: str, positions: Sequence[int]) -> None:
    """What methods need before their first edit: second moments for all in one pass, and training."""
    trajectories = [Trajectory(params, model, Line(position, params.orders[0])) for position in positions]
    layers = {layer for trajectory in trajectories for layer in trajectory.editor.moments_of}
    trajectories[0].moments.prepare(sorted(layers))
    for trajectory in trajectories:
        trajectory.editor.prepare()


def advance(params: Params, model: str, line: Line, count: int, keys: Mapping[str, tuple[str, str]]) -> bool:
    """Bring a model to one checkpoint, and compute what the store lacks of the cells there.

    A worker claims what it is at: cells each, edits by their trajectory's first.

    Args:
        keys: for each benchmark the key of the cell and that of the unedited model's.

    Returns:
        whether all is in the store now; False where a worker of another run is at some of it.
    """
    trajectory = Trajectory(params, model, line)
    store, states = trajectory.store, [state for step, state in trajectory.states.items() if 0 < step <= count]
    with ExitStack() as claims:
        lacking = {name: of for name, of in keys.items() if store.get(of[0]) is None}
        mine = {name: of for name, of in lacking.items() if claims.enter_context(claim(store.path(of[0])))}
        edited = None not in [store.get(state) for state in states]
        if (lacking and not mine) or not (edited or claims.enter_context(claim(store.path(states[0])))):
            time.sleep(PAUSE)
            return False
        if mine or not edited:
            trajectory.advance(count)
        with trajectory.editor.shown():
            for name, of in mine.items():
                if store.get(of[0]) is None:  # it was looked for before it was claimed
                    _ask(params, trajectory, count, name, *of)
    return len(mine) == len(lacking)


def _ask(params: Params, trajectory: Trajectory, count: int, benchmark: str, key: str, unedited: str) -> None:
    """Compute a cell of the model as it is.

    What the unedited model generated, whose cell's key is ``unedited``, are the guesses that make generating cheaper,
    whichever worker does it.
    """
    store, moments, examiner = trajectory.store, trajectory.moments, trajectory.examiner
    # the unedited model is asked about all edits to come, a checkpoint about those made
    requests = trajectory.requests[: count or None]
    first = store.get_json(unedited) if key != unedited else None
    examiner.guesses = {tuple(prompt): tokens for prompt, tokens in (first or {}).get("drafts", ())}
    start = time.perf_counter()
    items = examiner.ask(benchmark, requests=requests, limit=params.limit, text=moments.text, tokens=moments.tokens)
    cell = {"seconds": round(time.perf_counter() - start, 3), "items": items}
    if key == unedited:
        cell["drafts"] = list(examiner.guesses.items())
    store.put_json(key, cell)
