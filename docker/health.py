"""Is the container fit for work? Exit status 0, or 1 and one line that says what is wrong.

More than an open port: the workbench's page is served to one who has the token and to nobody else, the outputs can be
written, and a GPU that the container was given still answers (the driver's devices can vanish from a running container
when the host reloads its services; a training then fails only after minutes of loading).
"""

import os
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

from jupyter_server.serverapp import list_running_servers

from prep.common import BadInput, run

PAGE = "api/contents/eval/workbench.ipynb?content=0"
CARD = Path("/dev/nvidiactl")  # in a container it is there if, and only if, a GPU was given


def status(url: str) -> int:
    """The HTTP status of an address."""
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
    seen = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    if seen.returncode or "GPU" not in seen.stdout:
        raise BadInput(
            f"the GPU does not answer ({' '.join((seen.stdout + seen.stderr).split())}): restart the container"
        )


def main() -> None:
    servers = list(list_running_servers())
    if not servers:
        raise BadInput("no notebook server is running")
    for server in servers:
        base = f"http://127.0.0.1:{server['port']}{server['base_url']}"
        if (found := status(f"{base}{PAGE}&token={server['token']}")) != 200:
            raise BadInput(f"the workbench is not served: status {found}")
        if status(base + PAGE) == 200:
            raise BadInput("the workbench is served without a token")
    for folder in ("models", "data", "outputs", "eval/reports"):
        if not os.access(folder, os.W_OK):
            raise BadInput(f"{Path(folder).resolve()} cannot be written to")
    check_card()


if __name__ == "__main__":
    run(main)
