"""Lets Axolotl shard a model over processes of a CPU: accelerate and Axolotl choose FSDP on accelerators only."""

from typing import Any

from accelerate import DistributedType, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from axolotl.integrations.base import BasePlugin

build_device_mesh, begin = ParallelismConfig.build_device_mesh, AcceleratorState.__init__


def begin_as_on_gpus(self: Any, *arguments: Any, **more: Any) -> None:
    if PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    begin(self, *arguments, **more)


class FsdpOnCpu(BasePlugin):
    def register(self, cfg: Any) -> None:
        AcceleratorState.__init__ = begin_as_on_gpus
        ParallelismConfig.build_device_mesh = lambda self, device: build_device_mesh(self, "cpu")
