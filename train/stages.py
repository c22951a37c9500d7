"""The stages and their order, read from the recipes.

A stage is one YAML. It builds on another when its `base_model` or `lora_model_dir` is that one's `output_dir`. A second
curriculum is more YAML, here or in another folder; no code names a stage.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.common import BadInput, read_yaml

LOG = "log.jsonl"  # in an output folder: a line a step (train/plugins.py)


@dataclass(frozen=True)
class Stage:
    """One recipe. Paths are relative to the directory the training runs in, as in the YAML."""

    name: str  # the recipe's stem: 2b
    recipe: Path
    config: dict[str, Any]
    parent: str | None  # the stage it continues: 2a for 2b, 2b for 2c, none for 2a

    @property
    def base_model(self) -> Path:
        """Folder of the model that is trained, or that the adapter is for."""
        return Path(self.config["base_model"])

    @property
    def output_dir(self) -> Path:
        """Folder of the trained weights or adapter."""
        return Path(self.config["output_dir"])

    @property
    def adapter(self) -> str | None:
        """`qlora`, `lora`, or None when every weight is trained."""
        return self.config.get("adapter")

    @property
    def adapter_from(self) -> Path | None:
        """Folder of the adapter that this stage continues, if it does not start a new one."""
        return Path(self.config["lora_model_dir"]) if self.config.get("lora_model_dir") else None

    @property
    def start(self) -> Path:
        """Folder of the adapter as the training began: the continued one, or the new one before its first step."""
        return self.adapter_from or self.output_dir / "start"

    @property
    def datasets(self) -> list[Path]:
        """The JSONL files it trains on."""
        return [Path(dataset["path"]) for dataset in self.config["datasets"]]

    @property
    def heldout(self) -> list[Path]:
        """The JSONL files its validation loss is measured on."""
        return [Path(dataset["path"]) for dataset in self.config.get("test_datasets") or []]

    @property
    def verdict(self) -> Path:
        """The file that says that this stage trained as planned (train/gate.py)."""
        return self.output_dir / "trained.json"


def load_recipe(path: Path) -> dict[str, Any]:
    """A recipe's settings. Raises BadInput when it is not YAML, not UTF-8, or lacks what every stage must say."""
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise BadInput(f"{path} is not a recipe: a YAML mapping is expected")
    missing = [key for key in ("base_model", "output_dir", "datasets") if not config.get(key)]
    if missing:
        raise BadInput(f"{path} has no {', '.join(missing)}")
    for key in ("base_model", "lora_model_dir", "output_dir"):
        if not isinstance(config.get(key) or "", str):
            raise BadInput(f"{path}: {key} must be the path of a folder")
    for key in ("datasets", "test_datasets"):
        entries = config.get(key) or []
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("path"), str) for entry in entries
        ):
            raise BadInput(f"{path}: {key} must be a list of mappings, each with a path")
    return config


def load_chain(recipes: Path, curriculum: str = "") -> list[Stage]:
    """Every recipe of the folder, each after the one it builds on, otherwise by name: those named `curriculum`*.yml.

    Raises BadInput if there are none, two recipes with one output, or recipes that build on each other in a circle.
    """
    files = sorted(path for path in recipes.glob("*.yml") if path.name.startswith(curriculum))
    configs = {path: load_recipe(path) for path in files}
    if not configs:
        raise BadInput(f"no recipe ({curriculum}*.yml) in {recipes.absolute()}")
    made_by: dict[Path, str] = {}
    for path, config in configs.items():
        output = Path(config["output_dir"])
        if output in made_by:
            raise BadInput(f"{path}: output_dir {output} is already that of recipe {made_by[output]}")
        made_by[output] = path.stem
    waiting = [
        Stage(path.stem, path, config, made_by.get(Path(config.get("lora_model_dir") or config["base_model"])))
        for path, config in configs.items()
    ]
    chain: list[Stage] = []
    while waiting:
        done = {None, *(stage.name for stage in chain)}
        ready = next((stage for stage in waiting if stage.parent in done), None)
        if ready is None:
            names = ", ".join(stage.name for stage in waiting)
            raise BadInput(f"recipes {names} in {recipes} build on each other in a circle")
        waiting.remove(ready)
        chain.append(ready)
    return chain


def line_of(name: str, chain: list[Stage]) -> list[Stage]:
    """The stages from the chain's start to `name`, oldest first."""
    stages = {stage.name: stage for stage in chain}
    if name not in stages:
        raise BadInput(f"no recipe {name}.yml; there are: {', '.join(stages)}")
    line = [stages[name]]
    while line[0].parent:
        line.insert(0, stages[line[0].parent])
    return line


def share_step(cfg: Any, processes: int) -> None:
    """Divide the rows of a step among the processes: its tokens stay what the recipe says, whatever the number of cards."""
    most, steps = cfg.get("micro_batch_size") or 1, cfg.get("gradient_accumulation_steps") or 1
    rows, rest = divmod(most * steps, processes)
    if rest:
        raise BadInput(
            f"a step of {most} x {steps} rows cannot be shared by {processes} processes: take a number that divides "
            f"{most * steps} (accelerate launch --num_processes), or change gradient_accumulation_steps"
        )
    cfg["micro_batch_size"] = max(size for size in range(1, most + 1) if rows % size == 0)
    cfg["gradient_accumulation_steps"] = rows // cfg["micro_batch_size"]
