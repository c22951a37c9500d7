"""A training watched while it runs: from the TensorBoard files that the trainer writes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from eval import logs, plots


def losses(run: logs.Run) -> list[float]:
    run.refresh()
    return [point["loss"] for point in run.log if point["loss"] is not None]


def test_a_run_is_read_while_it_grows(tmp_path: Path, log_step: Callable[..., None]) -> None:
    run = logs.Run(tmp_path / "outputs/2a")
    run.refresh()
    assert run.points == {}
    with SummaryWriter(str(run.folder / "runs/x")) as writer:
        log_step(writer, 1, 4.0)
        assert losses(run) == [4.0]
        log_step(writer, 2, 3.5)
        writer.add_scalar("eval/loss", 3.75, 2)
        writer.add_scalar("eval/loss", 3.5, 3)  # without a token count: it gets the one before
        writer.add_text("args", "{}")
        writer.flush()
        run.refresh()
    assert logs.unit(run.log) == "tokens"
    assert logs.curve(run.log, "tokens") == [(2048, 4.0, None), (4096, 3.5, 3.75), (4096, None, 3.5)]


def test_a_record_that_is_being_written_waits(tmp_path: Path, log_step: Callable[..., None]) -> None:
    with SummaryWriter(str(tmp_path / "whole/runs/x")) as writer:
        log_step(writer, 1, 4.0)
        log_step(writer, 2, 3.5)
    source = next(tmp_path.glob("whole/runs/x/events*"))
    content = source.read_bytes()
    target = tmp_path / "2a/runs/x" / source.name
    target.parent.mkdir(parents=True)
    run = logs.Run(tmp_path / "2a")
    seen = []
    for start in range(0, len(content), 40):
        with target.open("ab") as file:
            file.write(content[start : start + 40])
        seen.append(len(losses(run)))
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 2


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path, log_step: Callable[..., None]) -> None:
    run = logs.Run(tmp_path / "2a")
    for part, steps, loss in (("a", range(1, 8), 4.0), ("b", range(5, 7), 3.0), ("c", range(6, 10), 2.0)):
        with SummaryWriter(str(run.folder / f"runs/{part}")) as writer:
            for step in steps:
                log_step(writer, step, loss)
            writer.add_scalar("eval/loss", loss, steps[0])
        (file,) = run.folder.glob(f"runs/{part}/*")
        file.rename(file.with_name(f"events.out.tfevents.{part}"))
        run.refresh()
    assert losses(run) == [4.0] * 4 + [3.0] + [2.0] * 4
    assert [point["eval_loss"] for point in run.log if point["eval_loss"]] == [4.0, 3.0, 2.0]
    shutil.rmtree(run.folder / "runs/c")
    assert losses(run) == [4.0] * 4 + [3.0] * 2
    shutil.rmtree(run.folder / "runs")
    assert losses(run) == []


def test_planned_steps(tmp_path: Path) -> None:
    """From --max_steps; else from the epochs."""
    assert logs.planned_steps(tmp_path, 5, None, 1) is None
    assert logs.planned_steps(tmp_path, 5, 0.5, 2) == 20
    (tmp_path / "started.json").write_text(json.dumps({"settings": {"bf16": False, "max_steps": 7}}))
    assert logs.planned_steps(tmp_path, 5, 0.5, 2) == 7


@pytest.mark.parametrize(
    ("times", "planned", "left"),
    [
        ({1: 10.0}, 100, None),
        ({10: 100.0, 20: 200.0}, 100, 800),  # logged at every tenth step
        ({1: 10.0, 2: 20.0}, 1, 0),
        ({step: 10.0 * step + 300 * (step > 15) for step in range(1, 31)}, 100, 700),  # a validation between two steps
    ],
)
def test_time_left(tmp_path: Path, times: dict[int, float], planned: int, left: float | None) -> None:
    run = logs.Run(tmp_path)
    empty: dict[str, float | None] = dict.fromkeys(logs.SCALARS.values())
    run.points = {step: {**empty, "step": step, "loss": 1.0, "time": at} for step, at in times.items()}
    assert logs.seconds_left(run, planned) == (None if left is None else pytest.approx(left))


def test_table_and_plot_of_several_runs(tmp_path: Path, log_step: Callable[..., None]) -> None:
    for name, gib in (("2a", 0.0), ("2<b>", 7.5)):
        with SummaryWriter(str(tmp_path / f"{name}/runs/x")) as writer:
            for step in (1, 2, 3):
                log_step(writer, step, 4.0 - step, at=1000.0 + 10 * step, memory=gib)
            writer.add_scalar("eval/loss", 3.25, 2, walltime=1020.0)
    (tmp_path / "2c").mkdir()  # prepared, not begun
    runs = logs.find(tmp_path, {})
    assert [run.folder.name for run in runs] == ["2<b>", "2a"]
    assert logs.find(tmp_path, {run.folder: run for run in runs}) == runs and len(runs[0].points) == 3
    (tmp_path / "2a/trained.json").write_text("{}")
    page = "".join(logs.table([*runs, logs.Run(tmp_path / "2c")], {}, now) for now in (1090.0, 1931.0))
    for words in ("running, last update 60 s ago", "stopped: no update for 15 min, no verdict", "trained, gate passed",
                  "3 of 40 (8%)", "1.000", "3.250", "1.00e-04", "6,144", "150", "7.5", "6 min", "2&lt;b&gt;"):  # fmt: skip
        assert words in page, words
    assert "<b>" not in page and page.count("<tr>") == 6
    assert [logs.duration(seconds) for seconds in (5, 90, 3725)] == ["5 s", "2 min", "1 h 02 min"]

    figure = plots.draw_runs({run.folder.name: run.log for run in runs})
    assert figure and plots.draw_runs({}) is None
    upper, lower = figure.axes
    drawn = {line.get_label(): (np.asarray(line.get_xdata()).tolist(), line.get_color()) for line in upper.lines}
    assert list(drawn) == ["2<b>, training", "2<b>, validation", "2a, training", "2a, validation"]
    assert drawn["2a, training"][0] == [2048, 4096, 6144] and drawn["2a, validation"][0] == [4096]
    assert drawn["2a, training"][1] == drawn["2a, validation"][1] != drawn["2<b>, training"][1]
    assert len(lower.lines) == 2 and lower.get_xlabel() == "tokens"
    runs[0].points[1]["tokens"] = None  # one whose trainer did not count
    mixed = plots.draw_runs({run.folder.name: run.log for run in runs})
    assert mixed and mixed.axes[1].get_xlabel() == "step" and len(mixed.axes[0].lines) == 4
