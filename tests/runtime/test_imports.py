"""Workers import what their client would: with its interpreter's settings, and nothing from where it was started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel_backend.runtime import boot

from .clients import KNOWN, ROOT, start_ranks

pytestmark = pytest.mark.timeout(200)

ENDS = "import os\nos.write(2, b'imported ' + __file__.encode())\nos._exit(3)\n"
"""What no process is to import."""
ITSELF = "reveal(['tests.runtime.threaded'])"
"""A rank that is not a fork, and imports for itself."""


@pytest.fixture
def folder(tmp_path) -> Callable[..., Path]:
    """A folder with modules that end whoever imports them."""

    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / f"{name}.py").write_text(ENDS)
        return tmp_path

    return make


@pytest.mark.parametrize("call", ["reveal()", pytest.param(ITSELF, marks=pytest.mark.thorough)])
def test_nothing_is_imported_from_the_current_folder(folder, call):
    here = folder("queue", "diffusers", "safetensors", "_socket_helper")
    # Where ComfyUI's script is comes first in its path, not where it was started.
    found = start_ranks(folder=here, code=f"import sys; sys.path[0] = {str(ROOT)!r}", call=call)
    assert "error" not in found
    assert not {"", str(here)} & set(found["path"])
    assert found["forked"] is (call != ITSELF)


@pytest.mark.parametrize(
    ("setting", "call"),
    [
        ("-I", "reveal()"),
        pytest.param("-sB", "reveal()", marks=pytest.mark.thorough),
        pytest.param("-E", "reveal()", marks=pytest.mark.thorough),
        pytest.param("-I", ITSELF, marks=pytest.mark.thorough),
    ],
)
def test_settings_of_the_interpreter_are_handed_on(folder, setting, call):
    environment = {"PYTHONUSERBASE": str(folder())}
    if setting in ("-E", "-I"):
        environment["PYTHONPATH"] = str(folder("sitecustomize"))
    found = start_ranks(environment=environment, python=[sys.executable, setting], call=call)
    assert "error" not in found
    assert found["flags"] == found["client"]["flags"]
    assert any(found["flags"].values())


def test_other_settings_are_handed_on():
    python = [sys.executable, "-X", "utf8", "-X", "dev", "-W", "ignore::FutureWarning"]
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": None}
    found = start_ranks(environment=locale, python=python, call="reveal()")
    assert "error" not in found
    assert (found["flags"]["utf8_mode"], found["flags"]["dev_mode"], found["encoding"]) == (1, 1, "utf-8")
    assert found["warnings"] == found["client"]["warnings"]


@pytest.mark.thorough
def test_the_user_site_is_as_the_clients(tmp_path):
    """``-s`` keeps what the user has installed for other programs away; a venv does so in any case."""
    python = sys._base_executable
    environment = {"PYTHONUSERBASE": str(tmp_path), "PYTHONPATH": None}
    found = subprocess.run(
        [python, "-m", "site", "--user-site"], env=os.environ | {"PYTHONUSERBASE": str(tmp_path)}, capture_output=True
    )
    site = Path(found.stdout.decode().strip())
    site.mkdir(parents=True)
    (site / "usercustomize.py").write_text(ENDS)
    libraries = str(Path(__import__("torch").__file__).parents[1])
    code = f"{KNOWN}\nsys.path.append({libraries!r})"
    found = start_ranks(environment=environment, python=[python, "-s"], code=code, call="reveal()")
    assert "error" not in found
    assert str(site) not in found["path"]
    # Without -s the client has the user site, and so have its workers.
    (site / "usercustomize.py").unlink()
    found = start_ranks(environment=environment, python=[python], code=code, call="reveal()")
    assert str(site) in found["client"]["path"]
    assert str(site) in found["path"]


def test_workers_see_what_the_client_sees(tmp_path):
    """What a launcher has put on the path while it ran, in its order, but Python's and libraries that it has first."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "tokenizers_of_ours.py").write_text(f"WHERE = {folder.name!r}\n")
    for name in ("queue", "packaging"):  # a node pack's, that came when others of the name had been imported
        (first / f"{name}.py").write_text(ENDS)
    front = [str(first), str(second)]
    code = f"import queue, packaging.version, torch, transformers, diffusers\n{KNOWN}\nsys.path[:0] = {front!r}"
    found = start_ranks(code=code, call="reveal(['tokenizers_of_ours'])")
    assert "error" not in found
    order = found["path"].index
    assert order(os.path.dirname(os.__file__)) < order(str(first)) < order(str(second))
    assert [entry for entry in found["client"]["path"] if entry and entry not in found["path"]] == []


def test_an_import_path_is_written_down(monkeypatch, tmp_path):
    """Names of import hooks stay as they are; what depends on the current folder does not."""
    (tmp_path / "libraries").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "path", ["", ".", Path("/no/text"), "libraries", "__editable__.x.hook", "\udcff", *sys.path]
    )
    path = json.loads(boot.import_path())
    assert not {"", ".", "libraries"} & set(path)
    assert {str(tmp_path / "libraries"), "__editable__.x.hook", "\udcff"} <= set(path)
    assert path[-1] == str(ROOT) or str(ROOT) in sys.path
    assert len(path) == len(set(path))


def test_a_command_can_be_read_again():
    words = boot.command("a.module", ["--option", "x"])
    assert boot.split(["-u", *words]) == ("a.module", ["--option", "x"])
