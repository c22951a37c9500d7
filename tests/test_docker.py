"""The container without an engine: the Dockerfile is linted, and what docker/steps.py carries out is the Dockerfile."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docker import steps
from prep.files import BadInput

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "docker/Dockerfile"


def test_hadolint() -> None:
    binary = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([binary, "--failure-threshold", "info", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_run_step_is_carried_out() -> None:
    """Counted in the text by other means than the parser that docker/steps.py uses."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    written = [re.sub(r"\s+", " ", line)[4:].strip() for line in text.splitlines() if line.startswith("RUN ")]
    carried: list[str] = []
    for _, own in steps.stages(DOCKERFILE)[1].values():
        carried += [re.sub(r"\s+", " ", step.value) for step in own if step.instruction == "RUN"]
    assert carried == written and len(written) >= 6
    _, line = steps.line("workbench", DOCKERFILE, {})
    own = [step for step in line if step.instruction == "RUN"]
    assert [step.value.split()[0] for step in own] == ["apt-get", "python3.11", "groupadd", "install"]


def test_an_unknown_instruction_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(DOCKERFILE.read_text() + "\nADD https://example.org/x /x\n")
    with pytest.raises(BadInput, match="cannot carry out ADD"):
        steps.stages(path)


def test_a_recipe_rebuilds_nothing_heavy() -> None:
    """What is copied before the packages are installed is the locks, and the pinned base is pinned."""
    base, line = steps.line("workbench", DOCKERFILE, {})
    assert re.fullmatch(r"debian:bookworm-\d{8}-slim@sha256:[0-9a-f]{64}", base)
    last_heavy = max(place for place, step in enumerate(line) if "pip install" in step.value)
    copied = " ".join(step.value for step in line[:last_heavy] if step.instruction == "COPY")
    assert copied and all(re.fullmatch(r"requirements/([a-z-]+\.txt)?", word) for word in copied.split())
    after = [step.value for step in line[last_heavy + 1 :] if step.instruction == "RUN"]
    assert not any(re.search(r"\b(pip|apt-get)\b", value) for value in after)


def test_pip_installs_by_hash_alone() -> None:
    for _, own in steps.stages(DOCKERFILE)[1].values():
        for step in own:
            for call in re.findall(r"pip (?:install|wheel)[^&;]*", step.value):
                assert "--no-deps" in call and ("--require-hashes" in call or "/tmp/wheels" in call), call


def test_no_argument_is_a_variable_of_the_shell() -> None:
    """bash keeps UID, GROUPS and others for itself: an ARG of such a name would silently not be passed."""
    for step in steps.line("workbench", DOCKERFILE, {})[1]:
        if step.instruction == "ARG":
            name = step.value.partition("=")[0]
            shown = subprocess.run(["bash", "-c", f"echo ${name}"], env={name: "321"}, capture_output=True, text=True)
            assert shown.stdout == "321\n", name


def test_the_context_holds_what_is_needed_and_no_more() -> None:
    files = {str(path) for path in steps.context_files(ROOT)}
    assert {"Makefile", "recipes/2b.yml", "eval/workbench.ipynb", "docker/entrypoint", "requirements/base.txt"} <= files
    produced = ("models/", "data/", "outputs/", "demo/run/", ".venv/", ".git/")
    assert not [name for name in files if name.startswith(produced) or "__pycache__" in name]
    assert not [name for name in files if name.startswith("eval/reports/") and "/demo." not in name]


def test_compose() -> None:
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    devices = services["workbench"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["driver"] == "nvidia" and "deploy" not in services["workbench-cpu"]
    volumes = {step.value for step in steps.line("workbench", DOCKERFILE, {})[1] if step.instruction == "USER"}
    assert volumes == {"${USER_ID}:${GROUP_ID}"}
    declared = json.loads(re.findall(r"^VOLUME (.*)$", DOCKERFILE.read_text(), re.M)[0])
    for service in services.values():
        assert {volume.split(":")[1] for volume in service["volumes"]} == set(declared)
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_a_folder_of_another_user_is_named(tmp_path: Path) -> None:
    script = (ROOT / "docker/entrypoint").read_text().replace("cd /chateau", f"cd {tmp_path}")
    for folder in ("models", "data", "outputs", "eval/reports", "hub"):
        (tmp_path / folder).mkdir(parents=True)
    for path in (tmp_path, *tmp_path.parents):
        if str(path).startswith("/tmp/pytest"):
            path.chmod(0o755)

    def start() -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", script, "entrypoint", "echo", "started"],
            env=os.environ | {"HF_HOME": str(tmp_path / "hub")}, user=65534, capture_output=True, text=True, cwd="/",
        )  # fmt: skip

    refused = start()
    assert refused.returncode == 1 and "belongs to user 0" in refused.stderr and "--user" in refused.stderr
    for folder in ("models", "data", "outputs", "eval/reports", "hub"):
        (tmp_path / folder).chmod(0o777)
    assert start().stdout == "started\n"
