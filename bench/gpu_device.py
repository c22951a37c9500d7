"""The card: what it is, what it can do, what is used of it, and a process that holds a part of it.

The bench itself must hold no memory of the card, so whatever does is a process of its own:

  python bench/gpu_device.py peak           bf16 matrix products: the speed that can be reached, as JSON
  python bench/gpu_device.py hold 11        leave 11 GiB free, by plain allocations, until stdin is closed
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from prep.common import BadInput, cpu_name, run

GIB = 2**30
NO_GPU = "no NVIDIA GPU was found ({}); `--tiny` tries the bench itself on a CPU, with a tiny model"


@functools.cache
def nvml_card() -> Any:
    """NVML's handle of the card that a training would take. Raises BadInput when there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        if visible.isdigit():
            return pynvml.nvmlDeviceGetHandleByIndex(int(visible))
        return pynvml.nvmlDeviceGetHandleByUUID(visible)
    except pynvml.NVMLError as error:
        raise BadInput(NO_GPU.format(str(error))) from error


def card_used() -> int:
    """Bytes of the card in use, by whomever, as the driver sees it."""
    import pynvml

    return int(pynvml.nvmlDeviceGetMemoryInfo(nvml_card()).used)


def machine(gpu: bool) -> dict[str, Any]:
    """Names and sizes that a figure needs beside it. Raises BadInput when `gpu` and there is none that torch can use."""
    found: dict[str, Any] = {"cpu": cpu_name(), "cores": os.cpu_count(), "gpu": None}
    if gpu:
        import pynvml

        card = nvml_card()
        if not torch.backends.cuda.is_built():
            raise BadInput(
                f"torch {torch.__version__} is a build without CUDA; `make setup TORCH=cuda` takes the other"
            )
        found |= {
            "gpu": pynvml.nvmlDeviceGetName(card),
            "gpu_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(card).total),
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "cuda": torch.version.cuda,
        }
        with contextlib.suppress(pynvml.NVMLError):  # not every card tells
            found["power_limit_w"] = pynvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1000
    return found


def measure_peak(seconds: float = 3.0) -> dict[str, Any]:
    """FLOP a second of a large square matrix product: bf16 on a GPU, fp32 on a CPU. Median of many, after a warm-up.

    A product of n x n matrices takes 2 n^3 operations.
    """
    gpu = torch.cuda.is_available()
    n, device, dtype = (8192, "cuda", torch.bfloat16) if gpu else (1024, "cpu", torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 10:
        begin = time.perf_counter()
        for _ in range(10):
            a @ b
        if gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / 10)
    return {"n": n, "dtype": str(dtype).removeprefix("torch."), "flops": 2 * n**3 / statistics.median(times[2:])}


def hold(free_gib: float) -> None:
    """Allocate until `free_gib` GiB of the card are left, say so on stdout, and keep it until stdin is closed."""
    kept: list[torch.Tensor] = []
    torch.cuda.init()
    for piece in (GIB, 2**26, 2**24):  # the allocator asks the driver for just these sizes
        while torch.cuda.mem_get_info()[0] - piece >= free_gib * GIB:
            kept.append(torch.empty(piece, dtype=torch.uint8, device="cuda"))
    free = torch.cuda.mem_get_info()[0]
    print(json.dumps({"free": free}), flush=True)
    sys.stdin.read()


@contextlib.contextmanager
def only(free_gib: float | None) -> Iterator[int | None]:
    """Within the block the card has `free_gib` GiB free; yields the bytes really free. None: the card as it is.

    Raises BadInput when the card has not that much, or the process that holds the rest fails.
    """
    if free_gib is None:
        yield None
        return
    command = [sys.executable, __file__, "hold", str(free_gib)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin and holder.stdout
    try:
        said = holder.stdout.readline()
        if not said:
            raise BadInput(f"the process that holds the rest of the card ended with status {holder.wait()}, see above")
        free = json.loads(said)["free"]
        if free < free_gib * GIB - 2**26:
            raise BadInput(f"the card has {free / GIB:.2f} GiB free, {free_gib} are wanted")
        yield free
    finally:
        holder.stdin.close()
        holder.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("peak")
    commands.add_parser("hold").add_argument("gib", type=float)
    args = parser.parse_args()
    if args.command == "peak":
        print(json.dumps(measure_peak()))
    elif not torch.cuda.is_available():
        raise BadInput("there is no GPU to hold memory of")
    else:
        hold(args.gib)


if __name__ == "__main__":
    run(main)
