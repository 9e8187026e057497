"""Worker processes: whole units of work side by side, one thread each.

Editing a small model multiplies small matrices, where a second thread buys next to nothing, and one
more process buys a whole core. And with one thread a process, results do not depend on the number of
cores: the same bits on two cores and on sixty-four. The processes may be this machine's (``pool``) or
those of a Dask cluster (``cluster``); what is to be done and where it is kept are the same.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from joblib import cpu_count

from kedit import KeditError
from kedit.store import cache_folder, disk, runs_folder

log = logging.getLogger(__name__)


def cores() -> int:
    """Cores that this process may use, by its affinity and its container's quota."""
    return cpu_count()


def threads() -> int:
    """Threads of a worker: one, or every core where a GPU does the work and the CPU only solves."""
    import torch

    return cores() if torch.cuda.is_available() else 1


def free_memory() -> int:
    """Bytes of memory that could be used now."""
    return psutil.virtual_memory().available


def quiet_libraries() -> None:
    """Of what other libraries log, only what went wrong; and no warnings that the user can do nothing about."""
    for noisy in ("httpx", "datasets", "lm_eval", "distributed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def log_to_stderr() -> None:
    """Show what kedit logs, and keep other libraries quiet."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    quiet_libraries()


def _become_worker() -> None:
    import torch
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as of_transformers

    quiet = are_progress_bars_disabled()
    of_transformers.disable_progress_bar()  # it would draw into the run's
    if not quiet:  # those of downloads stay
        enable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads())
    log_to_stderr()


def _begin(parent: int, stop: Any) -> None:
    """First thing in a worker of ``pool``."""
    _become_worker()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides

    def watch() -> None:
        # a worker never outlives the run, however that ended; what it was at is made again by the next run
        while os.getppid() == parent and not stop.is_set():
            time.sleep(0.1)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def pool(workers: int | None = None) -> Iterator[tuple[Executor, int]]:
    """An executor of worker processes, and how many; all gone when the block is left, whatever they were at.

    Args:
        workers: by default one for each core, or one on a machine with a GPU.

    Raises:
        KeditError: a worker was killed from outside, most often for want of memory.
    """
    workers = workers or cores() // threads()
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    executor = ProcessPoolExecutor(workers, context, _begin, (os.getpid(), stop))
    try:
        yield executor, workers
    except BaseException as error:
        stop.set()  # do not wait for what workers are at
        if isinstance(error, BrokenProcessPool):
            raise KeditError(
                "a worker process was killed, most often because memory ran out; run the same command again with "
                f"WORKERS={max(1, workers - 1)}, it goes on where it was."
            ) from error
        raise
    finally:
        executor.shutdown(cancel_futures=True)


_one_at_a_time = threading.Lock()


def _call(runs: Path, cache: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Do a job in a worker of a cluster, which holds one model even if it was started with several threads."""
    with _one_at_a_time:
        # it was started by others, with an environment of theirs
        os.environ["KEDIT_RUNS"], os.environ["KEDIT_CACHE"] = str(runs), str(cache)
        _become_worker()
        return function(*args)


class _Cluster(Executor):
    """Dask's executor, with the run's folders known to whichever worker takes a job."""

    def __init__(self, inner: Executor):
        self._inner = inner

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future:
        return self._inner.submit(_call, runs_folder(), cache_folder(), function, *args)


async def _identity(address: str) -> dict[str, Any]:
    """What the scheduler at an address says of itself."""
    from distributed import Security
    from distributed.core import rpc

    async with rpc(address, connection_args=Security().get_connection_args("client")) as scheduler:
        return await scheduler.identity()


@contextmanager
def cluster(address: str, timeout: float = 10.0) -> Iterator[tuple[Executor, int]]:
    """An executor of the workers of a Dask cluster, and how many there are by now; more may come and go.

    Every worker must see the folder of runs under the same path. If workers offer a resource GPU, each job takes
    one; a job whose worker is lost is done again by another. Several jobs are never done at once in one process.

    Args:
        address: the scheduler's, such as ``tcp://host:8786``.
        timeout: seconds to wait for the scheduler; workers are waited for as long as it takes.

    Raises:
        KeditError: dask is not installed, no scheduler answers, a worker does not see the folder of the
            results, or the scheduler or one job's workers again and again were lost.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise KeditError("DASK needs dask: pip install 'kedit[dask]', or make, which installs it.") from error
    try:
        asyncio.run(asyncio.wait_for(_identity(address), timeout))  # a Client would wait minutes for another port
        client = Client(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise KeditError(
            f"no Dask scheduler answers at {address!r} ({type(error).__name__}); start one with dask scheduler, and "
            "give the address it prints, such as DASK=tcp://host:8786."
        ) from error
    probe = runs_folder() / f".seen-by-workers-{os.getpid()}"
    try:
        log.info("waiting for the workers of the cluster")
        client.wait_for_workers(1)
        with disk(probe):
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
        if blind := [name for name, seen in client.run(probe.exists).items() if not seen]:
            raise KeditError(
                f"the Dask worker {blind[0]} does not see {runs_folder()}; set KEDIT_RUNS to a folder that every "
                "machine has under the same path."
            )
        workers = client.scheduler_info(n_workers=-1)["workers"]
        gpus = {"resources": {"GPU": 1}} if any("GPU" in worker["resources"] for worker in workers.values()) else {}
        yield _Cluster(client.get_executor(pure=False, **gpus)), len(workers)
    except KilledWorker as error:
        raise KeditError(
            "several Dask workers died of the same job, most often because memory ran out; give each more memory and "
            "run the same command again, it goes on where it was."
        ) from error
    except CancelledError as error:
        raise KeditError("the Dask scheduler was lost; run the same command again, it goes on where it was.") from error
    finally:
        probe.unlink(missing_ok=True)
        client.close()


@dataclass(eq=False)
class Job:
    """A function call for a worker, made once the jobs ``after`` which it comes are done.

    If it returns False, somebody else is at it: it is called again when the other jobs have had their turn.
    """

    function: Callable[..., Any]
    args: tuple
    after: Sequence["Job"] = ()
    done: bool = False


def execute(jobs: Sequence[Job], executor: Executor, at_once: int, tick: Callable[[], None]) -> None:
    """Run jobs in their order as far as ``after`` allows, so many at once; ``tick`` is called now and then.

    Raises:
        Exception: what the first job to fail raised.
    """
    waiting, running = list(jobs), {}
    while waiting or running:
        ready = [job for job in waiting if all(before.done for before in job.after)]
        for job in ready[: at_once - len(running)]:
            running[executor.submit(job.function, *job.args)] = job
            waiting.remove(job)
        for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            job.done = future.result() is not False
            if not job.done:
                waiting.append(job)
        tick()
