"""The part of the bench that runs inside the training: an Axolotl plugin that times the steps and reads the allocator.

A recipe lists it under `plugins:` beside its own; bench/gpu.py writes that list and the keys of ProbeArgs. The training
ends when enough steps were timed, before Axolotl saves weights that nobody wants.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

GPU = torch.cuda.is_available()


class ProbeArgs(BaseModel):
    """Keys that the plugin adds to Axolotl's."""

    probe_record: str  # file the record goes to
    probe_warmup: int  # steps that do not count: kernels are compiled, memory is claimed
    probe_seconds: float  # how long steps are timed after that
    probe_profile: int = 0  # steps to profile instead of timing


def allocated() -> int | None:
    """Bytes the allocator holds now; None without a GPU."""
    return torch.cuda.memory_allocated() if GPU else None


class Probe(BasePlugin):
    def get_input_args(self) -> str:
        return "bench.gpu_plugin.ProbeArgs"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        settings = ProbeArgs(**{key: cfg[key] for key in ProbeArgs.model_fields if cfg[key] is not None})
        stopwatch = Stopwatch(settings)
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
        self.record: dict[str, Any] = {"step_seconds": [], "step_tokens": [], "memory": {}}
        self.profiler: torch.profiler.profile | None = None

    def counting(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        """The trainer's method, counting tokens; a hook of the model would be compiled with it by torch_compile."""

        def counted(model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.tokens += inputs["input_ids"].numel()
            loss = compute_loss(model, inputs, *args, **kwargs)
            self.losses = [*self.losses[:1], loss.detach()]
            return loss

        return counted

    def now(self) -> float:
        """Seconds, once the GPU has finished what it was given."""
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if GPU:
            self.record["memory"]["peak_while_loading"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.record["memory"]["loaded"] = allocated()
        self.last = self.now()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Weights, gradients and optimiser states; no activations.
        self.record["memory"]["at_optimizer_step"] = allocated()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = self.now()
        self.record["step_seconds"].append(now - self.last)
        self.record["step_tokens"].append(self.tokens)
        self.last, self.tokens = now, 0
        beyond = len(self.record["step_seconds"]) - self.settings.probe_warmup
        if self.settings.probe_profile:
            self.profile(beyond, control)
        elif sum(self.record["step_seconds"][self.settings.probe_warmup :]) >= self.settings.probe_seconds:
            control.should_training_stop = True

    def profile(self, beyond: int, control: TrainerControl) -> None:
        """Profile `probe_profile` steps once the warm-up is over."""
        if beyond == 0:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if GPU else []
            self.profiler = torch.profiler.profile(activities=kinds)
            self.profiler.start()
        elif beyond == self.settings.probe_profile:
            self.finish_profile()
            control.should_training_stop = True

    def finish_profile(self) -> None:
        """What took the time: every kernel of the GPU (without one, every operation of the CPU), longest first."""
        if not self.profiler:
            return
        self.profiler.stop()
        rows = []
        for event in self.profiler.key_averages():
            # An operation's self_device_time is that of the kernels it started; they stand in the list themselves.
            on_gpu = event.device_type != torch.autograd.DeviceType.CPU
            if on_gpu == GPU:
                time_us = event.self_device_time_total if GPU else event.self_cpu_time_total
                rows.append({"name": event.key, "calls": event.count, "microseconds": time_us})
        self.record["profile"] = sorted(rows, key=lambda row: -row["microseconds"])
        self.profiler = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.finish_profile()
        if GPU:
            stats = torch.cuda.memory_stats()
            self.record["memory"] |= {
                "peak_allocated": torch.cuda.max_memory_allocated(),
                "peak_reserved": torch.cuda.max_memory_reserved(),
                "retries": stats["num_alloc_retries"],  # the allocator emptied its cache because the card was full
            }
        self.record["losses"] = [loss.item() for loss in self.losses]
        self.record["warmup"] = self.settings.probe_warmup
        Path(self.settings.probe_record).write_text(json.dumps(self.record))
