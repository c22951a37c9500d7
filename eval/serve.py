"""Serve the workbench: JupyterLab on one port, which opens with eval/workbench.ipynb, rendered by Voilà.

    python eval/serve.py                  # or: make notebook; only this machine can reach it
    python eval/serve.py --port 8001

The printed address has a token in it: JUPYTER_TOKEN, or a new one. Without the token there is a login page and nothing
else, whatever Jupyter's settings on this machine say: the server reads none of them, and stops when it is not refused
itself. JupyterLab, with its editor and terminal, is at /lab of the same address.
"""

from prep.command import run

import argparse
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from prep.common import ROOT, BadInput, end_with_parent

PAGE = "/voila/render/eval/workbench.ipynb"
# Voilà's template asks two content networks for fonts and formulas that the page does not use: nothing is loaded from elsewhere.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob: ws: wss:; frame-ancestors 'self'"


def check_port(ip: str, port: int) -> None:
    """Raises BadInput when another program listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError as error:
            raise BadInput(
                f"port {port} is not available on {ip} ({error.strerror}): is a workbench running already? "
                f"Otherwise choose another port: make notebook PORT={port + 1}"
            ) from error


def command(ip: str, port: int) -> list[str]:
    """The call of JupyterLab. It contains no secret: anybody on the machine can list it."""
    settings = {
        "ServerApp.ip": ip,
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.base_url": "/",
        "ServerApp.root_dir": ROOT,
        "ServerApp.open_browser": False,
        "ServerApp.jpserver_extensions": {"jupyterlab": True, "voila.server_extension": True},
        "ServerApp.tornado_settings": {"headers": {"Content-Security-Policy": POLICY}},
        "ServerApp.log_level": "ERROR",  # its log would print the token
        "LabApp.log_level": "ERROR",
        "LabApp.default_url": PAGE,
        "LabApp.news_url": "",  # nothing is fetched
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        "ServerApp.allow_root": True,  # checked below
        "VoilaConfiguration.show_tracebacks": True,
        # An open page keeps its kernel; when its browser is gone the kernel's models are freed after ten minutes.
        "MappingKernelManager.cull_idle_timeout": 600,
        "MappingKernelManager.cull_interval": 60,
    }
    return [sys.executable, "-m", "jupyterlab", *(f"--{key}={value}" for key, value in settings.items())]


def ask(host: str, port: int, path: str) -> tuple[int, str]:
    """The HTTP status of a page asked without a token, and where it redirects to."""
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.getheader("Location") or ""


def check_refused(host: str, port: int, server: subprocess.Popen) -> None:
    """Wait until the server answers, and ask for its pages without a token. Raises BadInput unless each is refused."""
    while server.poll() is None:
        try:
            ask(host, port, "/api")
            break
        except OSError:  # not listening yet
            time.sleep(0.2)
    else:
        raise BadInput(f"JupyterLab ended with status {server.returncode} before it answered")
    for path in ("/lab", "/api/contents", PAGE):
        status, target = ask(host, port, path)
        if status not in (401, 403) and not target.startswith("/login"):
            raise BadInput(
                f"the server was stopped: without the token it answers {path} with status {status} instead of refusing; "
                "look for Jupyter settings in this environment (JUPYTER_* variables, etc/jupyter)"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ip", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dir", type=Path, help="working directory to show, instead of the repository and the demo's")
    parser.add_argument("--allow-root", action="store_true", help="run as root all the same")
    args = parser.parse_args()
    if not 0 < args.port < 65536:
        parser.error("--port must be between 1 and 65535")
    if args.dir and not args.dir.is_dir():
        raise BadInput(f"--dir {args.dir} is not a folder (relative to {Path.cwd()})")
    check_port(args.ip, args.port)
    if os.geteuid() == 0 and not args.allow_root:
        raise BadInput(
            "whoever has the token can run commands as the user of the workbench, and that is root: "
            "start it as another user, or give --allow-root"
        )

    # An empty token would switch authentication off: it counts as none given.
    given = os.environ.get("JUPYTER_TOKEN", "").strip()
    token = given or secrets.token_urlsafe(24)
    environment = os.environ | {
        "JUPYTER_NO_CONFIG": "1",  # no settings of this user or machine
        "JUPYTER_TOKEN": token,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    if args.dir:
        environment["WORKBENCH_DIR"] = str(args.dir.resolve())
    # In a session of its own: two signals at once, as from a terminal's Ctrl-C, keep JupyterLab from ending.
    server = subprocess.Popen(
        command(args.ip, args.port),
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: end_with_parent(signal.SIGTERM),
    )
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(name, lambda *_: sys.exit(0))
    try:
        check_refused("127.0.0.1" if args.ip == "0.0.0.0" else args.ip, args.port, server)
        host = "localhost" if args.ip in ("127.0.0.1", "0.0.0.0") else args.ip
        address = f"http://{host}:{args.port}/"
        print(f"workbench: {address}" + ("  (token: JUPYTER_TOKEN)" if given else f"?token={token}"), flush=True)
        return server.wait()
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


if __name__ == "__main__":
    run(main)
