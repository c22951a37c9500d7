"""Serve the workbench: JupyterLab on one port, with eval/workbench.ipynb, rendered by Voilà, as the page it opens with.

    python eval/serve.py                  # what `make notebook` runs; only this machine can reach it
    python eval/serve.py --port 8001

The address it prints has a token in it; without the token there is a login page and nothing else. Give one by JUPYTER_TOKEN,
or let it be made.
JupyterLab itself, with its editor and terminal, is at /lab of the same address.
"""

import argparse
import os
import secrets
import socket
import sys
from pathlib import Path

from prep.common import BadInput, run

ROOT = Path(__file__).resolve().parent.parent
PAGE = "/voila/render/eval/workbench.ipynb"
# Voilà's template asks two content networks for fonts and formulas that the page does not use: nothing is loaded from elsewhere.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob: ws: wss:; frame-ancestors 'self'"


def check_port(ip: str, port: int) -> None:
    """Raises BadInput when another program listens there; Jupyter would quietly take the next one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError as error:
            raise BadInput(
                f"port {port} cannot be had on {ip} ({error.strerror}): is a workbench running already? "
                f"Otherwise choose another port: make notebook PORT={port + 1}"
            ) from error


def command(ip: str, port: int) -> list[str]:
    """The call of JupyterLab. Nothing in it is secret: anybody on the machine can list it."""
    settings = {
        "ServerApp.ip": ip,
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": ROOT,
        "ServerApp.open_browser": False,
        "ServerApp.tornado_settings": {"headers": {"Content-Security-Policy": POLICY}},
        "ServerApp.log_level": "ERROR",  # its log would print the token again and again
        "LabApp.default_url": PAGE,
        "LabApp.news_url": "",  # it works offline, and tells nobody that it runs
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        "ServerApp.allow_root": True,  # asked above
        "VoilaConfiguration.show_tracebacks": True,
        # A page that is open keeps its kernel; one whose browser has vanished frees its models after ten minutes.
        "MappingKernelManager.cull_idle_timeout": 600,
        "MappingKernelManager.cull_interval": 60,
    }
    return [sys.executable, "-m", "jupyterlab", *(f"--{key}={value}" for key, value in settings.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ip", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dir", type=Path, help="working directory to show, instead of the repository and the demo's")
    parser.add_argument("--allow-root", action="store_true", help="run as root all the same")
    args = parser.parse_args()
    if not 0 < args.port < 65536:
        parser.error("--port must be between 1 and 65535")
    check_port(args.ip, args.port)
    if os.geteuid() == 0 and not args.allow_root:
        raise BadInput(
            "whoever has the token can run commands as the user that the workbench runs as, and that is root: "
            "start it as another user, or say --allow-root"
        )

    # An empty token would switch the question for it off: it counts as none given.
    given = os.environ.get("JUPYTER_TOKEN", "").strip()
    token = given or secrets.token_urlsafe(24)
    host = "localhost" if args.ip in ("127.0.0.1", "0.0.0.0", "::1") else args.ip
    print(
        f"workbench: http://{host}:{args.port}/" + ("  (token: JUPYTER_TOKEN)" if given else f"?token={token}"),
        flush=True,
    )
    environment = os.environ | {
        "JUPYTER_TOKEN": token,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    if args.dir:
        if not args.dir.is_dir():
            raise BadInput(f"--dir {args.dir} is not a folder (looked from {Path.cwd()})")
        environment["WORKBENCH_DIR"] = str(args.dir.resolve())
    arguments = command(args.ip, args.port)
    os.execve(arguments[0], arguments, environment)


if __name__ == "__main__":
    run(main)
