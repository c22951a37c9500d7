"""The container without an engine: the Dockerfile is linted, and what docker/steps.py carries out is the Dockerfile."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from docker import steps
from prep import common as machine
from prep.common import BadInput

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
    assert list(steps.stages(DOCKERFILE)[1])[-1] == "workbench"  # what `docker build` makes when no stage is named
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


DOCUMENTS = (ROOT / "README.md", ROOT / "docker/README.md")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M)) | {
    "stage-a",
    "stage-b",
    "stage-c",
}


def typed(path: Path) -> list[list[str]]:
    """The commands of a document's shell blocks that have to do with docker, as the shell would split them."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", path.read_text(), re.S)).replace("\\\n", " ")
    parts = [part for line in blocks.splitlines() for part in re.split(r" && ", line)]
    words = [shlex.split(part, comments=True) for part in parts]
    return [one for one in words if one[:1] in (["docker"], ["mkdir"])]


def arguments() -> argparse.ArgumentParser:
    """Of Docker, as far as the documents use it; what stands nowhere here is an error."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", allow_abbrev=False)
    build.add_argument("-f", required=True)
    build.add_argument("-t", required=True)
    build.add_argument("--build-arg", action="append", default=[])
    build.add_argument("context")
    start = commands.add_parser("run", allow_abbrev=False)
    start.add_argument("-d", action="store_true", required=True)
    for option in ("--name", "--gpus", "--shm-size", "--user"):
        start.add_argument(option)
    for option in ("-p", "-v", "-e"):
        start.add_argument(option, action="append", default=[])
    start.add_argument("image")
    inside = commands.add_parser("exec", allow_abbrev=False)
    inside.add_argument("-it", action="store_true")
    inside.add_argument("name")
    inside.add_argument("program")
    inside.add_argument("arguments", nargs="*")
    logs = commands.add_parser("logs", allow_abbrev=False)
    logs.add_argument("-f", action="store_true")
    logs.add_argument("name")
    compose = commands.add_parser("compose", allow_abbrev=False)
    compose.add_argument("-f", dest="file", required=True)
    todo = compose.add_subparsers(dest="todo", required=True)
    up = todo.add_parser("up", allow_abbrev=False)
    up.add_argument("-d", action="store_true")
    up.add_argument("service", nargs="?")
    todo.add_parser("logs", allow_abbrev=False).add_argument("-f", action="store_true")
    return parser


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_typed_fits_the_image(path: Path) -> None:
    """Each command of the documents beside the Dockerfile, compose.yaml and the Makefile, in the order it is typed."""
    text = DOCKERFILE.read_text()
    declared = {line.partition("=")[0] for line in re.findall(r"^ARG (\S+)", text, re.M)}
    folders = [folder for folder in json.loads(re.findall(r"^VOLUME (.*)$", text, re.M)[0]) if ".cache" not in folder]
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    images, names, made = set(), set(), set()
    seen = []
    for words in typed(path):
        if words[0] == "mkdir":
            made |= set(words[2:])
            continue
        call = arguments().parse_args(words[1:])
        seen.append(call.command)
        if call.command == "build":
            assert (ROOT / call.f).samefile(DOCKERFILE) and call.context == "."
            assert {pair.partition("=")[0] for pair in call.build_arg} <= declared
            images.add(call.t)
        elif call.command == "run":
            assert call.image in images
            names.add(call.name)
            assert [port.split(":")[-1] for port in call.p] == re.findall(r"^EXPOSE (.*)$", text, re.M)
            if call.v:
                assert sorted(f"$PWD/{Path(folder).relative_to('/chateau')}:{folder}" for folder in folders) == sorted(
                    call.v
                )
                assert {str(Path(folder).relative_to("/chateau")) for folder in folders} <= made
                assert call.user == "$(id -u):$(id -g)"
        elif call.command in ("exec", "logs"):
            assert call.name in names
            if call.command == "exec":
                assert call.program == "make"
                assert {word for word in call.arguments if "=" not in word} <= TARGETS
        else:
            assert (ROOT / call.file).samefile(ROOT / "docker/compose.yaml")
            assert call.todo != "up" or (call.service or "workbench") in services
    assert seen[:2] == ["build", "run"] and "exec" in seen
    for name, value in re.findall(r"--build-arg (\w+)=([\w-]*)", path.read_text()):
        assert name in declared, name
        assert name != "EXTRAS" or value in steps.stages(DOCKERFILE)[1]


def test_what_compose_reads_is_set_somewhere() -> None:
    """Every variable of compose.yaml stands in its head, and reaches what reads it."""
    text = (ROOT / "docker/compose.yaml").read_text()
    head, _, body = text.partition("x-workbench")
    used = set(re.findall(r"\$\{(\w+):-", body))
    assert used == {"PORT", "JUPYTER_TOKEN", "CHATEAU_UID", "CHATEAU_GID", "COMMIT"}
    assert all(re.search(rf"\b{name}\b", head) for name in used)
    assert "JUPYTER_TOKEN" in (ROOT / "eval/serve.py").read_text()
    for service in yaml.safe_load(text)["services"].values():
        assert service["build"]["args"]["COMMIT"] == "${COMMIT:-}"
        context = (ROOT / "docker" / service["build"]["context"]).resolve()
        assert context == ROOT and (context / service["build"]["dockerfile"]).samefile(DOCKERFILE)
        for volume in service["volumes"]:
            source, target = volume.split(":")
            assert source == "hub" or (ROOT / "docker" / source).resolve() == ROOT / Path(target).relative_to(
                "/chateau"
            )


def test_the_image_knows_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the build argument to the report, where there is no .git."""
    monkeypatch.setattr(machine, "HERE", tmp_path)
    monkeypatch.delenv("CHATEAU_COMMIT", raising=False)
    assert machine.git_state() is None
    described = subprocess.run(
        shlex.split(re.findall(r'COMMIT="\$\((.*?)\)"', DOCKERFILE.read_text())[0]),
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?\n", described.stdout)
    commit = "0123456789abcdef0123456789abcdef01234567"
    for told, state in (
        (commit, {"commit": commit, "modified": False}),
        (f"{commit}-dirty", {"commit": commit, "modified": True}),
        ("", None),
    ):
        image = steps.State(tmp_path, {"COMMIT": told} if told else {})
        for step in steps.line("workbench", DOCKERFILE, {})[1]:
            if step.instruction in ("ARG", "ENV"):
                steps.carry_out(step, image, ROOT, [])
        monkeypatch.setenv("CHATEAU_COMMIT", image.environment["CHATEAU_COMMIT"])
        assert machine.git_state() == state
    monkeypatch.setattr(machine, "HERE", ROOT)
    monkeypatch.setenv("CHATEAU_COMMIT", commit)
    if (ROOT / ".git").exists():
        assert machine.git_state() != {"commit": commit, "modified": False}  # where there is a .git, it decides


# --- docker/steps.py on a small Dockerfile, in a root of a few programs -----------------------------------------------

NAMESPACES = os.geteuid() == 0 and not subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"]).returncode
SMALL = """\
ARG CHOICE=left
FROM debian:bookworm-slim@sha256:0 AS system
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
FROM system AS left
RUN echo left > /side
FROM system AS right
RUN echo right > /side
FROM ${CHOICE} AS workbench
ARG WORD=none
ENV PLACE=/app/$WORD TWO="two words"
WORKDIR ${PLACE}
COPY given/ kept/
RUN echo "$WORD|$PLACE|$TWO|$PWD|$(id -u)|${UNSAID-}" > built
RUN date +%N > stamp
COPY . .
USER 1234:1235
RUN id -u > /tmp/user; id -g > /tmp/group
EXPOSE 8000
HEALTHCHECK --interval=1s CMD ["test", "-e", "/tmp/up"]
ENTRYPOINT ["env", "VIA=entry"]
CMD ["bash", "-c", "echo $VIA $WORD > /tmp/started; sleep 0.5; : > /tmp/up; exec sleep 1234.5"]
"""
# What mmdebstrap would fetch: a folder with a few programs of this machine and their libraries.
LAYOUT = """\
#!/bin/bash
root=${@: -1}
echo "$@" >> "$(dirname "$0")/calls"
mkdir -p "$root"/{proc,dev,usr/bin,usr/lib,usr/lib64} "$root/tmp"
chmod 1777 "$root/tmp"
for folder in bin lib lib64; do ln -s usr/$folder "$root/$folder"; done
for name in bash env id sleep test date cat; do
    path=$(type -P $name)
    for file in "$path" $(ldd "$path" | grep -o '/[^ ]*'); do
        mkdir -p "$root$(dirname "$file")"
        cp -L "$file" "$root$file"
    done
done
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A context with the small Dockerfile; docker/steps.py works on it."""
    if not NAMESPACES:
        pytest.skip("needs root, and the right to make namespaces")
    context = tmp_path / "context"
    for name, text in {
        "docker/Dockerfile": SMALL, ".dockerignore": "*\n!given\n!docker\ngiven/secret", "given/a/b.txt": "one", "given/secret": "no",
        "other.txt": "not let through", "other/given": "nor this: patterns are anchored",
    }.items():  # fmt: skip
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_text(text)
    (context / "given/run").write_text("")
    (context / "given/run").chmod(0o755)
    monkeypatch.setattr(steps, "HERE", context / "docker")
    monkeypatch.setattr(steps, "CONTEXT", context)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mmdebstrap").write_text(LAYOUT)
    (tmp_path / "bin/mmdebstrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("UNSAID", "of this machine")
    monkeypatch.chdir(tmp_path)
    return context


def lay_out(*arguments: str) -> None:
    sys.argv = ["steps.py", "root", *arguments]
    steps.main()


def test_the_steps_are_carried_out(small: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shown = tmp_path / "shown.txt"
    shown.write_text("from outside")
    lay_out("--build-arg", "WORD=said", "--bind", str(shown), "--env", "MIRROR=here", "--", "bash", "-c",
            f"echo $VIA $MIRROR $WORD $(cat {shown}) > /tmp/command; test -e /proc/$$ && test -c /dev/null")  # fmt: skip
    assert (tmp_path / "bin/calls").read_text().split()[-2:] == ["bookworm", str(root)]
    assert (root / "side").read_text() == "left\n"
    place = root / "app/said"
    assert (place / "built").read_text() == "said|/app/said|two words|/app/said|0|\n"
    assert (place / "kept/a/b.txt").read_text() == (place / "given/a/b.txt").read_text() == "one"
    assert os.access(place / "kept/run", os.X_OK) and not os.access(place / "kept/a/b.txt", os.X_OK)
    assert not list(root.rglob("secret")) and not list(root.rglob("other*"))
    assert (root / "tmp/user").read_text() == "1234\n" and (root / "tmp/group").read_text() == "1235\n"
    # ARGs end with the build; the entry point stands before the command; the bind is shown inside alone.
    assert (root / "tmp/command").read_text() == "entry here from outside\n"
    assert (root / "tmp/command").stat().st_uid == 1234
    assert not (root / shown.relative_to("/")).read_text()
    assert not any(str(root) in line for line in Path("/proc/mounts").read_text().splitlines())


def test_another_stage_by_an_argument(small: Path, tmp_path: Path) -> None:
    lay_out("--build-arg", "CHOICE=right", "--", "test", "-d", "/app/none")
    assert (tmp_path / "root/side").read_text() == "right\n"


def test_a_second_run_goes_on(small: Path, tmp_path: Path) -> None:
    """What is done stays; what has changed, and all after it, is done again; a step that failed is not done."""
    stamp = tmp_path / "root/app/none/stamp"
    nothing = ("--", "test", "-d", ".")
    lay_out(*nothing)
    first = stamp.read_text()
    lay_out(*nothing)
    assert stamp.read_text() == first
    (small / "docker/more").write_text("copied after the stamp")
    lay_out(*nothing)
    assert stamp.read_text() == first and (stamp.parent / "docker/more").exists()
    (small / "given/a/b.txt").write_text("two")  # copied before the stamp
    lay_out(*nothing)
    assert (second := stamp.read_text()) != first and (stamp.parent / "kept/a/b.txt").read_text() == "two"
    (small / "given/run").chmod(0o644)
    lay_out(*nothing)
    assert (third := stamp.read_text()) != second
    file = small / "docker/Dockerfile"
    file.write_text(SMALL.replace("RUN date +%N > stamp", "RUN date +%N > stamp; false"))
    with pytest.raises(BadInput, match=r"root: status 1 from RUN date .* false; what an earlier run left"):
        lay_out(*nothing)
    assert (failed := stamp.read_text()) != third
    file.write_text(SMALL)
    lay_out(*nothing)
    assert stamp.read_text() != failed
    assert len((tmp_path / "bin/calls").read_text().splitlines()) == 1  # the base was laid out once
    before = stamp.read_text()
    lay_out("--build-arg", "WORD=none", *nothing)  # the default, said
    assert stamp.read_text() == before


def test_a_step_that_fails_is_named(small: Path, tmp_path: Path) -> None:
    (small / "docker/Dockerfile").write_text(SMALL.replace("RUN date +%N > stamp", "RUN exit 7"))
    with pytest.raises(BadInput, match=r"root: status 7 from RUN exit 7$"):
        lay_out()
    (small / "docker/Dockerfile").write_text(SMALL)
    with pytest.raises(BadInput, match="the command ended with status 9"):
        lay_out("--", "bash", "-c", "exit 9")


def test_the_containers_start_is_played(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleeping() -> list[int]:
        return [one.pid for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", "1234.5"]]

    before = sleeping()
    lay_out()
    assert (tmp_path / "root/tmp/started").read_text() == "entry\n"
    assert re.search(r"healthy after [1-9] s", capfd.readouterr().out)
    assert sleeping() == before
    (tmp_path / "root/tmp/up").unlink()
    file = small / "docker/Dockerfile"
    file.write_text(SMALL.replace("sleep 0.5;", "exit 3;"))
    with pytest.raises(BadInput, match="ended with status 3"):
        lay_out()
    file.write_text(SMALL.replace('"test", "-e", "/tmp/up"', '"cat", "/tmp/never"'))
    began = time.monotonic()
    monkeypatch.setattr(steps, "PATIENCE", 2)
    with pytest.raises(BadInput, match=r"did not become healthy: .*/tmp/never"):
        lay_out()
    assert time.monotonic() - began < 60 and sleeping() == before


def test_what_cannot_be_laid_out_is_said(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = small / "docker/Dockerfile"
    file.write_text(SMALL.replace("COPY given/", "COPY other.txt"))
    with pytest.raises(BadInput, match=r"leaves nothing of other\.txt"):
        lay_out()
    shutil.rmtree(tmp_path / "root")
    (tmp_path / "root.done.json").unlink()
    file.write_text(SMALL.replace("COPY given/", "COPY --from=left /side"))
    with pytest.raises(BadInput, match="--target"):
        lay_out()
    shutil.rmtree(tmp_path / "root")
    (tmp_path / "root.done.json").unlink()
    file.write_text(SMALL.replace("FROM debian:bookworm", "FROM fedora:40"))
    with pytest.raises(BadInput, match="lays out Debian only"):
        lay_out()
    file.write_text(SMALL)
    (tmp_path / "root").mkdir()
    with pytest.raises(BadInput, match="there already"):
        lay_out()
    capsys.readouterr()
    lay_out("--list")
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].startswith("FROM debian:bookworm") and "RUN echo left > /side" in listed
    assert "RUN echo right > /side" not in listed and listed[-1].startswith("CMD ")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BadInput, match="needs root"):
        lay_out()


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
