"""The chain of stages, read from the recipes: who builds on whom is said there and nowhere else.

A stage is one YAML. It builds on another when its `base_model` or its `lora_model_dir` is the other's `output_dir`.
A second curriculum is more YAML in the same folder, or in another; nothing here names a stage.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prep.common import BadInput


@dataclass(frozen=True)
class Stage:
    """One recipe. Paths are relative to the directory the training runs in, as in the YAML."""

    name: str  # the recipe's stem: 2b
    recipe: Path
    config: dict[str, Any]
    parent: str | None  # the stage whose output this one loads last: 2a for 2b, 2b for 2c, none for 2a

    @property
    def base_model(self) -> Path:
        """Folder of the full model that is trained, or that the adapter stands on."""
        return Path(self.config["base_model"])

    @property
    def output_dir(self) -> Path:
        """Folder of the finished weights, or of the finished adapter."""
        return Path(self.config["output_dir"])

    @property
    def adapter(self) -> str | None:
        """`qlora`, `lora`, or None when every weight is trained."""
        return self.config.get("adapter")

    @property
    def adapter_from(self) -> Path | None:
        """Folder of the adapter that this stage goes on training, if it does not start a new one."""
        return Path(self.config["lora_model_dir"]) if self.config.get("lora_model_dir") else None

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
        """The file that the gate writes when, and only when, this stage trained as planned."""
        return self.output_dir / "trained.json"


def load_recipe(path: Path) -> dict[str, Any]:
    """Parse one recipe. Raises BadInput when it is no YAML mapping or lacks what every stage must say."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise BadInput(f"{path} holds no recipe (a YAML mapping is expected)")
    missing = [key for key in ("base_model", "output_dir", "datasets") if not config.get(key)]
    if missing:
        raise BadInput(f"{path} has no {', '.join(missing)}")
    return config


def load_chain(recipes: Path) -> list[Stage]:
    """Every recipe of the folder (`*.yml`), each after the one it builds on, otherwise by name.

    Raises BadInput on an empty folder, two recipes with one output, or recipes that build on each other in a circle.
    """
    configs = {path: load_recipe(path) for path in sorted(recipes.glob("*.yml"))}
    if not configs:
        raise BadInput(f"no recipe (*.yml) in {recipes.absolute()}")
    made_by: dict[Path, str] = {}
    for path, config in configs.items():
        output = Path(config["output_dir"])
        if output in made_by:
            raise BadInput(f"{path}: output_dir {output} is already that of recipe {made_by[output]}")
        made_by[output] = path.stem

    waiting = {}
    for path, config in configs.items():
        # An adapter that is continued stands on its base too; the adapter is the later of the two.
        source = config.get("lora_model_dir") or config["base_model"]
        waiting[path.stem] = Stage(path.stem, path, config, made_by.get(Path(source)))
    ordered: dict[str, Stage] = {}
    while waiting:
        ready = [stage for stage in waiting.values() if stage.parent is None or stage.parent in ordered]
        if not ready:
            raise BadInput(f"recipes {', '.join(waiting)} in {recipes} build on each other in a circle")
        stage = ready[0]
        ordered[stage.name] = waiting.pop(stage.name)
    return list(ordered.values())


def line_of(name: str, chain: list[Stage]) -> list[Stage]:
    """The stages from the chain's start to `name`, oldest first."""
    stages = {stage.name: stage for stage in chain}
    if name not in stages:
        raise BadInput(f"no recipe {name}.yml; there are: {', '.join(stages)}")
    line = [stages[name]]
    while line[0].parent:
        line.insert(0, stages[line[0].parent])
    return line
