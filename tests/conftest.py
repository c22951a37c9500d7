"""What several test files start from."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub
from small_tokenizers import save_gpt2_like, save_llama_like
from tiny_curriculum import save_curriculum


@pytest.fixture(scope="session")
def curriculum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, do not change it."""
    return save_curriculum(tmp_path_factory.mktemp("curriculum"))


@pytest.fixture
def place(curriculum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the curriculum to spoil, as the working directory."""
    folder = shutil.copytree(curriculum, tmp_path / "place")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def locked() -> Callable[[str | Path], AbstractContextManager[int]]:
    """`with locked(target) as pid:` another process holds prep.common.lock(target)."""
    hold = (
        "import sys, pathlib, prep.common as c; c.lock(pathlib.Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    )

    @contextmanager
    def held(target: str | Path) -> Iterator[int]:
        call = [sys.executable, "-c", hold, target]
        with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout and other.stdout.readline()
            yield other.pid
            other.kill()

    return held


@pytest.fixture
def axolotl_validates(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What Axolotl's own validation makes of a recipe on the card it is written for: 12 GB, Ampere."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    # One plugin manager serves the whole process: the plugins of one test would act in the next.
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", type(PluginManager.get_instance().plugins)())
    gpu = {"bf16": True, "tf32": True, "fp8": False, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_86"}

    def validate(config: dict[str, Any]) -> dict[str, Any]:
        cfg = DictDefault(config)
        prepare_plugins(cfg)
        return validate_config(cfg, capabilities=gpu, env_capabilities={"torch_version": "2.13.0"})

    return validate


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A stand-in of the hub, of Zenodo and of any web server."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


@pytest.fixture(scope="session")
def open_browser() -> Iterator[Callable[[], Any]]:
    """Each call opens another headless Chromium, which can reach nothing but this machine and logs what it asks for.

    Skips where there is none, but on CI, where it fails.
    """
    driver, binary = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not binary:
        message = "needs Debian's packages chromium and chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    opened: list[Any] = []

    def start() -> Any:
        opened.append(webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)))
        return opened[-1]

    yield start
    for browser in opened:
        browser.quit()


@pytest.fixture(scope="module")
def browser(open_browser: Callable[[], Any]) -> Any:
    return open_browser()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer of Llama's kind, in a folder as Transformers loads it."""
    return save_llama_like(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer of GPT-2's kind."""
    return save_gpt2_like(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Path:
    """Both kinds, one after the other."""
    return request.getfixturevalue(request.param)
