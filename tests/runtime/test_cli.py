"""The command line as a user runs it: a picture and a report, or one line that says what to change."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from parallel_backend.cli import main
from parallel_backend.drawing.demo_model import demo_folder
from parallel_backend.families.qwen_image.drawing import QwenImageEditPlusDrawing
from parallel_backend.runtime.client import launcher
from parallel_backend.runtime.client.groups import close_groups
from parallel_backend.runtime.client.worker_group import WorkerGroup
from tests.single_file import flux2_tensors, to_fp8, write
from tests.text_encoder_file import write_text
from tests.vae_file import write_vae
from tests.z_image_file import z_image_model, z_image_tensors
from training.checker import find

pytestmark = pytest.mark.timeout(180)

ROOT = str(Path(__file__).resolve().parents[2])
COMMAND = [sys.executable, "-m", "parallel_backend", "demo"]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as probe:
        return probe.getsockname()[1]


def test_demo_draws_a_picture_and_writes_a_report(tmp_path):
    layout = ["--ulysses", "1", "--ring", "2", "--tp", "1", "--devices", "cpu", "--port", str(free_port())]
    request = ["--steps", "2", "--width", "64", "--height", "96", "--seed", "7"]
    files = ["--out", str(tmp_path / "picture.png"), "--report", str(tmp_path / "report.json")]
    before = sorted(os.listdir(tmp_path))
    command = [*COMMAND, *layout, *request, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "picture.png", "report.json"])

    with Image.open(tmp_path / "picture.png") as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (64, 96))
        assert np.asarray(picture, float).std() > 10

    report = json.loads((tmp_path / "report.json").read_text())
    assert report["layout"] == {"name": "Ring-2", "ulysses": 1, "ring": 2, "tp": 1, "ranks": 2}
    assert report["backend"] == "gloo"
    assert report["model"] == {"family": "flux2", "path": str(demo_folder()), "dtype": "float32"}
    assert set(report["versions"]) == {"hybrid_dit", "torch", "diffusers", "transformers"}
    seconds = report["seconds"]
    assert set(seconds) == {
        *("start", "imports", "load", "text", "steps", "step_median", "compile", "workers", "decode", "total")
    }
    assert len(seconds["steps"]) == 2
    assert all(step > own > 0 for step, own in zip(seconds["steps"], seconds["workers"], strict=True))
    assert seconds["total"] > seconds["start"] + seconds["load"] + seconds["text"] + sum(seconds["steps"])
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    for rank in report["ranks"]:
        assert set(rank) >= {"rank", "device", "device_name", "weight_bytes", "peak_bytes"}
        assert rank["weight_bytes"]["transformer"] == report["ranks"][0]["weight_bytes"]["transformer"] > 0
    wanted = {"width": 64, "height": 96, "steps": 2, "seed": 7, "guidance": 4.0, "out": str(tmp_path / "picture.png")}
    assert report["request"].items() >= wanted.items()
    assert report["request"]["prompt"]

    # A bar for each stage, left full.
    for stage in ("starting", "loading", "sampling"):
        assert len(re.findall(rf"{stage}: 100%\|.*?$", done.stderr, re.MULTILINE)) == 1, done.stderr
    assert re.search(r"sampling: 100%\|\S+\| 2/2 \[.*step", done.stderr), done.stderr
    assert re.search(r"^rank 1 on cpu: [\d.]+ MiB of weights", done.stdout, re.MULTILINE)
    assert done.stdout.rstrip().endswith(f"wrote {tmp_path / 'picture.png'} and {tmp_path / 'report.json'}")


LAYOUT = ["--ulysses", "2", "--devices", "cpu"]
DEMO_LAYOUT = ["--tp", "1", *LAYOUT]
SMALL = ["--steps", "2", "--width", "64", "--height", "80"]


@pytest.fixture
def photos(tmp_path) -> list[str]:
    """Two pictures."""
    files = []
    for number, size in enumerate([(70, 100), (128, 64)]):
        files.append(str(tmp_path / f"photo{number}.png"))
        Image.new("RGB", size, (200, 90 * number, 30)).save(files[-1])
    return files


@pytest.fixture(scope="module")
def groups():
    yield
    close_groups()


@pytest.fixture
def kept_group(groups, monkeypatch):
    """The command leaves its two ranks to the next one, which starting them anew would take long."""
    monkeypatch.setattr(WorkerGroup, "close", lambda *_, **__: None)


@pytest.mark.usefixtures("kept_group")
@pytest.mark.parametrize(
    ("kind", "images", "options", "asked"),
    [
        ("Flux2Pipeline", 1, ["--guidance", "2.5"], {"guidance": 2.5, "cfg": None, "negative_prompt": None}),
        (
            "QwenImagePipeline",
            0,
            ["--cfg", "2", "--negative-prompt", "blurry"],
            {"guidance": None, "cfg": 2.0, "negative_prompt": "blurry"},
        ),
        ("QwenImageEditPlusPipeline", 2, [], {"guidance": None, "cfg": 4.0, "negative_prompt": " "}),
    ],
    ids=["flux2", "qwen-image", "qwen-image-edit-plus"],
)
def test_generate_takes_any_family(
    pipeline, qwen_folder, photos, tmp_path, monkeypatch, capsys, kind, images, options, asked
):
    monkeypatch.setattr(QwenImageEditPlusDrawing, "vision_area", 96 * 96)
    monkeypatch.setattr(QwenImageEditPlusDrawing, "reference_area", 128 * 128)
    folder = pipeline if kind == "Flux2Pipeline" else qwen_folder(kind)
    files = ["--out", str(tmp_path / "x.webp"), "--report", str(tmp_path / "x.json")]
    given = ["--image", *photos[:images]] if images else []
    assert (
        main(["generate", "--model", str(folder), "--prompt", "a cat", *LAYOUT, *SMALL, *options, *given, *files]) == 0
    )
    assert capsys.readouterr().out.rstrip().endswith(f"wrote {tmp_path / 'x.webp'} and {tmp_path / 'x.json'}")
    with Image.open(tmp_path / "x.webp") as picture:
        assert (picture.format, picture.size) == ("WEBP", (64, 80))
        assert np.asarray(picture, float).std() > 10
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["layout"]["name"] == "Ulysses-2"
    assert len(report["seconds"]["steps"]) == (2 if asked["cfg"] is None else 4)
    size = {"prompt": "a cat", "width": 64, "height": 80, "steps": 2, "seed": 1, "images": photos[:images]}
    assert report["request"] == {**size, **asked, "loras": [], "out": str(tmp_path / "x.webp")}


@pytest.fixture(scope="module")
def flux2_files(tmp_path_factory) -> list[str]:
    """A small random FLUX.2 as ComfyUI's files: fp8 transformer, fp8 text encoder, VAE."""
    folder = tmp_path_factory.mktemp("files")
    tensors, metadata = to_fp8(flux2_tensors(), "metadata")
    files = [
        write(folder / "transformer.safetensors", tensors, metadata=metadata),
        write_text(folder / "text.safetensors", "metadata"),
        write_vae(folder / "vae.safetensors"),
    ]
    return list(map(str, files))


@pytest.mark.usefixtures("kept_group")
def test_generate_takes_single_files(flux2_files, photos, tmp_path):
    transformer, text, vae = flux2_files

    def drawn(prompt: str, *more: str) -> np.ndarray:
        out = tmp_path / "x.png"
        parts = ["--model", transformer, "--text-encoder", text, "--vae", vae, "--prompt", prompt]
        assert (
            main(["generate", *parts, *LAYOUT, *SMALL, "--out", str(out), "--report", str(tmp_path / "x.json"), *more])
            == 0
        )
        with Image.open(out) as picture:
            assert picture.size == (64, 80)
            return np.asarray(picture, int)

    cat = drawn("a cat")
    assert cat.std() > 10
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["ranks"][0]["weight_bytes"].keys() == {"transformer", "text_encoder", "vae"}
    assert report["seconds"]["text"] > 0 < report["seconds"]["decode"]
    assert np.array_equal(drawn("a cat"), cat)
    # Prompt and reference images are seen; equal ones give equal pictures.
    assert np.abs(drawn("a red circle") - cat).max() > 2
    assert np.abs(drawn("a cat", "--image", photos[0]) - cat).max() > 2


@pytest.mark.usefixtures("kept_group")
@pytest.mark.parametrize("name", ["flux2", pytest.param("qwen", marks=pytest.mark.thorough), "files"])
def test_loras(flux2_files, pipeline, qwen_folder, tmp_path, name):
    """On a folder, and beside the weights of a file in fp8: several, their strengths, and none again."""
    transformer, text, vae = flux2_files
    if name == "files":
        parts = ["--model", transformer, "--text-encoder", text, "--vae", vae]
        layer = "diffusion_model.single_blocks.0.linear2"
        shape = flux2_tensors()["single_blocks.0.linear2.weight"].shape
    else:
        folder = pipeline if name == "flux2" else qwen_folder("QwenImagePipeline")
        parts = ["--model", str(folder)]
        layer = "transformer_blocks.0.attn.to_q"
        stored = load_file(next((folder / "transformer").glob("*.safetensors")))
        shape = stored[f"{layer}.weight"].shape
        layer = f"transformer.{layer}" if name == "flux2" else layer
    out, report = tmp_path / f"{name}.png", tmp_path / f"{name}.json"
    files = []
    for number in (1, 2):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            f"{layer}.lora_A.weight": torch.randn(4, shape[1], generator=generator),
            f"{layer}.lora_B.weight": torch.randn(shape[0], 4, generator=generator),
        }
        files.append(str(tmp_path / f"{name}-{number}.safetensors"))
        save_file(tensors, files[-1])

    def drawn(*loras: str) -> np.ndarray:
        given = ["--lora", *loras] if loras else []
        command = ["generate", *parts, "--prompt", "a cat", *LAYOUT, *SMALL, *given]
        assert main([*command, "--out", str(out), "--report", str(report)]) == 0
        with Image.open(out) as picture:
            return np.asarray(picture, int)

    plain = drawn()
    one = drawn(files[0])
    assert np.abs(one - plain).max() > 2
    assert np.array_equal(drawn(f"{files[0]}:1.0", f"{files[1]}:0"), one)
    assert np.abs(drawn(f"{files[0]}:0.5") - one).max() > 2
    both = drawn(files[0], f"{files[1]}:-1.5")
    assert np.abs(both - one).max() > 2
    assert json.loads(report.read_text())["request"]["loras"] == [[files[0], 1.0], [files[1], -1.5]]
    assert np.array_equal(drawn(), plain)


def test_loras_that_are_not_to_be_had(pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launcher.Launcher, "start", lambda *_: pytest.fail("workers are started"))
    command = ["generate", "--model", str(pipeline), "--prompt", "", "--devices", "cpu", "--lora"]
    path = str(tmp_path / "x.safetensors")
    save_file({"lora_unet_input_blocks_1_0.alpha": torch.ones(()), "one.lora_A.weight": torch.ones(4, 8)}, path)
    for given, message in {
        path: f"2 of 2 tensors in {path} are of no weight that FLUX.2 has, the first is lora_unet_input_blocks_1_0.al",
        str(tmp_path / "gone.safetensors"): "gone.safetensors is missing",
        f"{path}:nan": f"{path} cannot go in with a strength of nan",
    }.items():
        capsys.readouterr()
        assert main([*command, given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    with pytest.raises(SystemExit):
        main([*command, f"{path}:strong"])
    assert f"{path}:strong is no file, and 'strong' behind its colon is no strength" in capsys.readouterr().err


def test_files_that_do_not_say_enough(flux2_files, qwen_folder, capsys):
    _, text, vae = flux2_files
    (file,) = (qwen_folder("QwenImagePipeline") / "transformer").glob("*.safetensors")
    parts = ["--model", str(file), "--text-encoder", text, "--vae", vae, "--prompt", "a cat"]
    capsys.readouterr()  # of what made the folder
    assert main(["generate", *parts, "--devices", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file} is of Qwen-Image, whose files come without their tokenizer" in line
    assert "draw with them in ComfyUI, or take the diffusers folder" in line


def test_files_of_models_with_another_text_encoder(flux2_files, tmp_path, capsys):
    """FLUX.2 klein, whose contexts are of another width, and Z-Image, of which there is the transformer alone."""
    _, text, vae = flux2_files
    klein = flux2_tensors(guidance=False)
    klein["txt_in.weight"] = torch.zeros(len(klein["txt_in.weight"]), 96)
    files = {
        write(tmp_path / "klein.safetensors", klein): "takes 96 features of a token, and",
        write(tmp_path / "z.safetensors", z_image_tensors(z_image_model())): "is of Z-Image, of which the workers hold",
    }
    for file, message in files.items():
        parts = ["--model", str(file), "--text-encoder", text, "--vae", vae, "--prompt", "a cat"]
        assert main(["generate", *parts, "--devices", "cpu"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{file} {message}" in line
        assert "draw with it in ComfyUI" in line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0], "transformer.safetensors is one file; give the others, too: --text-encoder FILE and --vae FILE"),
        ([0, 1], "transformer.safetensors is one file; give the others, too: --vae FILE"),
        ([0, 2, 1], "vae.safetensors is not a text encoder in one file"),
        ([1, 1, 2], "text.safetensors is not a transformer in one file"),
    ],
)
def test_files_that_do_not_go_together(flux2_files, given, message, capsys):
    options = [part for flag, index in zip(("--model", "--text-encoder", "--vae"), given, strict=False)
               for part in (flag, flux2_files[index])]  # fmt: skip
    assert main(["generate", "--prompt", "", "--devices", "cpu", *options]) == 2
    assert message in capsys.readouterr().err


def test_files_beside_a_folder_are_refused(pipeline, capsys):
    assert main(["generate", "--model", str(pipeline), "--vae", "x", "--prompt", ""]) == 2
    assert "--vae go with a transformer's file" in capsys.readouterr().err


def test_a_missing_package_is_named_with_a_way_out(tmp_path):
    # A Python without any package but its own library.
    command = [sys.executable, "-S", *COMMAND[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env={"PYTHONPATH": ROOT})
    assert done.returncode == 2  # main's own reaches the shell
    (line,) = done.stderr.splitlines()
    assert re.search(rf"has no package '\w+'; .*pip install {re.escape(ROOT)} \(if it is ", line), line
    assert line.endswith(f"{ROOT}/install.py)")


@pytest.mark.usefixtures("kept_group")
def test_the_demos_own_picture_is_right(tmp_path):
    out = tmp_path / "demo.png"
    assert main(["demo", *DEMO_LAYOUT, "--out", str(out), "--report", str(tmp_path / "demo.json")]) == 0
    with Image.open(out) as picture:
        background, found = find(np.asarray(picture.convert("RGB")))
    assert background == "grey"
    assert [(thing.shape, thing.colour) for thing in sorted(found, key=lambda thing: thing.x)] == [
        ("circle", "red"),
        ("star", "blue"),
    ]


WRONG = {
    "no image file": ("Flux2Pipeline", ["--image", "nowhere.png"], "the image nowhere.png is not there"),
    "no picture": ("Flux2Pipeline", ["--image", "text.png"], "text.png cannot be read as a picture .*take a PNG, JPEG"),
    "narrow image": ("Flux2Pipeline", ["--image", "narrow.png"], "image 1 is 64 x 600; FLUX.2 takes .* than 8 times"),
    "images for a model without": (
        "QwenImagePipeline",
        ["--image", "a.png"],
        "Qwen-Image takes no reference images, but 1 were given; leave them out",
    ),
    "too many images": (
        "QwenImageEditPlusPipeline",
        ["--image", *["a.png"] * 3, "--image", "a.png"],
        r"Qwen-Image-Edit-Plus takes 1 to 3 reference image\(s\), but 4 were given",
    ),
    "no image to edit": ("QwenImageEditPlusPipeline", [], r"takes 1 to 3 reference image\(s\), but 0 were given"),
    "no processor": ("no processor", ["--image", "a.png"], "processor/preprocessor_config.json is missing, which ref"),
    "cfg for FLUX.2": (
        "Flux2Pipeline",
        ["--cfg", "3"],
        r"FLUX.2 is guidance-distilled .*guidance instead \(--guidance\)",
    ),
    "guidance for Qwen-Image": ("QwenImagePipeline", ["--guidance", "3"], r"no distilled guidance .*instead \(--cfg\)"),
    "negative prompt for FLUX.2": (
        "Flux2Pipeline",
        ["--negative-prompt", "x"],
        "a negative prompt needs true CFG, which FLUX.2 does not have; leave it out",
    ),
    "negative prompt without cfg": (
        "QwenImagePipeline",
        ["--negative-prompt", "x", "--cfg", "1"],
        "a negative prompt does nothing with cfg=1; take a cfg above 1",
    ),
    "cfg": ("QwenImagePipeline", ["--cfg", "0.5"], "cfg=0.5 is no scale; take at least 1, which is none, or about 4"),
    "guidance": ("Flux2Pipeline", ["--guidance", "nan"], "guidance=nan is no scale"),
    "size": ("QwenImagePipeline", ["--height", "72"], "height=72 cannot be drawn; take a multiple of 16 pixels"),
    "ending": ("QwenImagePipeline", ["--out", "picture.txt"], "picture.txt cannot be written: its ending .*take .png"),
}


@pytest.fixture
def no_process(monkeypatch) -> None:
    """Fails a test that starts a process, but for the one in which libraries are imported meanwhile."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(launcher, "prepare", lambda source: None)
    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(("kind", "options", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_a_family_does_not_take(pipeline, qwen_folder, tmp_path, monkeypatch, capsys, kind, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 600)).save(tmp_path / "narrow.png")
    if kind == "no processor":
        folder = tmp_path / "edit"
        shutil.copytree(qwen_folder("QwenImageEditPlusPipeline"), folder)
        shutil.rmtree(folder / "processor")
    else:
        folder = pipeline if kind == "Flux2Pipeline" else qwen_folder(kind)
    assert main(["generate", "--model", str(folder), "--prompt", "", "--devices", "cpu", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(f"^python -m parallel_backend generate: .*{message}", lines[0]), lines[0]


BAD = {
    "width": (["--width", "70"], "width=70 cannot be drawn; take a multiple of 16 pixels, at least 64"),
    "steps": (["--steps", "0"], "steps=0 cannot be drawn; take at least 1"),
    "degree": (["--ring", "0"], "ring_size must be a whole number of at least 1"),
    "heads": (["--ulysses", "1", "--tp", "3"], "8 attention heads.*these would work: ulysses 1, ring 3, tp 1"),
    "picture's folder": (["--out", "nowhere/x.png"], "nowhere/x.png cannot be written: the folder .* does not exist"),
    "report's folder": (["--report", "nowhere/x.json"], "nowhere/x.json cannot be written"),
    "devices": (["--devices", "gpu0"], "cannot read the device 'gpu0'; write 'auto', 'cpu', or GPUs such as '0,1,2,3'"),
    "dtype": (["--dtype", "fp8"], "dtype 'fp8' is not known; choose one of auto, bfloat16, float16, float32"),
    "model": (["--model", "nowhere"], "nowhere is not a folder; name a diffusers pipeline folder"),
    "cache": (["--cache", "quick"], "'quick' is neither a preset .quality, .*low_noise. nor name=value"),
    "cache's threshold": (["--cache", "residual_diff_threshold=2"], "residual_diff_threshold must be between 0 and 1"),
    "port": (["--port", "99999", "--devices", "cpu"], "port 99999 cannot be used .*leave the port at 0"),
}


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_wrong_input_is_one_line_with_the_remedy(pipeline, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--model", str(pipeline), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("python -m parallel_backend demo: ")
    assert re.search(message, lines[0])
    assert os.listdir(tmp_path) == []


@pytest.mark.thorough
def test_the_exit_status_reaches_the_shell(tmp_path):
    command = [*COMMAND[:-1], "worker", "--nnodes", "1", "--rdzv-endpoint", "192.0.2.1:29500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "of no use to 1 host" in done.stderr


@pytest.mark.parametrize(("gpus", "expected"), [(0, "auto"), (3, "cpu"), (4, "auto")])
def test_auto_takes_the_cpu_where_gpus_are_too_few(pipeline, monkeypatch, capsys, gpus, expected):
    asked = []

    def create(folder, layout, devices, *rest, **more):
        asked.append(devices)
        raise ValueError("that is enough")

    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("parallel_backend.runtime.group_config.ModelConfig.create", create)
    assert main(["demo", "--model", str(pipeline)]) == 2
    assert asked == [expected]
    assert ("4 ranks are more than the 3 GPU(s) here" in capsys.readouterr().out) == (gpus == 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--nnodes", "2"], "2 hosts need an rdzv_endpoint"),
        (["demo", "--nnodes", "3", "--rdzv-endpoint", "192.0.2.1:29500"], "4 rank(s) cannot be shared out evenly"),
        (["demo", "--rdzv-endpoint", "192.0.2.1:29500"], "of no use to 1 host"),
        (["demo", "--nnodes", "2", "--rdzv-endpoint", "192.0.2.1:29500"], "cannot listen at the rdzv_endpoint"),
        (["worker", "--nnodes", "2", "--rdzv-endpoint", "192.0.2.1"], "cannot read the rdzv_endpoint '192.0.2.1'"),
        (["worker", "--nnodes", "1", "--rdzv-endpoint", "192.0.2.1:29500"], "of no use to 1 host"),
        (["worker", "--nnodes", "3", "--rdzv-endpoint", "192.0.2.1:29500"], "give it --node-rank"),
    ],
)
def test_hosts_that_cannot_work(pipeline, arguments, words, capsys):
    """Before anything is started; 192.0.2.1 is nobody's address."""
    options = ["--model", str(pipeline), "--devices", "cpu"] if arguments[0] == "demo" else []
    assert main([*arguments, *options]) == 2
    assert words in capsys.readouterr().err


def test_without_memfd_the_system_is_named(pipeline, monkeypatch, capsys):
    monkeypatch.delattr("os.memfd_create")
    assert main(["demo", "--model", str(pipeline), "--devices", "cpu"]) == 2
    assert "parallel workers need memfd_create, which this Linux lacks" in capsys.readouterr().err
