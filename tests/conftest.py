"""What several test files start from."""

import shutil
from pathlib import Path

import pytest
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
