"""The workbench: live logs, models that fit or do not, the notebook run from top to bottom, and the page in a real browser."""

import html
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import yaml
from conftest import log_step
from nbclient import NotebookClient
from tiny_curriculum import save_adapter, save_base
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoTokenizer

from docker import health
from eval import workbench
from prep.common import BadInput
from train.stages import load_chain

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "eval/workbench.ipynb"
SCREENSHOTS = ROOT / "tests/screenshots"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as a small training leaves it: base, 2a, 2b on it, their logs; nothing of 2c."""
    cwd = tmp_path_factory.mktemp("trained")
    save_base(cwd / "models/base", hidden=256, layers=8)
    full = save_base(cwd / "outputs/2a", hidden=256, layers=8, seed=1)
    save_adapter(full, cwd / "outputs/2b", "outputs/2a", seed=2)
    AutoTokenizer.from_pretrained(full).save_pretrained(cwd / "outputs/2b")
    for name in ("2a", "2b"):
        with SummaryWriter(str(cwd / f"outputs/{name}/runs/x")) as writer:
            for step in range(1, 11):
                log_step(writer, step, 4 - step / 10)
    (cwd / "outputs/2a/trained.json").write_text("{}")
    return cwd


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in."""
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def limit_memory(folder: Path, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files in which Linux tells a container its limit."""
    (folder / "memory.max").write_text(str(10**9 + free))
    (folder / "memory.current").write_text(str(10**9))
    monkeypatch.setattr(workbench, "CGROUP", folder)


@pytest.fixture(scope="module")
def continued(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What eval/continuation.py leaves when it has gone on with a few passages."""
    out = tmp_path_factory.mktemp("continued")
    call: list[str | Path] = [
        sys.executable,
        ROOT / "eval/continuation.py",
        "--recipes",
        ROOT / "recipes",
        "--stage",
        "2a",
    ]
    call += [
        "--from",
        "K. ouvrit la porte.",
        "--words",
        "40",
        "--candidates",
        "2",
        "--passage-tokens",
        "24",
        "--out",
        out,
    ]
    subprocess.run(call, cwd=trained, env=ENVIRONMENT, check=True, capture_output=True)
    return out


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORKBENCH_DIR", raising=False)
    monkeypatch.setattr(workbench, "ROOT", tmp_path)
    assert workbench.places() == [tmp_path]
    (tmp_path / "demo/run/outputs").mkdir(parents=True)
    assert workbench.places() == [tmp_path, tmp_path / "demo/run"]
    for second, place in enumerate((tmp_path / "demo/run", tmp_path)):
        logged = place / "outputs/2a/runs/x/events.out.tfevents.1"
        logged.parent.mkdir(parents=True)
        logged.touch()
        os.utime(logged, (second, second + 1))
        assert workbench.places()[0] == place  # logged last
    monkeypatch.setenv("WORKBENCH_DIR", "/elsewhere")
    assert workbench.places() == [Path("/elsewhere")]


def test_epochs_are_the_recipes() -> None:
    stated = {path.stem: yaml.safe_load(path.read_text()).get("num_epochs", 1) for path in ROOT.glob("recipes/2*.yml")}
    assert workbench.epochs() == stated and len(stated) == 3


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The container's limit where there is one, the machine's otherwise."""
    monkeypatch.setattr(workbench, "CGROUP", tmp_path)
    machine = workbench.free_memory()
    assert machine > 2**20
    limit_memory(tmp_path, 12345, monkeypatch)
    assert workbench.free_memory() == 12345
    limit_memory(tmp_path, -5, monkeypatch)
    assert workbench.free_memory() == 0
    limit_memory(tmp_path, 2**60, monkeypatch)
    assert workbench.free_memory() < 2**50
    (tmp_path / "memory.max").write_text("max\n")
    assert workbench.free_memory() > 2**20


def test_an_adapter_stands_on_its_rounded_base(folder: Path) -> None:
    """As in the report and the continuation: on 4-bit weights, not on those they were made from."""
    from eval import models

    model, tokenizer = workbench.Models("cpu").get("2b", lambda _: None)
    rows = models.present(models.candidates(load_chain(ROOT / "recipes")), ["2b"])
    ids = torch.tensor([tokenizer.encode("K. ouvrit la porte. Il faisait nuit.")])
    with torch.inference_mode():
        here = model(ids).logits
        _, measured, _ = next(models.loaded(rows, "cpu", torch.float32))
        there = measured(ids).logits
        plain = models.load_model(rows[0].model, tokenizer, "cpu", torch.float32)
        unrounded = models.load_adapter(plain, rows[0], tokenizer)(ids).logits
    from_there, from_unrounded = ((here - other).abs().max().item() for other in (there, unrounded))
    print(from_there, from_unrounded)
    assert from_there < 0.1 * from_unrounded


def test_stages_that_are_there(folder: Path) -> None:
    assert workbench.stages() == {"base": "base", "2a": "2a", "2b": "2b (no verdict: half trained?)"}
    shutil.rmtree(folder / "outputs/2a")
    assert list(workbench.stages()) == ["base"]  # 2b stands on 2a


def test_two_models_or_one_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = workbench.Models("cpu")
    said: list[str] = []
    models.get("2a", said.append)
    models.get("2b", said.append)
    assert list(models.held) == ["2a", "2b"] and not any("one model at a time" in text for text in said)
    read = len(said)
    models.get("2a", said.append)
    assert len(said) == read  # not read again
    size = workbench.elements(folder / "outputs/2a/model.safetensors") * 4
    limit_memory(folder, round(size * 0.5), monkeypatch)
    with pytest.raises(BadInput, match="needs about"):
        models.get("base", said.append)
    assert any("one model at a time" in text for text in said) and not models.held
    limit_memory(folder, round(size * 1.3), monkeypatch)
    models.get("base", said.append)
    assert list(models.held) == ["base"]
    os.utime(folder / "models/base/model.safetensors", (1000, 1000))
    limit_memory(folder, round(size * 0.5), monkeypatch)
    said.clear()
    with pytest.raises(BadInput, match="needs about"):
        models.get("base", said.append)
    assert not said and not models.held  # what has changed is not kept beside what it has become


def test_a_stage_that_was_removed_or_changed(folder: Path) -> None:
    models = workbench.Models("cpu")
    said: list[str] = []
    first, _ = models.get("2a", said.append)
    path = folder / "outputs/2a/model.safetensors"
    path.write_bytes((folder / "models/base/model.safetensors").read_bytes())
    second, _ = models.get("2a", said.append)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    on_it, _ = models.get("2b", said.append)
    os.utime(path, (1000, 1000))
    assert models.get("2b", said.append)[0] is not on_it  # what it stands on is another
    (folder / "outputs/2a/model-2.safetensors").symlink_to("gone")  # listed, and not there when it is looked at
    with pytest.raises(BadInput, match="removed a moment ago"):
        models.get("2a", said.append)
    (folder / "outputs/2a/model-2.safetensors").unlink()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInput, match="is it being written"):
        models.get("2a", said.append)
    shutil.rmtree(folder / "outputs/2a")
    with pytest.raises(BadInput, match="stage 2a is missing"):
        models.get("2a", said.append)


def test_a_stream_is_the_report_s_text_and_stops(folder: Path) -> None:
    from eval import generation

    model, tokenizer = workbench.Models("cpu").get("2a", lambda _: None)
    parameters = generation.decoding(40)
    shown: list[str] = []
    text = workbench.stream(model, tokenizer, "K. ouvrit la porte.", 7, parameters, shown.append, threading.Event())
    again = generation.continuations(model, tokenizer, "K. ouvrit la porte.", 1, 7, parameters)[0]["text"]
    assert text == again and len(text) > 20
    assert len(shown) > 3 and all(b.startswith(a) for a, b in pairwise(shown))
    stop = threading.Event()
    stop.set()
    short = workbench.stream(model, tokenizer, "K. ouvrit la porte.", 7, parameters, shown.append, stop)
    assert len(short) < len(text)
    for bad in ("", " " * 5, "mot " * 3000):
        with pytest.raises(BadInput):
            workbench.stream(model, tokenizer, bad, 7, parameters, shown.append, threading.Event())


def test_two_pages_keep_at_once(tmp_path: Path) -> None:
    path = tmp_path / "outputs/kept.jsonl"
    code = f"from eval.workbench import keep\nfrom pathlib import Path\nfor n in range(300): keep(Path({str(path)!r}), {{'text': 'é' * 3000, 'n': n}})"
    writers = [subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(path.read_text().splitlines()) == len(workbench.kept(path)) == 600
    workbench.keep(path, {"text": "last", "n": 300})
    with path.open("a") as file:
        file.write('{"text": "half')
    assert len(workbench.kept(path)) == 601 and workbench.kept(path)[0]["n"] == 300  # newest first


@pytest.mark.slow
def test_the_latest_pages(continued: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert workbench.continued() == {}
    shutil.copytree(continued, workbench.CONTINUED)
    ((name, path),) = workbench.continued().items()
    assert name.startswith("2a-42-") and path.suffix == ".json"
    record = json.loads(path.read_text())
    page = workbench.latest_pages(path)
    shown = html.unescape(re.sub(r"<[^>]*>", " ", page))
    assert path.with_suffix(".txt").read_text().split() == shown.split()[-record["words"] :]
    faulty = record["passages_with_faults"]
    assert (
        f"2a goes on from words given, seed 42: {record['words']} words in {len(record['passages'])} passages" in shown
    )
    assert f"{faulty or 'none'} of which break" in shown and "stand before" not in shown

    record["passages"][0]["chosen"]["text"] = "\n\n".join(f"Le mot <b> {n}." for n in range(1, 401))
    record["passages"][1:] = []
    record["words"] = 1600
    path.write_text(json.dumps(record))
    shown = html.unescape(re.sub(r"</?(?!b>)[^>]*>", " ", page := workbench.latest_pages(path)))
    assert "<b> 400." in shown and "<b> 176." in shown and "<b> 175." not in shown and "<b>" not in page
    assert "Its last 900 words; 700 stand before them" in shown

    other = path.with_name("2c-1-0.json")
    other.write_text(json.dumps(record)[:500])
    os.utime(other, (path.stat().st_mtime + 5,) * 2)
    assert list(workbench.continued()) == ["2c-1-0", name]  # newest first
    with pytest.raises(BadInput, match="is damaged"):
        workbench.latest_pages(other)
    other.write_text("{}")
    with pytest.raises(BadInput, match="is damaged"):
        workbench.latest_pages(other)
    other.unlink()
    with pytest.raises(BadInput, match="removed a moment ago"):
        workbench.latest_pages(other)


def test_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the working directory and of the repository; whole ones are shown, torn ones are named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workbench, "ROOT", tmp_path / "repository")
    assert workbench.reports() == {}
    original = ROOT / "eval/reports/demo.json"
    for age, path in enumerate(
        ("repository/eval/reports/old.json", "repository/eval/reports/demo.json", "eval/reports/demo.json")
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(original, path)
        os.utime(path, (10_000 - age, 10_000 - age))
    found = workbench.reports()
    assert list(found) == ["old", "demo"] and found["demo"] == tmp_path / "eval/reports/demo.json"
    page = workbench.report_page(found["demo"])
    assert page.startswith("<iframe sandbox ") and page.count("&lt;svg") == 3 and 'srcdoc="' in page
    content = json.loads(original.read_text())
    written = [one["text"] for one in content["stages"]["2c"]["samples"] if one["prompt"] == "suite"]
    shown = html.unescape(workbench.novel(found["demo"]))
    assert written and all(text.strip().split("\n\n")[0] in shown for text in written) and "2c goes on" in shown
    content["prompts"] = [prompt for prompt in content["prompts"] if prompt["name"] != "suite"]
    found["old"].write_text(json.dumps(content))
    assert workbench.novel(found["old"]) == ""
    found["old"].write_text(original.read_text()[:5000])
    for show in (workbench.report_page, workbench.novel):
        with pytest.raises(BadInput, match="not whole JSON"):
            show(found["old"])
    found["old"].unlink()
    assert workbench.newest_first(found.values()) == {found["demo"]: 10_000 - 2}
    with pytest.raises(BadInput, match="no report"):
        workbench.report_page(found["old"])


# --- the server -------------------------------------------------------------------------------------------------------


def serve(*arguments: str, token: str | None = None, **more: str) -> subprocess.Popen:
    settings = ENVIRONMENT | more | ({} if token is None else {"JUPYTER_TOKEN": token})
    call = [sys.executable, str(ROOT / "eval/serve.py"), "--allow-root", *arguments]
    return subprocess.Popen(
        call, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_a_taken_port_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        process = serve("--port", str(port))
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "Traceback" not in output
    assert f"port {port}" in output and f"make notebook PORT={port + 1}" in output


def test_a_folder_that_is_not_there_is_named() -> None:
    process = serve("--port", str(free_port()), "--dir", "/no/such/folder")
    assert "/no/such/folder is not a folder" in process.communicate(timeout=60)[0] and process.returncode == 1
    process = serve("--port", "70000")
    assert "between 1 and 65535" in process.communicate(timeout=60)[0] and process.returncode == 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address: str, process: subprocess.Popen) -> None:
    for _ in range(480):
        try:
            fetch(f"{address}api")
            return
        except OSError:
            assert process.poll() is None
            time.sleep(0.25)
    raise TimeoutError(address)


def check_health(folder: Path, home: Path, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "docker/health.py"], cwd=folder, env=ENVIRONMENT | {"HOME": str(home)} | more,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_server_and_its_health(tmp_path: Path) -> None:
    """Nothing without the token, which stands nowhere for others to read; the health check knows well from ill."""
    port = free_port()
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    for name in ("models", "data", "outputs", "eval/reports"):
        (work / name).mkdir(parents=True)
    ill = check_health(work, home)
    assert ill.returncode == 1 and "no notebook server is running" in ill.stderr
    secret = "given-by-the-environment"
    server = serve("--port", str(port), token=secret, HOME=str(home))
    try:
        address = f"http://127.0.0.1:{port}/"
        wait_for(address, server)
        page = "api/contents/eval/workbench.ipynb?content=0"
        assert fetch(address + page) == 403 and fetch(f"{address}{page}&token=") == 403
        assert fetch(f"{address}{page}&token={secret}") == 200
        for path in ("lab", "voila/render/eval/workbench.ipynb", "files/README.md", "voila/files/README.md", "api/kernels",
                     "api/terminals", "api/contents", "nbconvert/html/eval/workbench.ipynb", "lsp/status"):  # fmt: skip
            try:
                answer = urllib.request.urlopen(address + path, timeout=60)
                assert "/login" in answer.url, path
            except urllib.error.HTTPError as error:
                assert error.code in (403, 404), path
        answer = urllib.request.urlopen(f"{address}files/README.md?token={secret}", timeout=60)
        assert answer.read() == (ROOT / "README.md").read_bytes()
        answer = urllib.request.urlopen(f"{address}lab?token={secret}", timeout=60)
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert secret not in Path(f"/proc/{server.pid}/cmdline").read_text()
        with socket.socket() as other, pytest.raises(OSError):
            other.connect(("127.0.0.2", port))  # another address of this machine

        assert check_health(work, home).returncode == 0
        (work / "outputs").rmdir()
        ill = check_health(work, home)
        assert ill.returncode == 1 and f"{work / 'outputs'} cannot be written to" in ill.stderr
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # and leaves its note in HOME, as a crash does
    assert server.stdout
    output = server.stdout.read()
    assert secret not in output and f"http://localhost:{port}/  (token: JUPYTER_TOKEN)" in output
    (work / "outputs").mkdir()
    ill = check_health(work, home)
    assert ill.returncode == 1 and ill.stderr.count("\n") == 1


def test_a_server_that_asks_nobody_is_ill(tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "work"
    for name in ("models", "data", "outputs", "eval/reports"):
        (folder / name).mkdir(parents=True)
    call = [sys.executable, "-m", "jupyter", "server", "--allow-root", f"--port={port}", "--IdentityProvider.token="]
    for root, complaint in ((ROOT, "served without a token"), (tmp_path, "is not served: status 404")):
        home = tmp_path / f"home{len(complaint)}"
        home.mkdir()
        server = subprocess.Popen(
            [*call, f"--ServerApp.root_dir={root}"], env=ENVIRONMENT | {"HOME": str(home)}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_for(f"http://127.0.0.1:{port}/", server)
            ill = check_health(folder, home)
            assert ill.returncode == 1 and complaint in ill.stderr
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("echo 'GPU 0: NVIDIA'", None),
        ("echo 'Failed to initialize NVML: Unknown Error'; exit 255", "does not answer .Failed to initialize NVML"),
        ("echo 'GPU 0: NVIDIA'; echo 'Unable to determine the device handle' >&2; exit 15", "Unable to determine"),
        ("echo 'No devices found.'", "does not answer .No devices found"),
        (None, "without nvidia-smi"),
    ],
)
def test_a_gpu_that_is_lost_is_ill(
    answer: str | None, complaint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "CARD", tmp_path / "nvidiactl")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    health.check_card()  # none was given
    (tmp_path / "nvidiactl").touch()
    if answer:
        (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\n[ "$1" = -L ] || exit 9\n{answer}\n')
        (tmp_path / "nvidia-smi").chmod(0o755)
    if complaint is None:
        health.check_card()
    else:
        with pytest.raises(BadInput, match=complaint):
            health.check_card()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is asked")
def test_root_is_asked() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "eval/serve.py"], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "--allow-root" in done.stderr


# --- the notebook -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("where", ["empty", "trained"])
def test_the_notebook_runs_from_top_to_bottom(where: str, trained: Path, tmp_path: Path) -> None:
    working = trained if where == "trained" else tmp_path
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    last = "assert ready.wait(240)\nrefresh_stages()\nprint(numbers.value, said.value, page.value, [len(c.options) for c in choices], len(chart.value))"
    notebook.cells.append(nbformat.v4.new_code_cell(last))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute(env=ENVIRONMENT | {"WORKBENCH_DIR": str(working)})
    text = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    if where == "empty":
        assert "No stage has been trained here yet" in text and "No model here yet" in text and "[0, 1] 0" in text
        assert "No report yet" in text or list((ROOT / "eval/reports").glob("*.json"))
    else:
        assert "trained, gate passed" in text and "[3, 4]" in text
        assert "No stage" not in text


# --- the browser ------------------------------------------------------------------------------------------------------


@pytest.fixture
def browsers() -> Iterator[Callable[[], Any]]:
    """Each call opens another browser, with nothing of the others' cookies."""
    driver = shutil.which("chromedriver")
    if not driver or not shutil.which("chromium"):
        message = "needs Debian's packages chromium and chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    # Nothing but this machine can be reached: the page has to do without.
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1900",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",
    ):  # fmt: skip
        options.add_argument(argument)
    opened: list[Any] = []

    def start() -> Any:
        opened.append(webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)))
        return opened[-1]

    yield start
    for chrome in opened:
        chrome.quit()


def fetch(address: str) -> int:
    try:
        return urllib.request.urlopen(address, timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_the_page_in_a_browser(browsers: Callable[[], Any], folder: Path, continued: Path) -> None:
    """On port 8000: refused without the token; with it, a growing curve, two streams, a kept sample on the disk, the
    novel as it grows; a second browser beside the first, and a stage that is removed under both."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    browser = browsers()
    began = time.monotonic()
    server = serve("--port", "8000", "--dir", str(folder), token="")  # an empty token is none: one is made
    writing = threading.Event()
    try:
        assert server.stdout
        line = server.stdout.readline()
        found = re.search(r"(http://localhost:8000/)\?token=(\S+)", line)
        assert found, line
        address, token = found.groups()
        assert len(token) >= 32
        wait_for(address, server)
        assert fetch(address + "api/contents/eval/workbench.ipynb") == 403
        assert fetch(address + "api/kernels?token=wrong") == 403
        browser.get(address)
        assert "login" in browser.current_url and "Watch" not in browser.page_source

        browser.get(f"{address}?token={token}")
        # The page may draw an element anew between the moment it is found and the moment it is read.
        wait = WebDriverWait(browser, 180, ignored_exceptions=[StaleElementReferenceException])
        wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, "table.runs"))
        print(f"first page {time.monotonic() - began:.1f} s after the start")
        assert "Folder" in browser.page_source and browser.find_element(By.ID, "Watch")

        def train() -> None:
            with SummaryWriter(str(folder / "outputs/2c/runs/x")) as writer:
                step = 0
                while not writing.wait(0.3):
                    step += 1
                    log_step(writer, step, 2 + 2 * math.exp(-step / 100), steps=1000)

        threading.Thread(target=train, daemon=True).start()
        steps = "return [...document.querySelectorAll('table.runs tr')].map(r => r.innerText).filter(t => t.startsWith('2c')).map(t => parseInt(t.split('\\t')[2]))[0] || 0"
        curve = "return Math.max(0, ...[...document.querySelectorAll('.chart path[style*=\"#009e73\"]')].map(p => p.getAttribute('d').split('L').length))"
        wait.until(lambda page: page.execute_script(steps) > 2 and page.execute_script(curve) > 2)
        before = browser.execute_script(steps), browser.execute_script(curve)
        wait.until(
            lambda page: page.execute_script(steps) > before[0] + 5 and page.execute_script(curve) > before[1] + 5
        )

        def said(page: Any) -> str:
            return page.find_element(By.CSS_SELECTOR, ".try-said").text

        def choices(page: Any) -> list[Any]:
            selects = [Select(element) for element in page.find_elements(By.CSS_SELECTOR, "select")]
            return [one for one in selects if "base" in [option.text for option in one.options]]

        wait.until(lambda page: "Ready" in said(page))
        assert torch.cuda.is_available() or "CPU, no GPU here" in said(browser)
        left, right = choices(browser)
        left.select_by_visible_text("2a")
        right.select_by_visible_text("2b (no verdict: half trained?)")
        browser.execute_script(
            "window.seen = [[], []]; [0, 1].forEach(i => new MutationObserver(() => window.seen[i].push("
            "document.querySelector('.try-pane-' + i).innerText.length)).observe("
            "document.querySelector('.try-pane-' + i), {childList: true, subtree: true, characterData: true}))"
        )
        browser.find_element(By.CSS_SELECTOR, ".try-go").click()
        wait.until(lambda page: "Written" in said(page))
        for lengths in browser.execute_script("return window.seen"):
            assert len(set(lengths)) >= 4, lengths  # it grew piece by piece
            assert lengths[-1] > 60
        texts = [browser.find_element(By.CSS_SELECTOR, f".try-pane-{place}").text for place in range(2)]
        assert texts[0] != texts[1] and all(text.startswith("K. ouvrit la porte.") for text in texts)

        browser.find_element(By.CSS_SELECTOR, ".try-keep-1").click()
        wait.until(lambda page: "Kept in" in said(page))
        sample = json.loads((folder / "outputs/kept.jsonl").read_text())
        assert sample["stage"] == "2b" and sample["seed"] == 42 and sample["temperature"] == 0.8
        assert (sample["prompt"] + sample["text"]).split() == texts[1].split()

        def picture(name: str) -> None:
            SCREENSHOTS.mkdir(exist_ok=True)
            height = browser.execute_script(
                "return Math.max(...[...document.querySelectorAll('*')].map(e => e.scrollHeight))"
            )
            size = {"width": 1280, "height": height + 20, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            time.sleep(0.5)  # laid out anew
            browser.save_screenshot(str(SCREENSHOTS / f"{name}.png"))

        # The novel goes on elsewhere while the page is open.
        assert "goes on from words given" not in browser.find_element(By.CSS_SELECTOR, ".continued").text
        shutil.copytree(continued, folder / "outputs/continuation")
        text = wait.until(
            lambda page: (
                "goes on from words given" in (text := page.find_element(By.CSS_SELECTOR, ".continued").text) and text
            )
        )
        novel = next(continued.glob("*.txt")).read_text().split()
        assert text.split()[-len(novel) :] == novel
        picture("workbench")

        # A second browser beside the first: both write at once, and what one keeps the other shows.
        second = browsers()
        second.get(f"{address}?token={token}")
        second_wait = WebDriverWait(second, 180, ignored_exceptions=[StaleElementReferenceException])
        second_wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, "table.runs"))
        second_wait.until(lambda page: "Ready" in said(page))
        for page in (browser, second):
            for choice, name in zip(choices(page), ("base", "nobody"), strict=True):
                choice.select_by_visible_text(name)
        for page in (browser, second):
            page.find_element(By.CSS_SELECTOR, ".try-go").click()
        for waits in (wait, second_wait):
            waits.until(lambda page: "is writing" in said(page) or "Written" in said(page))
            waits.until(lambda page: "Written" in said(page))
        texts = [page.find_element(By.CSS_SELECTOR, ".try-pane-0").text for page in (browser, second)]
        assert texts[0] == texts[1] and len(texts[0]) > 60
        second.find_element(By.CSS_SELECTOR, ".try-keep-0").click()
        wait.until(lambda page: "base, seed 42" in page.page_source)

        # Reports.
        title = next(
            one
            for one in browser.find_elements(
                By.CSS_SELECTOR, ".jupyter-widget-Collapse-header, .lm-Collapse-header, .p-Collapse-header"
            )
            if "The report" in one.text
        )
        title.click()
        frame = wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "iframe.report"))
        assert "bits per byte" in (frame.get_attribute("srcdoc") or "").lower() and frame.size["height"] > 500
        picture("report")

        # A stage removed while both pages are open.
        shutil.rmtree(folder / "outputs/2a")
        for page, waits in ((browser, wait), (second, second_wait)):
            waits.until(
                lambda page: not [one for one in choices(page) if "2a" in [option.text for option in one.options]]
            )
            page.find_element(By.CSS_SELECTOR, ".try-go").click()
            waits.until(lambda page: "Written" in said(page))
        loaded = [
            entry["message"] for entry in browser.get_log("browser") if "ERR_NAME_NOT_RESOLVED" in entry["message"]
        ]
        assert not loaded  # nothing was even asked of another host
    finally:
        writing.set()
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
