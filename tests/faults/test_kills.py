"""A run that is killed, at any moment and in any way, goes on to what it would have come to, and leaves nothing behind."""

import os
import random
import shutil
import signal
import time
from pprint import pformat

import pytest
import tiny
from record import FULL, record

pytestmark = pytest.mark.slow

CASES = 36 if FULL else 2
OTHERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
"""Every sixth signal in the full number, every second in the short form, the others are SIGKILL."""
PHASES = {
    "model conversion": (lambda runs: (runs / "rq1" / "tiny.yaml").exists(), 1.5),
    "second moments": (lambda runs: (runs / "cache/models" / tiny.MODEL).exists(), 0.6),
    "edits": (lambda runs: len(tiny.units(runs)) >= 3, 0.8),
    "cells": (lambda runs: len(tiny.units(runs)) >= 9, 1.5),
    "publishing": (lambda runs: len(tiny.units(runs)) >= 18, 0.3),
}
"""When each phase begins, and about how many seconds it takes."""


def wrong_after(world, whole, runs, started, code, printed):
    """What is not as it should be after a run was stopped; it is run to its end here."""
    wrong = [f"still alive: {name}" for name in started.orphans()]
    if "Traceback" in printed:
        wrong.append(f"a traceback: {printed[-1500:]}")
    finished = tiny.units(runs)
    code, printed = world.fork(runs).wait()
    if code:
        return [*wrong, f"cannot be resumed: {printed[-1500:]}"]
    again = tiny.units(runs)
    wrong += [f"done again: {path.name}" for path, when in finished.items() if again.get(path) != when]
    if tiny.results(runs)["cells.jsonl.gz"] != tiny.results(whole)["cells.jsonl.gz"]:
        wrong.append("other results")
    return wrong + [f"left behind: {name}" for name in tiny.leftovers(runs)]


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_at_a_random_moment_of_a_phase(phase, world, whole, tmp_path):
    began, seconds = PHASES[phase]
    wrong, case, dice = {}, 0, random.Random()
    while case < CASES:
        runs = tmp_path / "runs"
        started = world.fork(runs, workers=1 + case % 2)
        while started.running() and not began(runs):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, seconds))
        if not started.running():  # too late
            seconds *= 0.9
        else:
            turn, rest = divmod(case, 6 if FULL else 2)
            number = signal.SIGKILL if rest else OTHERS[turn % 3]
            (os.killpg if case % 3 == 2 else os.kill)(started.pid, number)
            found = wrong_after(world, whole, runs, started, *started.wait(60))
            record(f"{number.name} during {phase}", found)
            if found:
                wrong[case, number.name] = found
            case += 1
        shutil.rmtree(runs)
    assert not wrong, pformat(wrong)


def test_a_worker_killed_from_outside_is_one_sentence(world, whole, tmp_path):
    wrong = {}
    for case in range(6 if FULL else 1):
        runs = tmp_path / f"{case}"
        started = world.fork(runs, workers=2)
        while started.running() and len(tiny.units(runs)) < 1 + case % 12:
            time.sleep(0.005)
        workers = [process for process in started.processes() if process.pid != started.pid]
        workers[case % len(workers)].kill()
        code, printed = started.wait(60)
        found = [] if tiny.sentence(code, printed) else [f"no sentence but {code}: {printed[-1500:]}"]
        found += wrong_after(world, whole, runs, started, code, printed)
        record("SIGKILL of a worker", found)
        if found:
            wrong[case] = found
    assert not wrong, pformat(wrong)
