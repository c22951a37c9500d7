"""What the training bench needs of Axolotl beyond its keys: bf16 on a CPU, and one order of rows for every seed."""

from pathlib import Path
from typing import Any

import torch
from axolotl.common.datasets import TrainDatasetMeta, load_datasets
from transformers import TrainerCallback

from train.adapter_start import StartAdapter
from train.plugins import SeedAdapter
from train.preference import MidText

ORDER = 42


class Plugin(SeedAdapter):
    """Listed under `plugins` in bench/train.yml, in place of the recipes' own: Liger's is for CUDA."""

    def get_training_args(self, cfg: Any) -> dict[str, bool]:
        """What Axolotl hands on to the trainer besides its own: it has no key for `use_cpu`, without which no bf16."""
        return {"use_cpu": True}

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> TrainDatasetMeta:
        """Axolotl's own, with rows shuffled by `ORDER`.

        Axolotl shuffles by the run's seed as it tokenises, and keeps that order for every later run, so that a result
        would depend on whose seed came first. The trainer shuffles again, by the run's seed.
        """
        seed, cfg.seed = cfg.seed, ORDER
        try:
            return load_datasets(cfg=cfg)
        finally:
            cfg.seed = seed


class Start(Plugin, StartAdapter):
    """The recipe's own start of a new adapter."""


class Diagonal(Start):
    """Weighs the quantisation error by the mean square of each input."""

    def root(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.diag(inputs.square().mean(0).sqrt() + 1e-6)


class Unweighted(Start):
    """The best approximation of the quantisation error itself, as LoftQ's (Li et al. 2023)."""

    def root(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.eye(inputs.shape[1])


class Preference(MidText):
    """Takes away the base that Axolotl saves beside the adapter after DPO."""

    def post_train_unload(self, cfg: Any) -> None:
        (Path(cfg.output_dir) / "model.safetensors").unlink(missing_ok=True)


class Averaged(Plugin):
    """Ends with the mean of the weights after each step of the second half."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        return [Mean()]


class Mean(TrainerCallback):
    """Means the weights in fp32; 4 bytes per weight. The last checkpoint has them too: the gate compares it."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        steps = state.global_step - state.max_steps // 2
        if steps == 1:
            self.mean = [weight.detach().float().clone() for weight in model.parameters()]
        if steps >= 1:
            for mean, weight in zip(self.mean, model.parameters(), strict=True):
                mean += (weight.detach().float() - mean) / steps
                if state.global_step == state.max_steps:
                    weight.data.copy_(mean)
