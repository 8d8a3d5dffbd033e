"""Groups of users without a home, on folders that cannot be written to, or that others use: they start all the same."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from parallel_backend.paths import AGENT_LOG, KEPT_LOGS, new_log_folder
from parallel_backend.planning.devices import Devices
from parallel_backend.runtime.client.launcher import Launcher

from .clients import ANOTHER_USER, ROOT, as_another_user, start_ranks

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def open_folder(tmp_path_factory) -> Path:
    """A folder for temporary files that any user can write to, removed in the end, on a short path."""
    folder = Path(tempfile.mkdtemp(prefix="homes-", dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.thorough
def test_without_a_home(open_folder):
    found = start_ranks(environment={"HOME": "/proc", "HYBRID_DIT_HOME": None, "TMPDIR": str(open_folder)})
    assert "error" not in found
    assert Path(found["logs"]).parent == open_folder / f"hybrid-dit-{os.geteuid()}" / "logs"


@pytest.mark.parametrize(
    "home", [None, *(pytest.param(home, marks=pytest.mark.thorough) for home in ("/", "of another owner"))]
)
def test_another_user_than_root(home, open_folder, tmp_path):
    """A user without a name or a home, as in containers, on an install that it can only read."""
    prefix = as_another_user()
    if home == "of another owner":
        (tmp_path / ".cache" / "hybrid-dit" / "logs").mkdir(parents=True)
        home = str(tmp_path)
    environment = {"HOME": home, "HYBRID_DIT_HOME": None, "TMPDIR": str(open_folder), "USER": None, "LOGNAME": None}
    found = start_ranks(2, environment=environment, prefix=prefix, folder=Path("/"))
    assert "error" not in found
    assert len(found["ranks"]) == 2
    assert (open_folder / f"hybrid-dit-{ANOTHER_USER}").stat().st_uid == ANOTHER_USER
    assert Path(found["logs"]).parent == open_folder / f"hybrid-dit-{ANOTHER_USER}" / "logs"


def test_a_home_that_cannot_be_used_is_an_error_with_a_remedy():
    found = start_ranks(environment={"HYBRID_DIT_HOME": "/proc/none"})
    assert found["error"].startswith("ValueError: the folder '/proc/none' of HYBRID_DIT_HOME cannot be used")


@pytest.mark.thorough
def test_a_temporary_folder_with_letters_of_many_bytes(open_folder):
    deep = open_folder / ("画" * 40)
    deep.mkdir()
    found = start_ranks(environment={"TMPDIR": str(deep)})
    assert "error" not in found
    assert not list(deep.glob("hybrid-dit-*"))


def test_another_comfyui_leaves_the_logs_of_a_running_group(own_home):
    running = Launcher(1, Devices("cpu"))
    running.start()
    try:
        # The agent has the log open, and no one else: what this process had was closed.
        for _ in range(KEPT_LOGS + 2):
            (new_log_folder() / AGENT_LOG).touch()
        assert (running.logs / AGENT_LOG).exists()
    finally:
        running.stop(0.1)


@pytest.mark.thorough
def test_a_home_that_other_programs_use(tmp_path):
    (tmp_path / "logs" / "0-experiment").mkdir(parents=True)
    tmp_path.joinpath("logs").chmod(0o755)
    for day in range(KEPT_LOGS + 2):
        (tmp_path / "logs" / f"run-{day}").mkdir()
    found = start_ranks(environment={"HYBRID_DIT_HOME": str(tmp_path)})
    assert "error" not in found
    assert (tmp_path / "logs" / "0-experiment").exists()
    assert len(list((tmp_path / "logs").glob("run-*"))) == KEPT_LOGS + 2
    assert stat.S_IMODE((tmp_path / "logs").stat().st_mode) == 0o755


@pytest.mark.thorough
def test_umask(tmp_path):
    found = start_ranks(environment={"HYBRID_DIT_HOME": str(tmp_path / "new" / "home")}, umask=0)
    folders = [tmp_path / "new", tmp_path / "new" / "home", Path(found["logs"])]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    files = [file for file in Path(found["logs"]).rglob("*") if file.is_file()]
    assert files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def copied(folder: Path) -> Path:
    """The package, in a folder; the file that a rank is says where it is when it is imported."""
    skipped = shutil.ignore_patterns("__pycache__")
    package = shutil.copytree(ROOT / "parallel_backend", folder / "parallel_backend", ignore=skipped)
    with (package / "runtime" / "rank" / "worker.py").open("a") as file:
        file.write("\nprint('a rank is', ascii(__file__))\n")
    return folder


def test_a_pack_in_a_folder_of_any_name(tmp_path):
    pack = copied(tmp_path / "my nodes" / "a:b 画 é")
    code = f"import sys; sys.path[:0] = [{str(pack)!r}, {str(ROOT)!r}]"
    found = start_ranks(code=code)
    assert "error" not in found
    worker = pack / "parallel_backend" / "runtime" / "rank" / "worker.py"
    assert f"a rank is {str(worker)!a}" in (Path(found["logs"]) / AGENT_LOG).read_text()


@pytest.mark.thorough
def test_a_locale_without_letters(tmp_path):
    """Paths have others all the same."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    home = tmp_path / "日本 é"
    found = start_ranks(environment=locale | {"HYBRID_DIT_HOME": str(home)})
    assert "error" not in found
    assert list((home / "logs").iterdir())
