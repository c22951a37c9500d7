"""Loss curves: what the trainer logged, read from the state it leaves beside its weights and in its checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

from prep.common import BadInput

# Our names, and the trainer's.
LOGGED = {
    "epoch": ("epoch",),
    "tokens": ("tokens/total", "tokens/trainable"),
    "loss": ("loss",),
    "eval_loss": ("eval_loss",),
}


def training_log(output_dir: Path) -> list[dict[str, Any]] | None:
    """The trainer's log of a stage, a point a logged step, in its order; None when no state is left.

    A point has `step`, `epoch`, `tokens` (seen so far, where the trainer counted them), `loss` (training, nats a token,
    mean since the last point) and `eval_loss` (validation); what was not logged at that step is None.
    Raises BadInput on a damaged file.
    """
    states = []
    for path in [output_dir / "trainer_state.json", *sorted(output_dir.glob("checkpoint-*/trainer_state.json"))]:
        if path.is_file():
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
                states.append((state["global_step"], state["log_history"]))
            except (ValueError, KeyError, TypeError) as error:
                raise BadInput(f"{path} is damaged ({error!r}); remove it, or train the stage again") from error
    if not states:
        return None
    _, history = max(states, key=lambda state: state[0])
    points: dict[int, dict[str, Any]] = {}
    for entry in history:
        point = points.setdefault(
            entry["step"], {"step": entry["step"], "epoch": None, "tokens": None, "loss": None, "eval_loss": None}
        )
        for key, names in LOGGED.items():
            values = [entry[name] for name in names if entry.get(name) is not None]
            if values and math.isfinite(values[0]):
                point[key] = values[0]
    return [point for _, point in sorted(points.items()) if point["loss"] is not None or point["eval_loss"] is not None]
