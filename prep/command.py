"""What every script begins and ends with. Imported before all else (pyproject.toml orders imports so): torch takes seconds."""

import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from prep.common import ROOT, BadInput

# torchao names each CUDA kernel that a CPU cannot load, torch a deprecation in torchao, and where a processor has avx512_bf16
# bitsandbytes a kernel that it does not find on the hub (train/dequantise.py does without): none is the user's.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "Skipping publisher trust check")  # of that kernel

# Until `run` reports it, Ctrl-C ends one of our scripts as the shell expects; Python would print where its imports were.
# Not where it is ignored (nohup), nor in pytest, Axolotl and the workers of a script, which import this as well.
_script = Path(sys.argv[0]).resolve()
if (
    _script.suffix == ".py"
    and _script.parent.parent == ROOT
    and not multiprocessing.parent_process()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and leave with its status; expected failures become one line on stderr.

    Status 1: bad input or a failed read or write. 130: interrupted. A defect of ours keeps its traceback.
    """
    name = Path(sys.argv[0]).name
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(main() or 0)
    except BadInput as error:
        sys.exit(f"{name}: {error}")
    except UnicodeEncodeError as error:
        if error.reason != "surrogates not allowed":  # how Python reads bytes of a file's name that are not UTF-8
            raise
        near = error.object[max(0, error.start - 30) : error.end + 10]
        sys.exit(f"{name}: a file's name is not UTF-8 (in {near!r}): rename it")
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; nothing half-written was left, run the same command again", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno is None:
            raise
        sys.exit(f"{name}: {error.strerror}" + (f": {error.filename}" if error.filename else ""))


def without_torch() -> None:
    """For scripts that only tokenise: transformers would import torch, for seconds, and say so where there is none."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
