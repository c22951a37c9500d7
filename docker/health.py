"""Is the container fit for work? Exit status 0, or 1 and one line that says what is wrong.

The workbench is served with the token and not without it, the mounted folders can be written, and a GPU that the container
was given still answers: it can vanish when the host reloads its services.
"""

from prep.command import run

import os
import shutil
import subprocess
from pathlib import Path

import requests
from jupyter_server.serverapp import list_running_servers

from prep.common import BadInput

CARD = Path("/dev/nvidiactl")  # in a container it is there if, and only if, a GPU was given


def check_card() -> None:
    """Raises BadInput when a GPU was given, and no longer answers."""
    if not CARD.exists():
        return
    if not shutil.which("nvidia-smi"):
        raise BadInput("a GPU is here without nvidia-smi: NVIDIA_DRIVER_CAPABILITIES must have utility")
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    if done.returncode or "GPU" not in done.stdout:
        said = " ".join((done.stdout + done.stderr).split())
        raise BadInput(f"the GPU does not answer ({said}): restart the container")


def main() -> None:
    servers = list(list_running_servers())
    if not servers:
        raise BadInput("no notebook server is running")
    for server in servers:
        page = f"http://127.0.0.1:{server['port']}{server['base_url']}api/contents/eval/workbench.ipynb?content=0"
        try:
            status, locked = (
                requests.get(page + end, timeout=10).status_code for end in (f"&token={server['token']}", "")
            )
        except requests.RequestException as error:
            raise BadInput(f"the notebook server does not answer: {error}") from error
        if status != 200:
            raise BadInput(f"the workbench is not served: status {status}")
        if locked == 200:
            raise BadInput("the workbench is served without a token")
    for folder in ("models", "data", "outputs", "eval/reports"):
        if not os.access(folder, os.W_OK):
            raise BadInput(f"{Path(folder).resolve()} cannot be written to")
    check_card()


if __name__ == "__main__":
    run(main)
