"""Several runs on one store, and a run on a cluster that loses parts: the same results, or one sentence."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from pprint import pformat

import pytest
import tiny
from record import FULL, record

import kedit
from kedit.__main__ import main
from kedit.workers import cluster

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("runs_at_once", [2, 4])
def test_runs_that_share_a_store_from_the_first_load_on(runs_at_once, world, whole, tmp_path):
    wrong = {}
    for case in range(4 if FULL else 1):
        runs = tmp_path / f"{case}"
        started = []
        for number in range(runs_at_once):
            started.append(world.fork(runs, workers=1 + number % 2))
            time.sleep(0.3 * (case % 3))
        ended = [one.wait() for one in started]
        found = [printed[-2000:] for code, printed in ended if code or "Traceback" in printed]
        found += [name for one in started for name in one.orphans()] + tiny.leftovers(runs)
        if not found and tiny.results(runs) != tiny.results(whole):
            found.append("other results")
        record(f"{runs_at_once} runs at once on one store", found)
        if found:
            wrong[case] = found
    assert not wrong, pformat(wrong)


def dask(world: tiny.World, runs: Path, *words: str) -> subprocess.Popen:
    """A part of a cluster that listens on this machine only, and knows the tiny model."""
    on = ["--no-dashboard", "--dashboard-address", "127.0.0.1:0", "--interface", "lo"]
    return subprocess.Popen(
        [sys.executable, "-m", "dask", *words, *on],
        cwd=world.folder,
        env={**os.environ, **world.environment(runs, "")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def spread(address: str) -> int:
    return main(["run", "rq1/tiny.yaml", "--dask", address])


def test_a_scheduler_that_dies_is_one_sentence_and_a_run_goes_on_without_it(world, whole, tmp_path):
    wrong = {}
    for case in range(6 if FULL else 1):
        runs = tmp_path / f"{case}"
        runs.mkdir()
        scheduler = dask(world, runs, "scheduler", "--port", "0")
        address = next(line.split()[-1] for line in scheduler.stdout if "Scheduler at:" in line)
        worker = dask(world, runs, "worker", address, "--nworkers", "1", "--nthreads", "1")
        started = world.fork(runs, partial(spread, address))
        while started.running() and len(tiny.units(runs)) < 1 + 3 * case:
            time.sleep(0.01)
        scheduler.send_signal(signal.SIGKILL)
        code, printed = started.wait(120)
        worker.kill()
        found = [] if tiny.sentence(code, printed) else [f"no sentence but {code}: {printed[-2000:]}"]
        code, printed = world.fork(runs).wait()
        if code or tiny.results(runs) != tiny.results(whole):
            found.append(f"not the same afterwards: {printed[-2000:]}")
        record("Dask scheduler killed", found)
        if found:
            wrong[case] = found
        for process in (scheduler, worker):
            process.wait()
    assert not wrong, pformat(wrong)


def test_the_port_of_something_else_is_one_sentence():
    """Such as of the dashboard, which a scheduler prints beside its own."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    addresses = [f"tcp://127.0.0.1:{server.server_port}", f"http://127.0.0.1:{server.server_port}", "tcp://127.0.0.1:1"]
    for address in addresses:
        begun = time.monotonic()
        with pytest.raises(kedit.KeditError, match="no Dask scheduler answers at"), cluster(address, timeout=3):
            pass
        assert time.monotonic() - begun < 20
        record("Dask: wrong address")
    server.shutdown()
