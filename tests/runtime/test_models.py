"""Several models in one group of processes: loaded beside each other, moved, freed, and refused, each alone."""

from __future__ import annotations

import gc
import logging
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel_backend import ParallelismConfig
from parallel_backend.families import Conditioning
from parallel_backend.runtime.client import groups
from parallel_backend.runtime.client.groups import acquire_model, add_user, close_groups, find_model, remove_user
from parallel_backend.runtime.client.remote_model import RemoteModel
from parallel_backend.runtime.group_config import ModelConfig
from tests.errors import relative_error
from tests.single_file import flux2_tensors, to_fp8, write

pytestmark = pytest.mark.timeout(180)

TP = ParallelismConfig(tp_size=2)
EXACT = 1e-5
"""fp32: layouts only reorder sums."""


class Cancelled(Exception):  # noqa: N818
    """As ComfyUI's InterruptProcessingException: an Exception of its own."""


@pytest.fixture(scope="module", autouse=True)
def no_groups_left():
    yield
    close_groups()


@pytest.fixture(scope="module")
def config(pipeline) -> ModelConfig:
    return ModelConfig.create(pipeline, TP, "cpu")


@pytest.fixture
def model(config) -> RemoteModel:
    """The tiny pipeline on two ranks."""
    return acquire_model(config)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return flux2_tensors(heads=2, double=1, single=2)


@pytest.fixture(scope="module")
def file(tmp_path_factory, tensors) -> Path:
    return write(tmp_path_factory.mktemp("files") / "other.safetensors", tensors)


def predict(model: RemoteModel, seed: int = 0) -> torch.Tensor:
    """A prediction of a model, with a context of its own width."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 128, 4, 6, generator=generator)
    context = torch.randn(1, 7, model.source.transformer_config["joint_attention_dim"], generator=generator)
    return model.predict(x, torch.tensor([0.7]), Conditioning(context, tensors={"guidance": torch.tensor([4.0])}))


def encode(model: RemoteModel) -> torch.Tensor:
    ids = torch.arange(1, 12)[None]
    return model.encode_text(ids, torch.ones_like(ids))


def pids(model: RemoteModel) -> dict[int, int]:
    return dict(model.group._pids)


def places(model: RemoteModel) -> list[dict[str, str]]:
    return [rank["places"] for rank in model.report()["ranks"]]


class TestBesideEachOther:
    def test_models_and_layouts_of_as_many_ranks_share_the_processes(self, model, pipeline, file):
        before = predict(model)
        other = acquire_model(ModelConfig.create(file, TP, "cpu"))
        ring = acquire_model(ModelConfig.create(pipeline, ParallelismConfig(ring_size=2), "cpu"))
        assert pids(other) == pids(ring) == pids(model)
        assert relative_error(predict(ring), before) <= EXACT
        first = predict(other)
        # Taking turns, each with conditioning of its own.
        for seed in range(3):
            assert relative_error(predict(ring, seed), predict(model, seed)) <= EXACT
            assert torch.equal(predict(other), first)
        reports = {name: each.report() for name, each in {"model": model, "other": other, "ring": ring}.items()}
        assert reports["model"]["layout"]["name"] == "TP-2"
        assert reports["ring"]["layout"]["name"] == "Ring-2"
        assert set(reports["other"]["ranks"][0]["weight_bytes"]) == {"transformer"}
        held = [rank["weight_bytes"]["transformer"] for rank in reports["model"]["ranks"]]
        assert max(held) < 0.7 * reports["ring"]["ranks"][0]["weight_bytes"]["transformer"]

    def test_an_equal_configuration_loads_nothing(self, model, pipeline):
        states = []
        again = acquire_model(ModelConfig.create(str(pipeline), TP, "CPU", "float32"), lambda *s: states.append(s))
        assert again is model
        assert states == []

    def test_what_is_unloaded_is_gone_and_the_others_stay(self, model, file):
        before = predict(model)
        config = ModelConfig.create(file, TP, "cpu")
        other = acquire_model(config)
        other.group.unload(config)
        assert find_model(config) is None
        with pytest.raises(ValueError, match="the workers hold no model m"):
            predict(other)
        assert torch.equal(predict(model), before)
        fresh = acquire_model(config)
        assert fresh is not other
        assert pids(fresh) == pids(model)
        predict(fresh)


class TestCancelWhileLoading:
    def test_it_returns_at_once_and_the_rest_is_waited_for_next_time(self, model, tmp_path):
        tensors = flux2_tensors(heads=8, double=1, single=6)
        config = ModelConfig.create(write(tmp_path / "large.safetensors", tensors), TP, "cpu")
        cancelled = []

        def on_state(state, *_):
            if state == "loading":
                cancelled.append(time.perf_counter())

        def check():
            if cancelled:
                raise Cancelled

        with pytest.raises(Cancelled):
            acquire_model(config, on_state, check)
        assert time.perf_counter() - cancelled[0] < 0.2
        assert find_model(config) is None
        # The ranks go on with it, and nothing is loaded twice.
        assert torch.isfinite(predict(model)).all()
        large = acquire_model(config)
        assert pids(large) == pids(model)
        held = sum(rank["weight_bytes"]["transformer"] for rank in large.report()["ranks"])
        assert held > 2 * sum(tensor.nbytes for tensor in tensors.values()) // 3
        assert torch.isfinite(predict(large)).all()
        large.group.unload(config)


class TestMoving:
    """Weights that left come back as they were. (On the CPU there is no other memory: they are read again.)"""

    def test_what_was_offloaded_comes_back(self, model, caplog):
        expected, context = predict(model), encode(model)
        with caplog.at_level(logging.INFO):
            model.offload("transformer")
        assert "transformer of tiny unloaded as ComfyUI asked for memory; the next use reads it again" in caplog.text
        assert [place["transformer"] for place in places(model)] == ["file", "file"]
        assert model.offloaded == {"transformer"}
        assert torch.equal(encode(model), context)
        assert torch.equal(predict(model), expected)
        assert model.offloaded == set()
        assert [place["transformer"] for place in places(model)] == ["device", "device"]

    def test_the_vae_too(self, model):
        latent = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(1))
        expected = model.decode(latent)
        model.offload("vae")
        assert "vae" not in places(model)[1]
        assert torch.equal(model.decode(latent), expected)

    def test_an_encoder_that_stays_in_host_memory_between_prompts(self, model, pipeline):
        expected = encode(model)
        config = ModelConfig.create(pipeline, TP, "cpu", encoder_memory="host")
        other = acquire_model(config)
        for _ in range(3):
            assert torch.equal(encode(other), expected)
            assert [place["text_encoder"] for place in places(other)] == ["host", "host"]
        other.group.unload(config)

    def test_an_encoder_that_stays_on_its_device(self, pipeline):
        config = ModelConfig.create(pipeline, TP, "cpu", encoder_memory="device")
        model = acquire_model(config)
        encode(model)
        assert [place["text_encoder"] for place in places(model)] == ["device", "device"]
        model.group.unload(config)

    def test_where_an_encoder_cannot_stay(self, pipeline):
        with pytest.raises(ValueError, match="the text encoder's memory 'gpu' is not known; choose one of"):
            ModelConfig.create(pipeline, TP, "cpu", encoder_memory="gpu")


def test_a_model_that_is_there_is_found_without_a_look_at_its_files(model, monkeypatch):
    """It is asked for in each step."""
    monkeypatch.setattr(groups, "open_checkpoint", lambda path: pytest.fail("a file was looked at"))
    assert acquire_model(model.config) is model


class TestUsers:
    """ComfyUI's objects say that they use a model; one that nobody uses goes when its memory is wanted."""

    def test_a_model_that_nobody_uses_stays_until_its_memory_is_wanted(self, model, file):
        config = ModelConfig.create(file, TP, "cpu")
        add_user(config)
        other = acquire_model(config)
        remove_user(config)
        assert acquire_model(config) is other  # it was not needed
        add_user(config)
        add_user(config)
        other.offload("transformer")
        remove_user(config)
        assert find_model(config) is other  # somebody else uses it
        remove_user(config)
        deadline = time.monotonic() + 5
        while find_model(config) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert find_model(config) is None
        with pytest.raises(ValueError, match="the workers hold no model"):
            predict(other)
        assert not groups._users
        predict(model)

    def test_finalizers_in_the_middle_of_a_request_do_no_harm(self, model, file):
        config = ModelConfig.create(file, TP, "cpu")
        other = acquire_model(config)
        other.offload("transformer")
        add_user(config)
        freed = []

        def check():
            if not freed:
                freed.append(True)
                gc.collect()
                remove_user(config)

        expected = predict(model)
        x = torch.randn(1, 128, 4, 6, generator=torch.Generator().manual_seed(0))
        context = torch.randn(1, 7, 192, generator=torch.Generator().manual_seed(5))
        model.predict(
            x, torch.tensor([0.7]), Conditioning(context, tensors={"guidance": torch.tensor([4.0])}), check=check
        )
        assert freed
        assert torch.equal(predict(model), expected)


def cut_off(folder: Path) -> str:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with weights.open("r+b") as stream:
        stream.truncate(weights.stat().st_size - 1000)
    return r"diffusion_pytorch_model\.safetensors has \d+ bytes but its header describes \d+"


def changed(folder: Path, change, component: str = "transformer") -> None:
    (weights,) = (folder / component).glob("*.safetensors")
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)


def missing(folder: Path) -> str:
    changed(folder, lambda tensors: tensors.pop("proj_out.weight"))
    return r"have no tensor proj_out\.weight"


def unexpected(folder: Path) -> str:
    changed(folder, lambda tensors: tensors.update({"transformer_blocks.0.attn.gate.weight": torch.zeros(3)}))
    return r"transformer_blocks\.0\.attn\.gate\.weight in .*diffusion_pytorch_model\.safetensors"


def other_shape(folder: Path) -> str:
    changed(folder, lambda tensors: tensors.update({"proj_out.weight": torch.zeros(3, 3)}))
    return r"proj_out\.weight in .* has shape \[3, 3\]"


def whole_numbers(folder: Path) -> str:
    changed(folder, lambda tensors: tensors.update({"proj_out.weight": tensors["proj_out.weight"].int()}))
    return r"proj_out\.weight in .*diffusion_pytorch_model\.safetensors is stored as I32"


def not_finite(folder: Path) -> str:
    def change(tensors):
        tensors["single_transformer_blocks.1.attn.to_out.weight"][-1, -1] = float("nan")

    changed(folder, change)
    return r"single_transformer_blocks\.1\.attn\.to_out\.weight in .*\.safetensors holds values that are not finite"


def not_finite_text(folder: Path) -> str:
    def change(tensors):
        (key,) = (key for key in tensors if key.endswith("layers.2.mlp.up_proj.weight"))
        tensors[key][0, 0] = float("inf")

    changed(folder, change, "text_encoder")
    return r"layers\.2\.mlp\.up_proj\.weight in .*\.safetensors holds values that are not finite"


def not_finite_vae(folder: Path) -> str:
    def change(tensors):
        tensors["decoder.conv_in.weight"][0, 0] = float("nan")

    changed(folder, change, "vae")
    return r"VAE in .*damaged/vae cannot be loaded: decoder\.conv_in\.weight holds values that are not finite"


def pickled(folder: Path) -> str:
    (weights,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    weights.unlink()
    torch.save(tensors, weights.with_suffix(".bin"))
    return r"transformer holds no \.safetensors file \(but a pickle.*\); other formats are not read"


def pickled_under_another_name(folder: Path) -> str:
    (weights,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    weights.unlink()
    torch.save(tensors, weights)
    return r"diffusion_pytorch_model\.safetensors"


DAMAGES = [cut_off, missing, unexpected, other_shape, whole_numbers, not_finite, not_finite_text, not_finite_vae,
           pickled, pickled_under_another_name]  # fmt: skip


class TestBadFiles:
    """An error that names file and key; no worker is lost, and the model that was there works on."""

    @pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
    def test_a_damaged_folder(self, model, pipeline, tmp_path, damage):
        before, ranks = predict(model), pids(model)
        folder = Path(shutil.copytree(pipeline, tmp_path / "damaged"))
        message = damage(folder)
        states: list[str] = []
        with pytest.raises(ValueError, match=message) as caught:
            acquire_model(ModelConfig.create(folder, TP, "cpu"), lambda state, *_: states.append(state))
        assert "starting" not in states
        assert "Traceback" not in str(caught.value)
        assert pids(model) == ranks
        assert model.ready
        assert torch.equal(predict(model), before)

    @pytest.mark.parametrize("kind", ["cut off after it was opened", "not finite", "fp8 scale"])
    def test_a_damaged_file(self, model, tensors, tmp_path, kind):
        before, ranks = predict(model), pids(model)
        stored, metadata = dict(tensors), {}
        if kind == "fp8 scale":
            stored, metadata = to_fp8(tensors, "metadata")
            stored["single_blocks.1.linear1.weight_scale"] = torch.tensor(float("nan"))
        elif kind == "not finite":
            stored["double_blocks.0.img_mlp.2.weight"] = torch.full_like(
                tensors["double_blocks.0.img_mlp.2.weight"], float("nan")
            )
        path = write(tmp_path / "damaged.safetensors", stored, metadata=metadata)
        config = ModelConfig.create(path, TP, "cpu", fp8="stored")
        key = {
            "fp8 scale": "single_blocks.1.linear1.weight",
            "not finite": "double_blocks.0.img_mlp.2.weight",
        }.get(kind, "")
        if not key:
            with path.open("r+b") as stream:
                stream.truncate(path.stat().st_size // 2)
        with pytest.raises(ValueError, match=f"{re.escape(key)}.*damaged.safetensors"):
            acquire_model(config)
        assert pids(model) == ranks
        assert torch.equal(predict(model), before)
