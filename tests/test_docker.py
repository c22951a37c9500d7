"""The container, without an engine: what the Dockerfile, compose.yaml and the entry point promise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prep import common

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "docker/Dockerfile"
TEXT = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.M).replace("\\\n", " ")
STEPS = [line.partition(" ")[::2] for line in TEXT.splitlines() if line.strip()]  # (instruction, value)


def test_hadolint() -> None:
    binary = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([binary, "--failure-threshold", "info", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_fits_the_image() -> None:
    volumes = json.loads(next(value for instruction, value in STEPS if instruction == "VOLUME"))
    arguments = {value.partition("=")[0] for instruction, value in STEPS if instruction == "ARG"}
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    for service in services.values():
        mounts = dict(volume.split(":")[::-1] for volume in service["volumes"])
        assert set(mounts) == set(volumes) and set(service["build"]["args"]) <= arguments
        for target, source in mounts.items():
            assert source == "hub" or source == target.replace("/chateau", "..")
        assert all(re.fullmatch(r"127\.0\.0\.1:.*:8000", port) for port in service["ports"])
    assert services["workbench"]["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"
    assert "deploy" not in services["workbench-cpu"]


def test_a_report_names_the_commit_that_the_image_was_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATEAU_COMMIT", "f" * 40)
    if (ROOT / ".git").exists():
        assert common.git_state() != {"commit": "f" * 40, "modified": False}  # where there is a .git, it decides
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert common.git_state() == {"commit": "f" * 40, "modified": False}
    monkeypatch.setenv("CHATEAU_COMMIT", f"{'f' * 40}-dirty")
    assert common.git_state() == {"commit": "f" * 40, "modified": True}
    monkeypatch.setenv("CHATEAU_COMMIT", "")
    assert common.git_state() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_a_folder_of_another_user_is_named(tmp_path: Path) -> None:
    script = (ROOT / "docker/entrypoint").read_text().replace("cd /chateau", f"cd {tmp_path}")
    hub = tmp_path / "hub"
    folders = [tmp_path / name for name in ("models", "data", "outputs", "eval/reports")] + [hub]
    for folder in folders:
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    for path in (tmp_path, *tmp_path.parents):
        if str(path).startswith("/tmp/pytest"):
            path.chmod(0o755)

    def start() -> subprocess.CompletedProcess:
        command = ["bash", "-c", script, "entrypoint", "echo", "started"]
        environment = os.environ | {"HF_HOME": str(hub)}
        return subprocess.run(command, env=environment, user=65534, capture_output=True, text=True, cwd="/")

    assert start().stdout == "started\n"
    for locked in folders:
        locked.chmod(0o755)
        refused = start()
        name = locked if locked == hub else locked.relative_to(tmp_path)
        assert refused.returncode == 1 and refused.stderr.startswith(f"{name} belongs to user 0")
        locked.chmod(0o777)
