"""Is the container fit for work? Exit status 0, or 1 and one line that says what is wrong.

The workbench is served with the token and not without it, the mounted folders can be written, and a GPU that the container
was given still answers: it can vanish when the host reloads its services.
"""

import os
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

from jupyter_server.serverapp import list_running_servers

from prep.common import BadInput, run

CARD = Path("/dev/nvidiactl")  # in a container it is there if, and only if, a GPU was given


def status(url: str) -> int:
    """The HTTP status of an address. Raises BadInput when nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        raise BadInput(f"the notebook server does not answer: {error}") from error


def check_card() -> None:
    """Raises BadInput when a GPU was given, and no longer answers."""
    if not CARD.exists():
        return
    if not shutil.which("nvidia-smi"):
        raise BadInput("a GPU is here without nvidia-smi: NVIDIA_DRIVER_CAPABILITIES must have utility")
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    if done.returncode or "GPU" not in done.stdout:
        said = " ".join((done.stdout + done.stderr).split())
        raise BadInput(f"the GPU does not answer ({said}): restart the container")


def main() -> None:
    servers = list(list_running_servers())
    if not servers:
        raise BadInput("no notebook server is running")
    for server in servers:
        page = f"http://127.0.0.1:{server['port']}{server['base_url']}api/contents/eval/workbench.ipynb?content=0"
        if (found := status(f"{page}&token={server['token']}")) != 200:
            raise BadInput(f"the workbench is not served: status {found}")
        if status(page) == 200:
            raise BadInput("the workbench is served without a token")
    for folder in ("models", "data", "outputs", "eval/reports"):
        if not os.access(folder, os.W_OK):
            raise BadInput(f"{Path(folder).resolve()} cannot be written to")
    check_card()


if __name__ == "__main__":
    run(main)
