"""Lets Axolotl shard a model over processes of a CPU: accelerate and Axolotl choose FSDP and DeepSpeed on accelerators only."""

import os
from typing import Any
from unittest.mock import patch

import torch
from accelerate import DistributedType, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from axolotl.integrations.base import BasePlugin

build_device_mesh, begin, part = ParallelismConfig.build_device_mesh, AcceleratorState.__init__, PartialState.__init__


def begin_as_on_gpus(self: Any, *arguments: Any, **more: Any) -> None:
    if PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    begin(self, *arguments, **more)


class FsdpOnCpu(BasePlugin):
    def register(self, cfg: Any) -> None:
        AcceleratorState.__init__ = begin_as_on_gpus
        ParallelismConfig.build_device_mesh = lambda self, device: build_device_mesh(self, "cpu")


def begin_with_deepspeed(self: Any, *arguments: Any, **more: Any) -> None:
    with patch.dict(os.environ, ACCELERATE_USE_CPU="false"):
        begin(self, *arguments, **more | {"cpu": False})


class DeepSpeedOnCpu(BasePlugin):
    def register(self, cfg: Any) -> None:
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
        PartialState.__init__ = lambda self, cpu=False, **more: part(self, **more | {"backend": "gloo"})
        AcceleratorState.__init__ = begin_with_deepspeed
        from deepspeed.comm.torch import TorchBackend  # here: it looks for an accelerator

        # gloo, unlike NCCL, gathers into views of the weights, which autograd refuses.
        TorchBackend.all_gather_into_tensor = torch.no_grad()(TorchBackend.all_gather_into_tensor)
