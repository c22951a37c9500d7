"""A training watched while it runs: from the log that the plugin writes."""

from pathlib import Path

import numpy as np
import pytest
from tiny_curriculum import log_step

from eval import logs, plots
from train.stages import LOG


def losses(run: logs.Run) -> list[float]:
    run.refresh()
    return [point["loss"] for point in run.log if point["loss"] is not None]


def test_a_run_is_read_while_it_grows(tmp_path: Path) -> None:
    run = logs.Run(tmp_path / "outputs/2a")
    assert losses(run) == []
    log_step(run.folder, 1, loss=4.0, tokens=2048)
    assert losses(run) == [4.0]
    log_step(run.folder, 2)
    log_step(run.folder, 2, loss=3.5, tokens=4096)
    log_step(run.folder, 2, eval_loss=3.75)
    log_step(run.folder, 3, eval_loss=3.5)  # without a token count: it gets the one before
    assert losses(run) == [4.0, 3.5]
    assert logs.curve(run.log) == [(2048, 4.0, None), (4096, 3.5, 3.75), (4096, None, 3.5)]

    whole = (run.folder / LOG).read_bytes()  # a line that is being written waits
    other = logs.Run(tmp_path / "other")
    other.folder.mkdir()
    for start in range(0, len(whole), 40):
        with (other.folder / LOG).open("ab") as file:
            file.write(whole[start : start + 40])
        assert losses(other) in ([], [4.0], [4.0, 3.5])
    assert other.log == run.log
    with (other.folder / LOG).open("ab") as file:
        file.write(b'{"time": 1.0, "step')  # a full disk cut it; the resumed run appends
    log_step(other.folder, 4, loss=3.0)
    log_step(other.folder, 5, loss=2.5)
    assert losses(other) == [4.0, 3.5, 2.5]


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    run = logs.Run(tmp_path / "2a")
    seen: list[float] = []
    for checkpoint, end, loss in ((0, 7, 4.0), (4, 6, 3.0), (5, 9, 2.0)):
        log_step(run.folder, checkpoint)
        for step in range(checkpoint + 1, end + 1):
            log_step(run.folder, step, loss=loss)
        seen = seen[:checkpoint] + [loss] * (end - checkpoint)
        assert losses(run) == seen
    (run.folder / LOG).write_text("")  # another training begins
    log_step(run.folder, 1, loss=5.0)
    assert losses(run) == [5.0]
    (run.folder / LOG).unlink()
    assert losses(run) == []


@pytest.mark.parametrize(
    ("times", "planned", "left"),
    [
        ({1: 10.0}, 100, None),
        ({1: 10.0, 2: 20.0}, 1, 0),
        ({10: 100.0, 20: 200.0}, 100, 800),  # logged at every tenth step
        ({step: 10.0 * step + 300 * (step > 15) for step in range(1, 31)}, 100, 700),  # a validation between two steps
    ],
)
def test_time_left(tmp_path: Path, times: dict[int, float], planned: int, left: float | None) -> None:
    run = logs.Run(tmp_path)
    run.points = {step: {"step": step, "loss": 1.0, "time": at} for step, at in times.items()}
    assert logs.seconds_left(run, planned) == (None if left is None else pytest.approx(left))


def test_table_and_plot_of_several_runs(tmp_path: Path) -> None:
    for name, gib in (("2a", 0.0), ("2<b>", 7.5)):
        for step in (1, 2, 3):
            speed = {"tokens": 2048 * step, "tokens_per_second": 150.0, "learning_rate": 1e-4}
            log_step(tmp_path / name, step, at=1000.0 + 10 * step, loss=4.0 - step, memory=gib, **speed)
        log_step(tmp_path / name, 3, at=1030.0, eval_loss=3.25)
    (tmp_path / "2c").mkdir()  # not begun
    runs = logs.find(tmp_path, {})
    assert [run.folder.name for run in runs] == ["2<b>", "2a"]
    assert logs.find(tmp_path, {run.folder: run for run in runs}) == runs and len(runs[0].points) == 3
    (tmp_path / "2a/trained.json").write_text("{}")
    page = "".join(logs.table([*runs, logs.Run(tmp_path / "2c")], now) for now in (1090.0, 1931.0))
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
    assert drawn["2a, training"][0] == [2048, 4096, 6144] and drawn["2a, validation"][0] == [6144]
    assert drawn["2a, training"][1] == drawn["2a, validation"][1] != drawn["2<b>, training"][1]
    assert len(lower.lines) == 2 and lower.get_xlabel() == "tokens"
