"""Runs the stages of prep/gallica.py by datatrove's executors: on this machine, on a Slurm cluster, or on Ray.

All take the same list of steps, keep a log and a completion mark of every task in one folder, and skip what is marked
when the same command is run again. Tasks are files, so no more workers are at work than there are files.
"""

import contextlib
import fcntl
import io
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import dill
import loguru
from datatrove.data import DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from tqdm import tqdm

from prep.common import BadInput, progress

loguru.logger.remove()  # what a task says goes to its log file


class CountBooks(PipelineStep):
    """Lets every book through, and counts it for the progress bar: one byte per book in one file."""

    name, type = "counted", "COUNT"

    def __init__(self, folder: Path):
        super().__init__()
        self.path = str(folder / ".books")

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with open(self.path, "ab", buffering=0) as counter:
            for document in data or ():
                counter.write(b".")
                yield document


def run_local(stages: list[PipelineExecutor], folder: Path) -> None:
    """Run stages one after the other, under one bar of all their tasks.

    datatrove's own pool would wait for ever for a worker that was killed; here it ends the run.
    """
    counter = folder / ".books"
    counter.write_bytes(b"")
    waiting = [(stage, stage.get_incomplete_ranks()) for stage in stages]
    total, left = sum(stage.world_size for stage in stages), sum(len(ranks) for _, ranks in waiting)
    with progress(total=total, initial=total - left, unit="task") as bar:
        for stage, ranks in waiting:
            title = Path(stage.logging_dir.path).name
            bar.set_description(title, refresh=False)

            def told(tasks: int, bar: tqdm = bar) -> None:
                if books := counter.stat().st_size:
                    bar.set_postfix_str(f"{books:,} books", refresh=False)
                bar.update(tasks)

            if not ranks:
                continue
            stage.save_executor_as_json()
            try:
                _run_stage(stage, ranks, told)
            except BrokenProcessPool as error:
                raise BadInput(
                    f"a worker of stage {title} was killed (out of memory? use fewer --workers); run again to resume"
                    f" (log: {stage.logging_dir.path}/logs)"
                ) from error


def _run_stage(stage: Any, ranks: list[int], told: Any) -> None:
    workers = min(stage.workers, len(ranks))
    if workers == 1:
        steps = stage.pipeline
        for rank in ranks:
            stage.pipeline = deepcopy(steps)  # with statistics of its own
            _quietly(stage, rank)
            told(1)
        return
    # Forked from a server that has imported everything once, and has no threads as this process has.
    multiprocessing.set_forkserver_preload(["prep.gallica"])
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, _begin_worker, (stage.logging_dir.path,)) as pool:
        pickled = dill.dumps(stage)
        waiting = {pool.submit(_run_task, pickled, rank) for rank in ranks}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for task in done:
                    task.result()
                told(len(done))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _quietly(stage: Any, rank: int) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # the log file has it too
        stage._run_for_rank(rank, 1)


def _run_task(pickled: bytes, rank: int) -> None:
    _quietly(dill.loads(pickled), rank)  # noqa: S301 (what the parent has just pickled)


def _begin_worker(logs: str) -> None:
    """Hold the workers' lock for life, and die with the command, however it dies."""
    lock = os.open(_workers_lock(Path(logs).parent.parent), os.O_RDWR | os.O_CREAT)  # never closed: held for life
    fcntl.flock(lock, fcntl.LOCK_SH)

    def watch() -> None:
        if command := multiprocessing.parent_process():
            command.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _workers_lock(folder: Path) -> Path:
    return folder / ".workers.lock"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one command at a time work in a folder, and none before the workers of a killed one are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock, open(_workers_lock(folder), "w") as workers:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"another command is at work in {folder}: wait for it, then run this one again") from None
        fcntl.flock(workers, fcntl.LOCK_EX)
        fcntl.flock(workers, fcntl.LOCK_UN)
        yield


class Cluster(NamedTuple):
    """Where the stages of one command run."""

    kind: str = "local"  # local, slurm or ray
    workers: int = 1  # tasks at once
    partition: str = ""  # Slurm's
    time: str = "12:00:00"  # Slurm's limit for one task

    def stage(
        self, name: str, steps: list[Any], tasks: int, folder: Path, after: PipelineExecutor | None, per_job: int = 1
    ) -> PipelineExecutor:
        """A stage of `tasks` tasks that begins once stage `after` is complete; nothing runs yet.

        A cluster starts a job for every `per_job` tasks.
        """
        common: dict[str, Any] = {"tasks": tasks, "logging_dir": str(folder / "logs" / name), "workers": self.workers}
        if self.kind == "local":
            return LocalPipelineExecutor(steps, **common)
        common |= {"depends": after, "tasks_per_job": per_job, "mem_per_cpu_gb": 2}
        if self.kind == "ray":
            return RayPipelineExecutor(steps, **common)
        path, modules = Path(sys.executable).parent, os.pathsep.join(filter(None, sys.path))
        return SlurmPipelineExecutor(
            steps,
            **common,
            time=self.time,
            partition=self.partition,
            job_name=name,
            qos=None,
            with_srun=False,
            env_command=f'export PATH="{path}:$PATH" PYTHONPATH="{modules}"',
        )

    def run(self, stages: list[PipelineExecutor], folder: Path) -> None:
        """Run stages in order. Slurm's are submitted: each job waits for the one before, and this returns at once."""
        if self.kind == "local":
            run_local(stages, folder)
        else:
            stages[-1].run()
