"""Who runs the steps of a pipeline: datatrove's executors, on this machine, on a Slurm cluster, or on Ray.

All three take the same list of steps, keep a log and a completion mark of every task in one folder, and skip what is
marked when the same command is run again. Tasks are files, so there are never more workers at work than files.
"""

import contextlib
import fcntl
import io
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import dill
import loguru
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.utils.stats import PipelineStats
from tqdm import tqdm

from prep.common import BadInput

loguru.logger.remove()  # what a task says goes to its log file; a run shows one bar for each stage


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor, but that a killed worker ends the run: its own pool would wait for it for ever."""

    def run(self) -> None:
        if self.depends and not self.depends._launched:
            self.depends.run()
        self._launched = True
        ranks = self.get_incomplete_ranks()
        if not ranks:
            return
        self.save_executor_as_json()
        title = Path(self.logging_dir.path).name
        with tqdm(total=self.tasks, initial=self.tasks - len(ranks), desc=title, unit="task") as bar:
            if min(self.workers, len(ranks)) == 1:
                pipeline: list[Any] = self.pipeline  # type: ignore[has-type]
                for rank in ranks:
                    self.pipeline = deepcopy(pipeline)  # with statistics of its own
                    self._run_for_rank(rank, local_rank=1)
                    bar.update()
                return
            # Forked from a server that has imported everything once, and has no threads as this process has.
            multiprocessing.set_forkserver_preload(["prep.drawing"])
            with ProcessPoolExecutor(
                min(self.workers, len(ranks)),
                multiprocessing.get_context("forkserver"),
                initializer=_begin_worker,
                initargs=(self.logging_dir.path,),
            ) as pool:
                pickled = dill.dumps(self)
                tasks = [pool.submit(_run_task, pickled, rank) for rank in ranks]
                try:
                    for task in as_completed(tasks):
                        task.result()
                        bar.update()
                except BrokenProcessPool as error:
                    raise BadInput(
                        f"a worker of stage {title} was killed, by somebody or for want of memory (then: fewer --workers);"
                        " what is finished is kept, the same command goes on"
                    ) from error
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        with contextlib.redirect_stderr(io.StringIO()):  # the log file has it too
            return super()._run_for_rank(rank, local_rank, node_rank)


def _run_task(pickled: bytes, rank: int) -> None:
    dill.loads(pickled)._run_for_rank(rank, local_rank=1)  # noqa: S301 (what the parent has just pickled)


def _begin_worker(logs: str) -> None:
    """Hold the workers' lock for life, and die with the command, however it dies."""
    lock = os.open(_workers_lock(Path(logs).parent.parent), os.O_RDWR | os.O_CREAT)  # never closed: held for life
    fcntl.flock(lock, fcntl.LOCK_SH)

    def watch() -> None:
        if command := multiprocessing.parent_process():
            command.join()
        os._exit(1)

    threading.Thread(target=watch, args=(), daemon=True).start()


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
    """How the stages of one command are run."""

    kind: str = "local"  # local, slurm or ray
    workers: int = 1  # tasks at once
    partition: str = ""  # Slurm's
    time: str = "12:00:00"  # Slurm's limit for one task

    def stage(
        self,
        name: str,
        pipeline: list[Any],
        tasks: int,
        folder: Path,
        after: PipelineExecutor | None,
        tasks_per_job: int = 1,
    ) -> PipelineExecutor:
        """A stage of `tasks` tasks that begins once stage `after` is complete; nothing runs yet.

        A cluster starts a job for every `tasks_per_job` of them.
        """
        common: dict[str, Any] = {"tasks": tasks, "logging_dir": str(folder / "logs" / name), "depends": after}
        if self.kind == "slurm":
            return SlurmPipelineExecutor(
                pipeline,
                **common,
                workers=self.workers,
                tasks_per_job=tasks_per_job,
                time=self.time,
                partition=self.partition,
                job_name=name,
                mem_per_cpu_gb=2,
                qos=None,
                with_srun=False,
                env_command=f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH="{os.pathsep.join(filter(None, sys.path))}"',
            )
        if self.kind == "ray":
            return RayPipelineExecutor(
                pipeline, **common, workers=self.workers, tasks_per_job=tasks_per_job, mem_per_cpu_gb=2
            )
        return LocalExecutor(pipeline, **common, workers=self.workers)
