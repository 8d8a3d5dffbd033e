"""What is too old or missing: what is said of it, and what is installed."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest

from parallel_backend.requirements import COMFYUI, REQUIRED, comfyui_problem, older, one_line, problems

ROOT = Path(__file__).resolve().parents[2]
NEW = {name: f"{least}.9" for name, least in REQUIRED.items()}


def test_bounds_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 for tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == [f"{name}>={least}" for name, least in REQUIRED.items()]
    assert project["tool"]["comfy"]["requires-comfyui"] == f">={COMFYUI}"


def test_what_fits_is_not_spoken_of():
    assert problems(NEW) == problems({**NEW, "torch": "2.10.0a0+git", "diffusers": REQUIRED["diffusers"]}) == []


def test_a_comfyui_of_spring_is_told_all_in_one_line():
    old = {"torch": "2.9.1", "transformers": "4.57.6", "safetensors": "0.6.2", "diffusers": None}
    line = one_line(problems({**NEW, **old}, python="/opt/my comfy/bin/python"))
    assert "\n" not in line
    for name, version in old.items():
        assert f"{name} {f'{version} is too old' if version else 'is not installed'} ({REQUIRED[name]} or newer" in line
    # torch by itself would leave torchvision behind.
    assert "install torch, torchvision and torchaudio of one newer release together" in line
    assert "'torch>=" not in line
    command = "'/opt/my comfy/bin/python' -m pip install 'diffusers>=0.38' 'transformers>=5.0' 'safetensors>=0.8'"
    assert line.count("pip install") == 1
    assert line.endswith(command)


def test_what_stays_is_named_to_pip_where_it_shares_requirements():
    (problem,) = problems({**NEW, "transformers": "4.57.6"}, python="python")
    assert problem.remedy == f"python -m pip install 'transformers>=5.0' diffusers=={NEW['diffusers']}"
    (problem,) = problems({**NEW, "safetensors": "0.6.2"}, python="python")
    assert problem.remedy.endswith(
        f"'safetensors>=0.8' transformers=={NEW['transformers']} diffusers=={NEW['diffusers']}"
    )


@pytest.mark.parametrize("version", [None, "0.34.0"])
def test_diffusers_alone_is_added_by_the_script_that_changes_nothing(version):
    (problem,) = problems({**NEW, "diffusers": version}, python="python")
    assert problem.remedy == f"python {ROOT / 'install.py'}"


@pytest.mark.parametrize(("version", "least", "is_older"), [
    ("0.9.2", "0.14.0", True), ("0.13.9", "0.14.0", True), ("0.14.0", "0.14.0", False), ("1.0", "0.14.0", False),
    ("2.9.1+cu128", "2.10", True), ("2.10.0a0+git", "2.10", False), ("10", "10", False), ("9.5", "10", True),
])  # fmt: skip
def test_order_of_versions(version, least, is_older):
    assert older(version, least) == is_older


@pytest.mark.parametrize("version", ["0.12.1", "0.3.75", None])
def test_an_older_comfyui_is_named(version):
    problem = comfyui_problem(version)
    assert f"too old ({COMFYUI} or newer is needed)" in problem.text
    assert version is None or version in problem.text


# Loading the pack.


def load_pack(monkeypatch, version: str | None = COMFYUI):
    """The pack's module as a ComfyUI of that version makes it."""
    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "comfyui_version", SimpleNamespace(__version__=version))
    spec = importlib.util.spec_from_file_location(
        "loaded_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "loaded_pack", module)
    spec.loader.exec_module(module)
    for name in [name for name in sys.modules if name.startswith("loaded_pack.")]:
        monkeypatch.delitem(sys.modules, name)
    return module


def test_nothing_is_said_where_all_is_well(monkeypatch, caplog):
    module = load_pack(monkeypatch)
    assert callable(module.comfy_entrypoint)
    assert not hasattr(module, "NODE_CLASS_MAPPINGS")
    assert not caplog.records


def test_nodes_of_the_same_names_say_what_is_wrong(monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        module = load_pack(monkeypatch, "0.12.1")
    assert not hasattr(module, "comfy_entrypoint")  # which a ComfyUI of then may take too
    (record,) = caplog.records
    assert record.getMessage().startswith("Hybrid DiT cannot run: ComfyUI 0.12.1 is too old")
    assert module.NODE_CLASS_MAPPINGS.keys() == {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
    assert module.NODE_DISPLAY_NAME_MAPPINGS["HybridDiT_LoadCLIP"] == "Load CLIP (Parallel)"
    node = module.NODE_CLASS_MAPPINGS["HybridDiT_LoadPipeline"]
    assert node.INPUT_TYPES() == {"required": {}}
    assert (node.RETURN_TYPES[0] != "MODEL") is False  # as ComfyUI compares what is linked
    with pytest.raises(RuntimeError, match=r"^ComfyUI 0.12.1 is too old"):
        getattr(node(), node.FUNCTION)(pipeline="flux2-demo", layout=None)


# Installing. Real pip, on packages that hold nothing but what they need.


class Environment:
    """A Python of its own, with pip, and an index of its own."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = folder / "venv" / "bin" / "python"
        (self.packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
        self.index, pips = folder / "index", folder / "pip"
        self.index.mkdir()
        pips.mkdir()
        (pips / "pip").symlink_to(Path(distribution("pip").locate_file("pip")), target_is_directory=True)
        self.environment = {
            "PYTHONPATH": str(pips), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index),
            "PIP_CONFIG_FILE": "/dev/null", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PATH": "/usr/bin:/bin",
        }  # fmt: skip

    def offer(self, name: str, version: str, *needs: str) -> None:
        with zipfile.ZipFile(self.index / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            info = f"{name}-{version}.dist-info"
            lines = [
                f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
                *(f"Requires-Dist: {need}" for need in needs),
            ]
            wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "".join(f"{info}/{file},,\n" for file in ("METADATA", "WHEEL", "RECORD")))

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), *map(str, arguments)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def versions(self) -> dict[str, str]:
        pairs = [path.name.removesuffix(".dist-info").rsplit("-", 1) for path in self.packages.glob("*.dist-info")]
        return {name: version for name, version in pairs}


OLD = {"transformers": "4.57.6", "huggingface_hub": "0.36.2", "safetensors": "0.8.0", "numpy": "2.2.6"}
FRESH = {"transformers": "5.24.0", "huggingface_hub": "2.4.0", "safetensors": "0.8.0", "numpy": "2.5.5"}


@pytest.fixture
def environment(tmp_path) -> Environment:
    """With the requirements that these packages really have."""
    environment = Environment(tmp_path)
    for version in ("0.36.2", "1.33.0", "2.4.0"):
        environment.offer("huggingface_hub", version)
    for version in ("0.6.2", "0.8.0"):
        environment.offer("safetensors", version)
    for version in ("2.2.6", "2.5.5"):
        environment.offer("numpy", version)
    environment.offer("importlib_metadata", "10.2.0")
    environment.offer("transformers", "4.57.6", "huggingface-hub<1.0,>=0.34.0", "safetensors>=0.4.3")
    environment.offer("transformers", "5.24.0", "huggingface-hub<3.0,>=1.31.0", "safetensors>=0.8.0")
    needs = ("importlib_metadata", "numpy", "safetensors>=0.8.0")
    environment.offer("diffusers", "0.37.1", "huggingface-hub<2.0,>=0.34.0", "importlib_metadata", "numpy")
    environment.offer("diffusers", "0.39.0", "huggingface-hub<2.0,>=0.34.0", *needs)
    environment.offer("diffusers", "0.41.0", "huggingface-hub<2.0,>=1.32.0", *needs)
    environment.offer("diffusers", "0.42.1", "huggingface-hub<3.0,>=1.32.0", *needs)
    return environment


def install(environment: Environment, packages: dict[str, str]) -> None:
    for name, version in packages.items():
        with zipfile.ZipFile(environment.index / f"{name}-{version}-py3-none-any.whl") as wheel:
            wheel.extractall(environment.packages)
    assert environment.versions() == packages


@pytest.mark.parametrize(("packages", "added"), [(OLD, "0.39.0"), (FRESH, "0.42.1")], ids=["old", "fresh"])
def test_installing_adds_diffusers_and_changes_nothing(environment, packages, added):
    install(environment, packages)
    done = environment.run("-m", "pip", "install", "-r", ROOT / "requirements.txt")
    assert done.returncode == 0, done.stderr
    assert environment.versions() == packages
    done = environment.run(ROOT / "install.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert environment.versions() == {**packages, "diffusers": added, "importlib_metadata": "10.2.0"}


def test_a_diffusers_that_is_there_stays(environment):
    packages = {**FRESH, "diffusers": "0.42.1", "importlib_metadata": "10.2.0"}
    install(environment, packages)
    environment.offer("diffusers", "0.50.0")
    done = environment.run(ROOT / "install.py")
    assert (done.returncode, environment.versions()) == (0, packages)
    assert "diffusers 0.42.1 is there; nothing to install" in done.stdout


def test_where_none_fits_it_is_not_comfyui_that_changes(environment):
    # On Python 3.10 there is no diffusers for the newest huggingface_hub.
    (environment.index / "diffusers-0.42.1-py3-none-any.whl").unlink()
    install(environment, FRESH)
    done = environment.run(ROOT / "install.py")
    assert done.returncode == 0, done.stdout + done.stderr
    changed = {"diffusers": "0.41.0", "importlib_metadata": "10.2.0", "huggingface_hub": "1.33.0"}
    assert environment.versions() == {**FRESH, **changed}


def test_where_comfyui_s_own_would_have_to_change_nothing_is_installed(environment):
    packages = {**OLD, "safetensors": "0.6.2"}
    install(environment, packages)
    done = environment.run(ROOT / "install.py")
    assert done.returncode != 0
    assert environment.versions() == packages
    assert "safetensors 0.6.2 is too old (0.8 or newer is needed)" in done.stdout
