"""The Axolotl plugin that times a run of bench/gpu.py and reads the allocator; it ends the training before weights are saved.

bench/gpu.py adds it to a recipe's `plugins` and sets the keys of ProbeArgs.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import torch
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import TrainerCallback

from train.memory import CUDA_CONTEXT, GIB
from train.plugins import keep_16_bits

GPU = torch.cuda.is_available()


class ProbeArgs(BaseModel):
    """Keys that the plugin adds to Axolotl's."""

    probe_record: str  # file for the record
    probe_warmup: int  # steps that do not count: kernels are compiled, memory is claimed
    probe_seconds: float  # how long steps are timed after that
    probe_free_gib: float | None = None  # of the card, for all that this process takes


class Probe(BasePlugin):
    def get_input_args(self) -> str:
        return "bench.gpu_plugin.ProbeArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """Limit the allocator to what `probe_free_gib` would leave it beside CUDA's own share."""
        if GPU and cfg.probe_free_gib:
            wanted, (free, total) = cfg.probe_free_gib * GIB - CUDA_CONTEXT, torch.cuda.mem_get_info()
            if free < wanted:
                raise RuntimeError(f"{cfg.probe_free_gib:g} GiB of the card must be free: {free / GIB:.2f} GiB are")
            torch.cuda.set_per_process_memory_fraction(wanted / total)

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        keep_16_bits(cfg, model)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        stopwatch = Stopwatch(ProbeArgs(**{key: cfg[key] for key in ProbeArgs.model_fields}))
        trainer.compute_loss = stopwatch.counting(trainer.compute_loss)
        return [stopwatch]

    def post_train(self, cfg: Any, model: Any) -> None:
        raise SystemExit(0)


class Stopwatch(TrainerCallback):
    """Times every step, counts its tokens, and writes the record when the training ends."""

    def __init__(self, settings: ProbeArgs) -> None:
        self.settings = settings
        self.tokens = 0
        self.losses: list[torch.Tensor] = []  # of the first micro-step and of the last
        self.seconds: list[float] = []
        self.step_tokens: list[int] = []
        self.memory: dict[str, int] = {}
        self.peak = 0  # Axolotl resets torch's own each time it logs

    def counting(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        """The trainer's method, counting tokens; torch_compile would compile a hook of the model with it."""

        def counted(model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.tokens += inputs["input_ids"].numel()
            loss = compute_loss(model, inputs, *args, **kwargs)
            self.losses = [*self.losses[:1], loss.detach()]
            return loss

        return counted

    def now(self) -> float:
        """Seconds, once the GPU has finished its work."""
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if GPU:
            self.memory = {
                "peak_while_loading": torch.cuda.max_memory_allocated(),
                "loaded": torch.cuda.memory_allocated(),
            }
            torch.cuda.reset_peak_memory_stats()
        self.last = self.now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if GPU:  # weights, gradients and optimiser states; no activations
            self.memory["at_optimizer_step"] = torch.cuda.memory_allocated()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = self.now()
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() if GPU else 0)
        self.seconds.append(now - self.last)
        self.step_tokens.append(self.tokens)
        self.last, self.tokens = now, 0
        timed = self.seconds[self.settings.probe_warmup :]
        control.should_training_stop = bool(timed) and sum(timed) >= self.settings.probe_seconds

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if GPU:
            self.memory |= {
                "peak_allocated": self.peak,
                "peak_reserved": torch.cuda.max_memory_reserved(),
                "retries": torch.cuda.memory_stats()["num_alloc_retries"],  # the cache was emptied: the card was full
                "driver": driver_memory(),
            }
        record = {
            "step_seconds": self.seconds,
            "step_tokens": self.step_tokens,
            "warmup": self.settings.probe_warmup,
            "losses": [loss.item() for loss in self.losses],
            "memory": self.memory,
        }
        Path(self.settings.probe_record).write_text(json.dumps(record))


def driver_memory() -> int:
    """Bytes of the card that the driver counts as this process's: the allocator's cache and CUDA's own."""
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda._get_nvml_device_index(None))
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return sum(process.usedGpuMemory or 0 for process in processes if process.pid == os.getpid())
