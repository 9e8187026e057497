"""The whole way to the figure, as a user goes it: the same bytes each time, nothing of the machine in them, no port open;
and the notebook's step, killed."""

import random
import shutil
import signal
import time
from pprint import pformat

import psutil
import pytest
import tiny
from record import FULL, record
from test_security import leaks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FULL, reason="the whole way to the figure takes minutes a case: make faults"),
]


def listening(started: tiny.Started) -> set[str]:
    """Addresses on which some process of a command waits for others."""
    found = set()
    for process in started.processes():
        try:
            connections = process.net_connections(kind="inet")
        except psutil.Error:
            continue
        found |= {str(one.laddr) for one in connections if one.status == psutil.CONN_LISTEN}
    return found


@pytest.fixture(scope="module")
def figure(world, tmp_path_factory):
    """The folder of ``kedit reproduce``, and the addresses on which it listened meanwhile."""
    runs, seen = tmp_path_factory.mktemp("figure"), set()
    started = world.start(runs)
    while started.running():
        seen |= listening(started)
        time.sleep(1)
    code, printed = started.wait()
    assert code == 0, printed
    assert not started.orphans()
    assert set(tiny.results(runs)) == set(tiny.RESULTS), printed
    return runs, seen


def test_the_same_run_gives_the_same_bytes(figure, world, whole, tmp_path):
    """By one worker or two, new or forked processes, as one command or run first and drawn then."""
    runs, _ = figure
    assert tiny.results(whole)["cells.jsonl.gz"] == tiny.results(runs)["cells.jsonl.gz"]
    code, printed = world.fork(tmp_path, workers=2).wait()
    assert code == 0, printed
    assert tiny.results(tmp_path) == tiny.results(whole)
    code, printed = world.start(tmp_path).wait()
    assert code == 0, printed
    assert "nothing was left to compute" in printed
    found = [name for name, data in tiny.results(runs).items() if tiny.results(tmp_path).get(name) != data]
    record("the same run by another way", found)
    assert not found


def test_a_run_opens_no_port(figure):
    record("ports that a run opens", sorted(figure[1]))
    assert figure[1] == set()


def test_nothing_of_the_machine_is_in_what_a_run_writes(figure, world, capsys):
    """Nor in the store and the caches, which are copied between machines."""
    runs, _ = figure
    paths = [path for path in runs.rglob("*") if path.is_file() and "home" not in path.relative_to(runs).parts]
    assert {"manifest.json", "cells.jsonl.gz", "rq1_number_of_edits.ipynb", "tiny.yaml"} <= {
        path.name for path in paths
    }
    here = (str(runs).encode(), str(world.folder).encode())
    found = leaks(paths) + [path.name for path in paths if any(text in path.read_bytes() for text in here)]
    found += tiny.leftovers(runs)
    record("paths, names and tokens in what a run writes", found)
    assert not found


def test_a_notebook_that_is_killed_is_executed_again(figure, world, tmp_path):
    good, wrong, dice = tiny.results(figure[0]), {}, random.Random()
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    for case in range(15 if FULL else 1):
        runs = tmp_path / "runs"
        shutil.copytree(figure[0], runs)
        for name in tiny.RESULTS[1:]:
            (runs / "rq1" / "tiny" / name).unlink()
        started = world.start(runs)
        while started.running() and "Executing notebook" not in started.output.read_text():
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 8))
        ended = not started.running()
        number = signals[case % len(signals)]
        kernels = [process for process in started.processes() if "ipykernel" in " ".join(process.cmdline())]
        if case % 5 == 4 and kernels:
            kernels[0].kill()
        else:
            for process in [process for process in started.processes() if process.pid == started.pid]:
                process.send_signal(number)
        code, printed = started.wait()
        found = [f"a traceback: {printed[-2000:]}"] if "Traceback" in printed else []
        found += [f"still alive: {name}" for name in started.orphans()]
        made = tiny.results(runs)
        found += [f"another {name}" for name in made if made[name] != good[name]]
        code, printed = world.start(runs).wait()
        if code or tiny.results(runs) != good:
            found.append(f"not the same afterwards: {printed[-2000:]}")
        found += [f"left behind: {name}" for name in tiny.leftovers(runs)]
        if not ended or found:
            record(f"{'kernel killed' if case % 5 == 4 else number.name} during the notebook", found)
        if found:
            wrong[case, number.name] = found
        shutil.rmtree(runs)
    assert not wrong, pformat(wrong)
