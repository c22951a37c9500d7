"""Runs the stages of prep/gallica.py by datatrove's executors: on this machine, on a Slurm cluster, or on Ray.

All take the same list of steps, keep a log and a completion mark of every task in one folder, and skip what is marked
when the same command is run again. Tasks are files, so no more workers are at work than there are files.
"""

import contextlib
import fcntl
import io
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import dill
import loguru
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor

from prep.common import SEAL, BadInput, is_whole, lock, progress

loguru.logger.remove()  # what a task says goes to its log file
COUNTER = ".books"  # a file to which readers add a byte a book
WORKERS = ".workers.lock"  # every worker holds it for life


def run_local(stages: list[PipelineExecutor], folder: Path) -> None:
    """Run stages one after the other, under one bar of all their tasks; `COUNTER` in `folder` counts books."""
    (folder / COUNTER).write_bytes(b"")
    waiting = [(stage, stage.get_incomplete_ranks()) for stage in stages]
    total, left = sum(stage.world_size for stage in stages), sum(len(ranks) for _, ranks in waiting)
    with progress(total=total, initial=total - left, unit="task") as bar:
        for stage, ranks in waiting:
            bar.set_description(Path(stage.logging_dir.path).name, refresh=False)
            for tasks in _done(stage, ranks, folder / WORKERS):
                if books := (folder / COUNTER).stat().st_size:
                    bar.set_postfix_str(f"{books:,} books", refresh=False)
                bar.update(tasks)


def _done(stage: Any, ranks: list[int], workers_lock: Path) -> Iterator[int]:
    """Run the tasks of a stage; every second, how many more are done.

    datatrove's own pool would wait for ever for a worker that was killed; here it ends the run.
    """
    pickled = dill.dumps(stage)
    workers = min(stage.workers, len(ranks))
    if workers < 2:
        for rank in ranks:
            _run_task(pickled, rank)
            yield 1
        return
    # Forked from a server that has imported everything once, and has no threads as this process has.
    multiprocessing.set_forkserver_preload(["prep.gallica"])
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("forkserver"), _begin_worker, (workers_lock,)
    ) as pool:
        waiting = {pool.submit(_run_task, pickled, rank) for rank in ranks}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for task in done:
                    task.result()
                yield len(done)
        except BrokenProcessPool as error:
            raise BadInput(
                f"a worker of stage {Path(stage.logging_dir.path).name} was killed (out of memory? use fewer --workers);"
                f" run again to resume (log: {stage.logging_dir.path}/logs)"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _run_task(pickled: bytes, rank: int) -> None:
    stage = dill.loads(pickled)  # noqa: S301 (what the parent has just pickled)
    with contextlib.redirect_stderr(io.StringIO()):  # the log file has it too
        stage._run_for_rank(rank, 1)


def _begin_worker(workers_lock: Path) -> None:
    """Hold the workers' lock, and end with the command, however it ends; the parent is the server forked from."""
    fcntl.flock(os.open(workers_lock, os.O_RDWR | os.O_CREAT), fcntl.LOCK_SH)

    def watch() -> None:
        if command := multiprocessing.parent_process():
            command.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def take(folder: Path) -> None:
    """Keep a corpus for this process, once the workers of a killed one are gone. A damaged corpus is removed, to be made again."""
    lock(folder)
    folder.mkdir(exist_ok=True)
    with open(folder / WORKERS, "w") as workers:
        fcntl.flock(workers, fcntl.LOCK_EX)
    if (folder / SEAL).exists() and not is_whole(folder):
        print(f"{folder} is damaged: the corpus is made again", flush=True)
        forget(folder)


def forget(folder: Path) -> None:
    """Remove a corpus, but for its workers' lock."""
    (folder / SEAL).unlink(missing_ok=True)
    for path in filter(Path.is_dir, folder.iterdir()):
        shutil.rmtree(path)


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
        slurm: dict[str, Any] = {"time": self.time, "partition": self.partition, "job_name": name, "qos": None}
        environment = f'export PATH="{path}:$PATH" PYTHONPATH="{modules}"'
        return SlurmPipelineExecutor(steps, **common, **slurm, with_srun=False, env_command=environment)

    def run(self, stages: list[PipelineExecutor], folder: Path) -> None:
        """Run stages in order. Slurm's are submitted: each job waits for the one before, and this returns at once."""
        if self.kind == "local":
            run_local(stages, folder)
        else:
            stages[-1].run()
