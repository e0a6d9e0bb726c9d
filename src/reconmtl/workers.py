"""Jobs side by side, in processes of this machine or on a Ray cluster; what fails need not stop the others."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

import torch

from reconmtl import progress
from reconmtl.errors import ConfigError, ReconError, RunError
from reconmtl.jobs import Job, do
from reconmtl.ranks import started

GRACE = 60.0
"""Seconds that an interrupted training may take to write its checkpoint."""

STOPPED = 128 + signal.SIGTERM
"""Exit code of a process whose training was asked to stop and has saved its state."""


class Workers(Protocol):
    """Where jobs run: so many at once."""

    slots: int

    def submit(self, slot: int, job: Job) -> Future[None]:
        """Start a job on a free slot."""


def run_jobs(
    jobs: Sequence[Job],
    workers: Workers,
    *,
    done: Callable[[Job], None],
    failed: Callable[[Job, Exception], None],
) -> None:
    """Do every job; those that need a probe's log wait until it is there.

    Args:
        jobs: What is to be done, the most urgent first.
        workers: Where.
        done: Called after each job that succeeded, before anything that waits for it starts.
        failed: Called after each that did not, also where a job's probe failed; what it raises ends everything.
    """
    waiting = list(jobs)
    probing = {job.out for job in jobs if job.method == "probe"}
    broken: set[str] = set()
    free = list(range(workers.slots))
    running: dict[Future[None], tuple[int, Job]] = {}
    while waiting or running:
        for job in [j for j in waiting if j.log in broken]:
            waiting.remove(job)
            failed(job, RunError("the probe that it takes its layers from failed"))
        ready = [j for j in waiting if j.log not in probing]
        for job in ready[: len(free)]:
            waiting.remove(job)
            slot = free.pop(0)
            running[workers.submit(slot, job)] = (slot, job)
        if not running:
            continue
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            slot, job = running.pop(future)
            free.append(slot)
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            if job.method == "probe":
                probing.discard(job.out)
            if error is None:
                try:
                    done(job)
                except ReconError as mistake:  # a log that allows no plan
                    error = mistake
            if error is not None:
                if job.method == "probe":
                    broken.add(job.out)
                failed(job, error)


def first_failure(job: Job, error: Exception) -> None:
    """End everything with the first failure."""
    if isinstance(error, BrokenProcessPool):
        raise RunError(
            f"A training process was killed ({job}), most likely for want of memory. Continue with --resume and fewer "
            "--jobs; what is finished is kept."
        ) from None
    raise error


def sentence(error: Exception) -> str:
    """What went wrong, in one line; of what was not foreseen also where, in the user's own files if they took part."""
    if isinstance(error, BrokenProcessPool):
        return "the process was killed, most likely for want of memory"
    if isinstance(error, ReconError):
        return " ".join(str(error).split())
    # What comes from another process carries its traceback as text, as the cause.
    places = re.findall(r'^ *File "(.+)", line (\d+)', story(error.__cause__ or error), re.MULTILINE)
    installed = ("<", *(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__)))
    own = [place for place in places if not place[0].startswith(installed)]
    # The command itself is the user's file too, when it was started by its path: it comes first and tells nothing.
    own = [place for place in own if Path(place[0]).name not in ("reconmtl", "reconmtl.exe")]
    path, line = (own or places or [("", "")])[-1]
    where = f" ({path}:{line})" if path else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def story(error: BaseException) -> str:
    """The whole traceback, also of another process."""
    return "".join(traceback.format_exception(error))


def count(jobs: int | None, accelerator: str, total: int) -> int:
    """How many jobs of a total run side by side: as many as asked for, else one per core or GPU."""
    if started() > 1:  # all of them do each job together
        return 1
    if jobs is not None:
        return max(1, min(jobs, total))
    gpus = torch.cuda.device_count() if accelerator in ("auto", "cuda", "gpu") else 0
    return max(1, min(gpus or os.cpu_count() or 1, total))


class Here:
    """Does each job at once, in this process."""

    slots = 1

    def submit(self, slot: int, job: Job) -> Future[None]:  # noqa: ARG002 there is one
        """Do it."""
        future: Future[None] = Future()
        try:
            do(job)
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)
        return future


class Processes:
    """A process per slot, kept from job to job; one that is killed is replaced.

    Args:
        slots: Number of processes.
        mode: When progress is shown.
    """

    def __init__(self, slots: int, mode: progress.Mode) -> None:
        self.slots = slots
        self.mode = mode
        self._context = multiprocessing.get_context("spawn")  # forked torch processes can hang in their thread pools
        self._lock = self._context.RLock()
        self._pools: dict[int, ProcessPoolExecutor] = {}

    def submit(self, slot: int, job: Job) -> Future[None]:
        """Hand a job to the slot's process."""
        pool = self._pools.get(slot)
        try:
            return self._open(slot).submit(_perform, job) if pool is None else pool.submit(_perform, job)
        except BrokenProcessPool:
            return self._open(slot).submit(_perform, job)

    def _open(self, slot: int) -> ProcessPoolExecutor:
        threads = max(1, (os.cpu_count() or 1) // self.slots)
        self._pools[slot] = ProcessPoolExecutor(
            1, mp_context=self._context, initializer=_start, initargs=(self.mode, self._lock, slot, threads)
        )
        return self._pools[slot]

    def close(self, *, kill: bool) -> None:
        """End the processes; those that are at work are told to, and given time to write what they have."""
        workers = [w for pool in self._pools.values() for w in (pool._processes or {}).values()]
        if kill:
            for worker in workers:
                worker.terminate()
        for pool in self._pools.values():
            pool.shutdown(wait=not kill, cancel_futures=kill)
        for worker in workers:
            # The pool's own thread joins too, and after `join` who comes second is told that the process lives.
            if not connection.wait([worker.sentinel], GRACE):
                worker.kill()
            worker.join(GRACE)


def _perform(job: Job) -> None:
    try:
        do(job)
    except KeyboardInterrupt:
        os._exit(STOPPED)  # the state is saved; nobody waits for an answer


def _start(mode: progress.Mode, lock: Any, slot: int, threads: int) -> None:  # noqa: ANN401 of multiprocessing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # while it trains, a training saves its state before it leaves
    os.dup2(2, 1)  # stdout is for the result, which the parent prints
    threading.Thread(target=_follow, daemon=True).start()
    if torch.cuda.device_count() > 1:  # asks the driver only; a context is made later, on the one GPU that is left
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(
            ","
        )
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
    torch.set_num_threads(threads)
    progress.configure(mode, lock=lock, position=slot)


def _follow() -> None:
    """End this process when its parent is gone, killed without a chance to say so."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


class Ray:
    """Tasks of a Ray cluster; its nodes have to see the same files.

    Args:
        address: Of the cluster; None takes $RAY_ADDRESS, else starts one on this machine.
        jobs: At most so many at once; None: as many as the cluster has GPUs, else CPUs.

    Raises:
        ConfigError: If Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, address: str | None = None, *, jobs: int | None = None) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise ConfigError('The engine "ray" needs Ray: pip install "reconmtl[ray]"') from None
        self._ray: Any = ray  # whether it is installed, and so typed, must not matter to the type checker
        try:
            self._ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"No Ray cluster at {address!r}: {error}") from None
        has = self._ray.cluster_resources()
        gpus = int(has.get("GPU", 0))
        self.slots = max(1, min(jobs or 2**31, gpus or int(has.get("CPU", 1))))
        # A training that was killed is reported; doing it again would most likely end alike.
        self._do = self._ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=0)(_there)

    def submit(self, slot: int, job: Job) -> Future[None]:  # noqa: ARG002 the cluster finds a place
        """Hand a job to the cluster."""
        inner = self._do.remote(job, str(Path.cwd())).future()
        outer: Future[None] = Future()

        def arrived(of: Future[None]) -> None:
            error = of.exception()
            if error is None:
                outer.set_result(None)
            else:  # Ray wraps what a task raised
                outer.set_exception(getattr(error, "cause", None) or error)

        inner.add_done_callback(arrived)
        return outer

    def close(self, *, kill: bool) -> None:  # noqa: ARG002 both end what runs
        """Leave the cluster; its tasks of ours end."""
        self._ray.shutdown()


def _there(job: Job, folder: str) -> None:
    """Do a job in a process of Ray's, whose folder is not ours."""
    os.chdir(folder)
    torch.set_num_threads(1)
    progress.configure("never")
    do(job)


@contextmanager
def here_or_processes(jobs: int, mode: progress.Mode, *, apart: bool = False) -> Iterator[Workers]:
    """Workers of this machine: one job at a time in this process, several in processes of their own.

    Args:
        jobs: How many at once.
        mode: When progress is shown.
        apart: A process also for a single one, so that whatever kills it leaves this one alive.
    """
    if jobs == 1 and not apart:
        progress.configure(mode)
        yield Here()
        return
    with closing(Processes(jobs, mode)) as workers:
        yield workers


@contextmanager
def closing(workers: Any) -> Iterator[Any]:  # noqa: ANN401 whatever has close(kill=)
    """Close workers: at once if something failed, else after what they do."""
    try:
        yield workers
    except BaseException:
        with suppress(KeyboardInterrupt):  # impatience must not leave processes behind
            workers.close(kill=True)
        raise
    workers.close(kill=False)
