"""The workbench: models that fit or do not, what it shows, its server, the notebook, and the page in a real browser."""

import errno
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from tiny_curriculum import call_main, log_step, save_adapter, save_base
from transformers import AutoTokenizer

from docker import health
from eval import continuation, llamacpp, workbench
from eval.serve import ask
from prep.common import ROOT, BadInput, write_text
from train.stages import load_chain

NOTEBOOK = ROOT / "eval/workbench.ipynb"
SCREENSHOTS = ROOT / "tests/screenshots"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as a small training leaves it: base, 2a, 2b on it, their logs; nothing of 2c."""
    cwd = tmp_path_factory.mktemp("trained")
    save_base(cwd / "models/base", hidden=256, layers=8)
    full = save_base(cwd / "outputs/2a", hidden=256, layers=8, seed=1)
    save_adapter(full, cwd / "outputs/2b", "outputs/2a", seed=2)
    AutoTokenizer.from_pretrained(full).save_pretrained(cwd / "outputs/2b")
    for name in ("2a", "2b"):
        for step in range(1, 11):
            log_step(cwd / "outputs" / name, step, loss=4 - step / 10, learning_rate=1e-4, tokens=step * 2048)
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


def test_the_folder_that_logged_last_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORKBENCH_DIR", raising=False)
    monkeypatch.setattr(workbench, "ROOT", tmp_path)
    assert workbench.places() == [tmp_path]
    for second, place in enumerate((tmp_path / "demo/run", tmp_path)):
        logged = place / "outputs/2a/log.jsonl"
        logged.parent.mkdir(parents=True)
        logged.touch()
        os.utime(logged, (second, second + 1))
        assert workbench.places()[0] == place
    monkeypatch.setenv("WORKBENCH_DIR", "/elsewhere")
    assert workbench.places() == [Path("/elsewhere")]


def test_two_models_or_one_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbench, "CGROUP", folder)  # no limit: no such file, or the word `max` in it
    models = workbench.Models("cpu")
    said: list[str] = []
    models.get("2a", said.append)
    (folder / "memory.max").write_text("max\n")
    models.get("2b", said.append)
    assert list(models.held) == ["2a", "2b"] and not any("one model at a time" in text for text in said)
    read = len(said)
    models.get("2a", said.append)
    assert len(said) == read  # not read again
    size = workbench.elements(folder / "outputs/2a/model.safetensors") * 4
    limit_memory(folder, round(size * 0.5), monkeypatch)
    assert workbench.Models("cuda").free(gguf=True) == round(size * 0.5)  # llama.cpp's are not on the card
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
    assert workbench.stages() == {"base": "base", "2a": "2a", "2b (no verdict: half trained?)": "2b"}
    models = workbench.Models("cpu")
    first, _ = models.get("2a", print)
    path = folder / "outputs/2a/model.safetensors"
    path.write_bytes((folder / "models/base/model.safetensors").read_bytes())
    second, _ = models.get("2a", print)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    on_it, _ = models.get("2b", print)
    os.utime(path, (1000, 1000))
    assert models.get("2b", print)[0] is not on_it  # what it builds on is another
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInput, match="is it being written"):
        models.get("2a", print)
    shutil.rmtree(folder / "outputs/2a")
    assert list(workbench.stages()) == ["base"]  # 2b is an adapter of 2a
    with pytest.raises(BadInput, match="stage 2a is missing"):
        models.get("2a", print)


def test_a_stream_is_the_report_s_text_and_stops(folder: Path) -> None:
    """The evaluation loads an adapter on 4-bit weights, not on those they were made from."""
    from eval import generation, models

    model, tokenizer = workbench.Models("cpu").get("2b", print)
    prompt, parameters, stop = "K. ouvrit la porte.", generation.decoding(40), threading.Event()
    shown: list[str] = []

    def stream(prompt: str) -> str:
        return workbench.stream(model, tokenizer, prompt, 7, parameters, shown.append, stop)

    text = stream(prompt)
    assert len(shown) > 3 and all(b.startswith(a) for a, b in pairwise(shown))
    rows = models.present(models.candidates(load_chain(ROOT / "recipes")), ["2b"])
    _, measured, _ = next(models.loaded(rows, "cpu", torch.float32))
    sample = generation.continuations(measured, tokenizer, prompt, 1, 7, parameters)[0]["text"]
    assert text == sample and len(text) > 20
    for bad in ("", " " * 5, "mot " * 3000):
        with pytest.raises(BadInput):
            stream(bad)
    stop.set()
    assert len(stream(prompt)) < len(text)


# --- what is shown ----------------------------------------------------------------------------------------------------

SAMPLE = {"stage": "2b", "seed": 1, "temperature": 0.8, "prompt": "K. ", "text": "dit."}


def test_two_pages_keep_at_once(tmp_path: Path) -> None:
    path = tmp_path / "outputs/kept.jsonl"
    code = "from eval.workbench import keep\nfrom pathlib import Path\n"
    code += f"for n in range(200): keep(Path({str(path)!r}), {{'text': 'é' * 3000, 'n': n}})"
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert sorted(json.loads(line)["n"] for line in path.read_text().splitlines()) == sorted([*range(200)] * 2)


def test_kept_samples_are_shown_and_damaged_lines_counted(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    assert "Nothing kept yet" in workbench.kept(path)
    path.write_bytes(b'{}\n[1]\n{"stage": "2b", "text": "ha\xff\n')
    workbench.keep(path, SAMPLE)
    workbench.keep(path, SAMPLE | {"text": "<b>plus tard</b>"})
    page = workbench.kept(path)
    assert "damaged and skipped: 3." in page
    assert page.index("K. &lt;b&gt;plus tard") < page.index("K. dit.")  # newest first


def test_a_full_disk_loses_nothing_kept_and_says_so(tmp_path: Path) -> None:
    """A file size limit stops a write in its middle, as a full disk does."""
    path = tmp_path / "kept.jsonl"
    workbench.keep(path, SAMPLE)
    before = path.read_bytes()
    code = (
        "import json, resource, signal, sys\nfrom pathlib import Path\nfrom eval.workbench import keep\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before)} + 20,) * 2)\n"
        f"keep(Path({str(path)!r}), {SAMPLE!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and f"[Errno {errno.ENOSPC}]" in done.stderr
    assert path.read_bytes() == before
    workbench.keep(path, SAMPLE)
    assert workbench.kept(path).count("K. dit.") == 2 and "damaged" not in workbench.kept(path)


def test_the_latest_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert workbench.continued() == {}
    record = {
        "stage": "2a", "beginning": {"source": "words given"}, "settings": {"seed": 42}, "words": 1600, "chunks_with_faults": 0,
        "chunks": [{"chosen": {"text": "\n\n".join(f"Le mot <b> {n}." for n in range(1, 401))}}],
    }  # fmt: skip
    path, other = (workbench.CONTINUED / f"{name}.json" for name in ("2a-42-0", "2c-1-0"))
    write_text(path, json.dumps(record))
    page = workbench.latest_pages(path)
    assert "2a continues words given, seed 42: 1,600 words in 1 steps, 0 with a fault" in page
    assert "&lt;b&gt; 400." in page and "&lt;b&gt; 176." in page and " 175." not in page and "<b>" not in page
    assert "its last 900 words" in page
    for content in (json.dumps(record)[:500], "{}"):
        write_text(other, content)
        os.utime(other, (path.stat().st_mtime + 5,) * 2)
        assert list(workbench.continued()) == ["2c-1-0", "2a-42-0"]  # newest first
        with pytest.raises(BadInput, match="is damaged"):
            workbench.latest_pages(other)


def test_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newest first; the working directory's hide the repository's; their scripts do not run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workbench, "ROOT", tmp_path / "repository")
    assert workbench.reports() == {}
    pages = ("repository/eval/reports/old.html", "repository/eval/reports/demo.html", "eval/reports/demo.html")
    for age, path in enumerate(pages):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f'<p class="x">{path}</p>')
        os.utime(path, (10_000 - age, 10_000 - age))
    found = workbench.reports()
    assert list(found) == ["old", "demo"] and found["demo"] == tmp_path / "eval/reports/demo.html"
    frame = workbench.report_page(found["demo"])
    assert frame.startswith("<iframe sandbox ") and frame.count('"') == 4 and "&gt;eval/reports/demo.html" in frame
    found["old"].unlink()
    assert list(workbench.newest_first(found.values())) == [found["demo"]]


# --- the server -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(*arguments: str, **more: str) -> subprocess.Popen:
    call = [sys.executable, str(ROOT / "eval/serve.py"), "--allow-root", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(call, env=os.environ | more, start_new_session=True, **pipes)


@contextmanager
def served(*arguments: str, **more: str) -> Iterator[tuple[str, str]]:
    """A workbench that runs: its address, and the line it printed."""
    server = serve(*arguments, **more)
    assert server.stdout
    try:
        line = next(line for line in server.stdout if line.startswith("workbench: "))
        yield line.split()[1].partition("?")[0], line
    finally:
        server.terminate()
        assert server.wait(60) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is refused")
def test_root_is_refused() -> None:
    call = [sys.executable, str(ROOT / "eval/serve.py"), "--port", str(free_port())]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "--allow-root" in done.stderr


def check_health(folder: Path, home: Path) -> subprocess.CompletedProcess:
    call = [sys.executable, str(ROOT / "docker/health.py")]
    return subprocess.run(call, cwd=folder, env=os.environ | {"HOME": str(home)}, capture_output=True, text=True)


def test_the_server_reads_no_settings_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that switch the token off and move the address, everywhere Jupyter looks for them, change nothing; the
    token is nowhere for others to read; the container's health check knows well from ill."""
    home, work, port, secret = tmp_path / "home", tmp_path / "work", free_port(), "given-by-the-environment"
    for folder in (home / ".jupyter", home / ".local/etc/jupyter", work):
        folder.mkdir(parents=True)
        settings = "c.ServerApp.token = ''\nc.IdentityProvider.token = ''\nc.ServerApp.password = ''\nc.ServerApp.base_url = '/other/'\n"
        (folder / "jupyter_server_config.py").write_text(settings + "c.ServerApp.allow_unauthenticated_access = True\n")
    for name in ("models", "data", "outputs", "eval/reports"):
        (work / name).mkdir(parents=True)
    monkeypatch.chdir(work)
    ill = check_health(work, home)
    assert ill.returncode == 1 and "no notebook server is running" in ill.stderr
    own = {"JUPYTER_CONFIG_DIR": str(home / ".jupyter"), "JUPYTER_CONFIG_PATH": str(work)}
    with served("--port", str(port), JUPYTER_TOKEN=secret, HOME=str(home), **own) as (_, line):
        assert line.strip() == f"workbench: http://localhost:{port}/  (token: JUPYTER_TOKEN)"
        for path in ("lab", "voila/render/eval/workbench.ipynb", "files/README.md", "voila/files/README.md", "api/kernels",
                     "api/terminals", "api/contents", "nbconvert/html/eval/workbench.ipynb", "lsp/status",
                     "api/contents?token=", "api/contents?token=wrong"):  # fmt: skip
            assert ask("127.0.0.1", port, f"/{path}")[0] in (302, 403, 404), path  # 302: to the login page
        assert ask("127.0.0.1", port, f"/files/README.md?token={secret}")[0] == 200
        running = subprocess.run(["pgrep", "-fa", str(port)], capture_output=True, text=True).stdout
        assert "jupyterlab" in running and secret not in running
        with socket.socket() as other, pytest.raises(OSError):
            other.connect(("127.0.0.2", port))  # another address of this machine
        assert check_health(work, home).returncode == 0
        (work / "outputs").rmdir()
        ill = check_health(work, home)
        assert ill.returncode == 1 and f"{work / 'outputs'} cannot be written to" in ill.stderr


def test_a_server_that_asks_for_no_token_is_stopped(tmp_path: Path) -> None:
    """Whatever made it so; here another module is run in JupyterLab's place."""
    (tmp_path / "jupyterlab.py").write_text(
        "import http.server, sys\n"
        "port = next(text.partition('=')[2] for text in sys.argv if text.startswith('--ServerApp.port='))\n"
        "http.server.test(http.server.SimpleHTTPRequestHandler, port=int(port), bind='127.0.0.1')\n"
    )
    process = serve("--port", str(free_port()), PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "workbench:" not in output
    assert "the server was stopped: without the token it answers /lab with status 404" in output


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("echo 'GPU 0: NVIDIA'; echo 'Unable to determine the device handle' >&2; exit 15", "Unable to determine"),
        ("echo 'No devices found.'", "does not answer .No devices found"),
        (None, "without nvidia-smi"),
    ],
)
def test_a_gpu_that_is_lost_is_ill(
    answer: str | None, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, command = tmp_path / "nvidiactl", tmp_path / "nvidia-smi"
    monkeypatch.setattr(health, "CARD", card)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    health.check_card()  # none was given
    card.touch()
    command.write_text("#!/bin/sh\n[ \"$1\" = -L ] && echo 'GPU 0: NVIDIA'\n")
    command.chmod(0o755)
    health.check_card()
    if answer:
        command.write_text(f"#!/bin/sh\n{answer}\n")
    else:
        command.unlink()
    with pytest.raises(BadInput, match=complaint):
        health.check_card()


# --- the notebook -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_where_nothing_is_trained(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    last = "assert ready.wait(240)\nwatch()\nread()\nprint(numbers.value, said.value, page.value, [len(c.options) for c in choices], len(chart.value))"
    notebook.cells.append(nbformat.v4.new_code_cell(last))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute(env=os.environ | {"WORKBENCH_DIR": str(tmp_path)})
    text = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "No stage has been trained here yet" in text and "No model here yet" in text and "[0, 1] 0" in text


# --- the browser ------------------------------------------------------------------------------------------------------

CONTINUE = "--stage 2a --from Klamm --words 40 --candidates 2 --chunk-tokens 24 --device cpu"


@pytest.mark.slow
def test_the_page_in_a_browser(folder: Path, open_browser: Callable[[], Any]) -> None:
    """Refused without the token; with it, a growing curve, two streams, a kept sample on the disk, the novel as it grows;
    a second browser beside the first, an exported GGUF, and a stage that is removed under both."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    def find(page: Any, selector: str) -> Any:
        return page.find_element(By.CSS_SELECTOR, selector)

    def until(page: Any, condition: Callable[[Any], Any]) -> Any:
        # The page may redraw an element between the moment it is found and the moment it is read.
        return WebDriverWait(page, 120, ignored_exceptions=[StaleElementReferenceException]).until(condition)

    def said(page: Any) -> str:
        return find(page, ".try-said").text

    def choices(page: Any) -> list[Any]:
        selects = [Select(element) for element in page.find_elements(By.CSS_SELECTOR, "select")]
        return [one for one in selects if "base" in [option.text for option in one.options]]

    def write(page: Any, *names: str) -> None:
        for choice, name in zip(choices(page), names, strict=True):
            choice.select_by_visible_text(name)
        find(page, ".try-go").click()

    exported = shutil.copytree(folder / "outputs/2a", folder / "outputs/export/tiny")
    llamacpp.convert(exported, exported / "tiny-F16.gguf")
    ended = threading.Event()

    def train() -> None:
        step = 0
        while not ended.wait(0.3):
            step += 1
            values = {"loss": 2 + 2 * math.exp(-step / 100), "learning_rate": 1e-4, "tokens": step * 2048}
            log_step(folder / "outputs/2c", step, steps=1000, **values)

    with ExitStack() as opened:
        browser, second = open_browser(), open_browser()
        write_text(folder / "eval/reports/x.reading.html", "made from x.json")
        shutil.copy(ROOT / "eval/reports/demo.json", folder / "eval/reports/x.json")  # which has a blind reading
        os.utime(folder / "eval/reports/x.reading.html", (1, 1))  # the newest is shown first
        address, line = opened.enter_context(served("--port", str(free_port()), "--dir", str(folder), JUPYTER_TOKEN=""))
        opened.callback(ended.set)
        token = line.strip().partition("?token=")[2]
        assert len(token) >= 32  # an empty token is none: one is made
        browser.get(address)
        assert "login" in browser.current_url and "Watch" not in browser.page_source

        browser.get(f"{address}?token={token}")
        assert "trained, gate passed" in until(browser, lambda page: find(page, ".runs table").text)
        threading.Thread(target=train, daemon=True).start()
        rows = "return [...document.querySelectorAll('.runs tr')].map(r => r.innerText.split('\\t'))"

        def steps(page: Any) -> int:
            return next((int(cells[2].split()[0]) for cells in page.execute_script(rows) if cells[0] == "2c"), 0)

        def points(page: Any) -> int:
            longest = "return Math.max(0, ...[...document.querySelectorAll('.chart path[style*=\"#009e73\"]')].map(p => p.getAttribute('d').split('L').length))"
            return page.execute_script(longest)

        before = until(browser, lambda page: steps(page) > 2 and points(page) > 2 and (steps(page), points(page)))
        until(browser, lambda page: steps(page) > before[0] + 5 and points(page) > before[1] + 5)

        until(browser, lambda page: "Ready" in said(page))
        browser.execute_script(
            "window.seen = [[], []]; [0, 1].forEach(i => new MutationObserver(() => window.seen[i].push("
            "document.querySelector('.try-pane-' + i).innerText.length)).observe("
            "document.querySelector('.try-pane-' + i), {childList: true, subtree: true, characterData: true}))"
        )
        write(browser, "2a", "2b (no verdict: half trained?)")
        until(browser, lambda page: "Written" in said(page))
        for lengths in browser.execute_script("return window.seen"):
            assert len(set(lengths)) >= 4 and lengths[-1] > 60, lengths  # it grew
        texts = [find(browser, f".try-pane-{place}").text for place in range(2)]
        assert texts[0] != texts[1] and all(text.startswith("K. ouvrit la porte.") for text in texts)
        find(browser, ".try-keep-1").click()
        until(browser, lambda page: "Kept in" in said(page))
        sample = json.loads((folder / "outputs/kept.jsonl").read_text())
        assert (sample["stage"], sample["seed"], sample["temperature"]) == ("2b", 42, 0.8)
        assert (sample["prompt"] + sample["text"]).split() == texts[1].split()

        # The novel is continued elsewhere while the page is open.
        assert "has not been continued" in find(browser, ".continued").text
        call_main(continuation, "--recipes", ROOT / "recipes", *CONTINUE.split())
        novel = next(workbench.CONTINUED.glob("*.txt")).read_text().split()
        until(browser, lambda page: find(page, ".continued").text.split()[-len(novel) :] == novel)
        shown = find(browser, ".continued").text
        assert f"2a continues words given, seed 42: {len(novel)} words" in shown and "its last" not in shown
        tallest = "return Math.max(...[...document.querySelectorAll('*')].map(e => e.scrollHeight))"
        size = {"width": 1280, "height": browser.execute_script(tallest) + 20, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        time.sleep(0.5)  # laid out again
        SCREENSHOTS.mkdir(exist_ok=True)
        browser.save_screenshot(str(SCREENSHOTS / "workbench.png"))

        # A second browser beside the first: both write at once, and what one keeps the other shows.
        second.get(f"{address}?token={token}")
        until(second, lambda page: page.find_elements(By.CSS_SELECTOR, ".try-said") and "Ready" in said(page))
        for page in (browser, second):
            write(page, "base", "tiny-F16.gguf")
        for page in (browser, second):
            until(page, lambda page: "Written" in said(page) and len(find(page, ".try-pane-1").text) > 60)
        for pane in (".try-pane-0", ".try-pane-1"):
            assert find(browser, pane).text == find(second, pane).text
        find(second, ".try-keep-0").click()
        until(browser, lambda page: "base, seed 42" in page.page_source)

        # Two readers at once; what is answered is on the disk though the browsers end.
        for page in (browser, second):
            headers = page.find_elements(By.CSS_SELECTOR, ".jupyter-widget-Collapse-header, .lm-Collapse-header")
            next(one for one in headers if "Reports" in one.text).click()
            frame = until(page, lambda page: (f := find(page, "iframe.report")).size["height"] > 500 and f)
            assert "bits per byte" in (frame.get_attribute("srcdoc") or "").lower()
            selects = page.find_elements(By.CSS_SELECTOR, "select")
            Select(next(one for one in selects if "x.reading" in one.text)).select_by_visible_text("x.reading")
            frame = until(page, lambda page: (f := find(page, "iframe.report")).get_attribute("sandbox") is None and f)
            page.switch_to.frame(frame)
            until(page, lambda page: find(page, "#name")).send_keys("anne" if page is browser else "bert", Keys.ENTER)
            page.switch_to.active_element.send_keys("1", "2", "2", "1")
            page.switch_to.default_content()
        files = [folder / f"eval/reports/x.answers.{name}.jsonl" for name in ("anne", "bert")]
        until(browser, lambda page: all(path.is_file() and path.read_text().count("\n") == 2 for path in files))
        for path in files:
            assert [json.loads(line)["choice"] for line in path.read_text().splitlines()] == [0, 1]

        shutil.rmtree(folder / "outputs/2a")  # a stage is removed while both pages are open
        for page in (browser, second):
            until(page, lambda page: "2a" not in "".join(o.text for one in choices(page) for o in one.options))
            find(page, ".try-go").click()
            until(page, lambda page: "Written" in said(page))
        messages = [entry["message"] for entry in browser.get_log("browser")]
        assert not [text for text in messages if "ERR_NAME_NOT_RESOLVED" in text]  # nothing was asked of another host
