"""Worker groups of real processes: what they compute is what diffusers computes, whatever happens to them."""

import contextlib
import errno
import functools
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline

from parallel_backend import ParallelismConfig, paths
from parallel_backend.cache.config import PRESETS
from parallel_backend.cache.run import CacheRun
from parallel_backend.drawing.sampling import ImageRequest, draw
from parallel_backend.families import Conditioning
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.planning.devices import Devices
from parallel_backend.runtime.client import launcher as launching
from parallel_backend.runtime.client import remote_model, same_content
from parallel_backend.runtime.client.groups import acquire_model, close_groups, find_model
from parallel_backend.runtime.client.launcher import Launcher
from parallel_backend.runtime.client.remote_model import RemoteModel
from parallel_backend.runtime.client.worker_group import WorkerGroup, WorkersFailedError
from parallel_backend.runtime.group_config import ModelConfig
from parallel_backend.runtime.wire.channel import Channel
from parallel_backend.runtime.wire.messages import EndRun, Keep, Predict
from tests.errors import relative_error

from .processes import Watched

pytestmark = pytest.mark.timeout(180)

TOLERANCE = 1e-5
"""fp32: the layouts only reorder sums; 1e-6 was seen after two steps, a wrong token or head costs more than 1e-2."""

# What ComfyUI sets, and what a client that is itself a rank of a torchrun job has; none of it is for the workers.
CLIENT_ENVIRONMENT = {
    "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",
    "PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync",
    "MASTER_ADDR": "192.0.2.1",
    "MASTER_PORT": "1",
    "RANK": "5",
    "WORLD_SIZE": "9",
    "LOCAL_RANK": "5",
    "TORCHELASTIC_RUN_ID": "the client's",
}


class Cancelled(Exception):  # noqa: N818
    """As ComfyUI's InterruptProcessingException: an Exception of its own."""


@pytest.fixture(scope="module", autouse=True)
def client_environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CLIENT_ENVIRONMENT.items():
            patch.setenv(name, value)
        yield
    close_groups()


@pytest.fixture(scope="module")
def config(pipeline) -> ModelConfig:
    return ModelConfig.create(pipeline, ParallelismConfig(ulysses_size=2, tp_size=2), "cpu")


@pytest.fixture(scope="module")
def single_config(pipeline) -> ModelConfig:
    return ModelConfig.create(pipeline, ParallelismConfig(), "cpu")


@pytest.fixture
def group(config) -> RemoteModel:
    """Four ranks, Ulysses 2 x TP 2: the same ones for all tests, until a test ends them."""
    return acquire_model(config)


@pytest.fixture
def single(single_config) -> RemoteModel:
    """One rank."""
    return acquire_model(single_config)


@pytest.fixture(params=["group", "single"])
def either(request) -> RemoteModel:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def untouched(pipeline) -> Flux2Pipeline:
    """The oracle: diffusers' pipeline on the same folder in this process."""
    pipe = Flux2Pipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int = 1, height: int = 4, width: int = 6, text: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        "x": noise(seed, batch, 128, height, width),
        "timestep": torch.linspace(0.8, 0.3, batch),
        "context": noise(seed + 1, batch, text, 192),
        "guidance": torch.linspace(2.0, 5.0, batch),
    }


def evaluate(model: RemoteModel, x, timestep, context, guidance, references=(), **others) -> torch.Tensor:
    """A prediction of the workers."""
    tensors = {} if guidance is None else {"guidance": guidance}
    return model.predict(x, timestep, Conditioning(context, references, tensors), **others)


@torch.no_grad()
def expected_prediction(pipe: Flux2Pipeline, x, timestep, context, guidance, references=()) -> torch.Tensor:
    """The untouched transformer, with tokens and position ids made by diffusers' pipeline."""
    latent_ids = pipe._prepare_latent_ids(x)
    tokens, ids = [pipe._pack_latents(x)], [latent_ids]
    if references:
        tokens += [pipe._pack_latents(reference.expand(x.shape[0], -1, -1, -1)) for reference in references]
        ids.append(pipe._prepare_image_ids([reference[:1] for reference in references]).repeat(x.shape[0], 1, 1))
    output = pipe.transformer(
        hidden_states=torch.cat(tokens, 1),
        timestep=timestep,
        guidance=guidance,
        encoder_hidden_states=context,
        txt_ids=pipe._prepare_text_ids(context),
        img_ids=torch.cat(ids, 1),
        return_dict=False,
    )[0][:, : latent_ids.shape[1]]
    return pipe._unpack_latents_with_ids(output, latent_ids)


def assert_works(model: RemoteModel, untouched: Flux2Pipeline, seed: int = 50) -> None:
    given = inputs(seed=seed)
    assert relative_error(evaluate(model, **given), expected_prediction(untouched, **given)) <= TOLERANCE


def processes_of(group: WorkerGroup) -> list[int]:
    """The ranks and torchrun."""
    return [*group._pids.values(), group._launcher.process.pid]


@pytest.fixture
def sent(monkeypatch) -> list:
    """Messages as they are sent, each once however many ranks get it."""
    messages: list = []
    send = Channel.send

    def spy(self, message, shared=None):
        if not any(message is seen for seen in messages):
            messages.append(message)
        send(self, message, shared)

    monkeypatch.setattr(Channel, "send", spy)
    return messages


@pytest.fixture
def no_process(monkeypatch) -> None:
    """Fails a test that starts a process."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.fixture(scope="module")
def oracle(untouched):
    """From prompt, width and height to the last latent and the picture, of 2 steps with guidance 2.5 and seed 5."""

    @functools.cache
    def draw_untouched(prompt: str, width: int, height: int):
        latents = []

        def on_step(pipe, step, timestep, tensors):
            latents.append(tensors["latents"])
            return tensors

        picture = untouched(
            prompt=prompt,
            width=width,
            height=height,
            num_inference_steps=2,
            guidance_scale=2.5,
            generator=torch.Generator().manual_seed(5),
            text_encoder_out_layers=(1, 2, 4),
            callback_on_step_end=on_step,
        ).images[0]
        grid = untouched._prepare_latent_ids(torch.empty(1, 128, height // 16, width // 16))
        return untouched._unpack_latents_with_ids(latents[-1], grid), picture

    return draw_untouched


def listening_addresses(pids: list[int]) -> set[tuple[str, int]]:
    """Address and port of every TCP socket on which one of the processes listens."""
    links = [os.readlink(entry) for pid in pids for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state != "0A" or f"socket:[{rest[5]}]" not in links:
                continue
            address, port = local.split(":")
            # The kernel prints each 32-bit word of an address in its own byte order.
            words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
            found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


class TestDraw:
    """A whole picture, from prompt to pixels, against diffusers.Flux2Pipeline in one process."""

    @pytest.mark.parametrize(
        ("prompt", "width", "height"),
        [
            ("a red circle left of a blue square", 64, 64),
            ("", 112, 80),
            ("a dragon flying over the sea, " * 300, 64, 96),  # cut at 512 tokens
        ],
        ids=["square", "empty prompt, odd number of tokens", "long prompt"],
    )
    def test_picture(self, either, oracle, monkeypatch, prompt, width, height):
        decode, latents = either.decode, []
        monkeypatch.setattr(either, "decode", lambda latent: latents.append(latent) or decode(latent))
        steps = []
        request = ImageRequest(prompt, width, height, steps=2, seed=5, guidance=2.5)
        picture = draw(either, request, lambda done, total: steps.append((done, total)))

        latent, expected = oracle(prompt, width, height)
        assert relative_error(latents[0], latent) <= TOLERANCE
        pixels, wanted = np.asarray(picture, int), np.asarray(expected, int)
        assert picture.size == (width, height)
        # Where a value lies at a half, the two may round it to either side.
        assert np.abs(pixels - wanted).max() <= 1
        assert wanted.std() > 20
        assert steps == [(0, 2), (1, 2), (2, 2)]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"width": 70}, "width=70 cannot be drawn; take a multiple of 16 pixels, at least 64"),
            ({"height": 48}, "height=48 cannot be drawn"),
            ({"steps": 0}, "steps=0"),
            ({"seed": -1}, "seed=-1 is out of range"),
        ],
    )
    def test_what_cannot_be_drawn_is_refused_before_anything_is_sent(self, single, sent, change, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            draw(single, ImageRequest("a cat", **change))
        assert sent == []


class TestPredict:
    """One evaluation of the transformer, against the untouched one."""

    @pytest.mark.parametrize("sizes", [[], [(3, 5)], [(2, 2), (1, 7)]], ids=["none", "one", "two"])
    def test_references_and_batch_2(self, either, untouched, sizes):
        given = inputs(batch=2, height=3, width=5)
        references = [noise(10 + n, 1 if n else 2, 128, *size) for n, size in enumerate(sizes)]
        actual = evaluate(either, **given, references=references)
        assert relative_error(actual, expected_prediction(untouched, **given, references=references)) <= TOLERANCE

    def test_fewer_tokens_than_ranks(self, group, untouched):
        given = inputs(height=1, width=1, text=1)
        assert relative_error(evaluate(group, **given), expected_prediction(untouched, **given)) <= TOLERANCE

    def test_no_guidance(self, group, untouched):
        given = inputs() | {"guidance": None}
        assert relative_error(evaluate(group, **given), expected_prediction(untouched, **given)) <= TOLERANCE

    def test_inputs_are_not_changed(self, group):
        given = inputs()
        before = {name: tensor.clone() for name, tensor in given.items()}
        evaluate(group, **given)
        for name, tensor in given.items():
            assert torch.equal(tensor, before[name]), name


class TestVAE:
    """The VAE with the latent's statistics, as diffusers' pipeline uses it."""

    def test_decode(self, either, untouched):
        latent = noise(3, 2, 128, 3, 5)
        bn = untouched.vae.bn
        std = torch.sqrt(bn.running_var + untouched.vae.config.batch_norm_eps)
        raw = latent * std.view(1, -1, 1, 1) + bn.running_mean.view(1, -1, 1, 1)
        with torch.no_grad():
            expected = untouched.vae.decode(untouched._unpatchify_latents(raw), return_dict=False)[0]
        assert expected.shape == (2, 3, 48, 80)
        assert relative_error(either.decode(latent), expected) <= TOLERANCE

    def test_encode(self, either, untouched):
        image = noise(4, 1, 3, 48, 80).clamp(-1, 1)
        with torch.no_grad():
            expected = untouched._encode_vae_image(image, generator=torch.Generator().manual_seed(0))
        assert expected.shape == (1, 128, 3, 5)
        assert relative_error(either.encode(image), expected) <= TOLERANCE

    @pytest.mark.parametrize(
        ("work", "tensor", "message"),
        [
            ("decode", torch.zeros(1, 4, 8, 8), "the latent has 4 channels, FLUX.2 takes 128"),
            ("decode", torch.zeros(1, 128, 0, 8), r"shape \[1, 128, 0, 8\]"),
            ("encode", torch.zeros(1, 4, 64, 64), r"shape \[1, 4, 64, 64\]; the VAE of FLUX.2 encodes images of 3 "),
            ("encode", torch.zeros(1, 3, 8, 8), "multiples of 16 pixels, 16 at least"),
            ("encode", torch.zeros(1, 3, 0, 0), "multiples of 16 pixels, 16 at least"),
        ],
    )
    def test_what_it_does_not_take_is_refused(self, single, sent, work, tensor, message):
        with pytest.raises(ValueError, match=message):
            getattr(single, work)(tensor)
        assert sent == []


class TestConditioning:
    """Contexts and references travel once, and what was changed is not mistaken for what it was."""

    def test_it_is_sent_once(self, group, sent, untouched):
        given = inputs(seed=100)
        reference = noise(102, 1, 128, 2, 3)
        for step in range(4):
            # A sampler makes its tensors anew for every step.
            again = {name: tensor.clone() for name, tensor in given.items()} | {"x": noise(step, 1, 128, 4, 6)}
            actual = evaluate(group, **again, references=[reference.clone()])
            expected = expected_prediction(untouched, **again, references=[reference])
            assert relative_error(actual, expected) <= TOLERANCE
        assert [type(message) for message in sent] == [Keep, Keep, Predict, Predict, Predict, Predict]

    @pytest.mark.parametrize("in_place", [True, False], ids=["in place", "a new tensor"])
    def test_changed_conditioning_of_the_same_shape_is_sent(self, group, untouched, in_place):
        given = inputs(seed=110)
        before = evaluate(group, **given)
        if in_place:
            given["context"][0, -1, -1] += 100
        else:
            given["context"] = given["context"].clone()
            given["context"][0, -1, -1] += 100
        after = evaluate(group, **given)
        assert relative_error(after, before) > 1e-3
        assert relative_error(after, expected_prediction(untouched, **given)) <= TOLERANCE

    @pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
    def test_a_change_that_the_sample_misses_is_found_meanwhile(self, single, sent, untouched, monkeypatch, cached):
        monkeypatch.setattr(same_content, "GUESSED_BYTES", 0)
        monkeypatch.setattr(single, "_guesses", True)
        given = inputs(seed=115 + cached)
        run = CacheRun(PRESETS["speed"], steps=28)
        runs = [{"cache": (run, run.evaluation("", float(20 + step)))} if cached else {} for step in range(3)]
        evaluate(single, **given, **runs[0])
        evaluate(single, **given, **runs[1])
        assert [type(message) for message in sent] == [Keep, Predict, Predict]
        given["context"] = given["context"].clone()
        given["context"][0, -1, -1] += 100  # which is not the first of its numbers
        sent.clear()
        actual = evaluate(single, **given, **runs[2])
        end = [EndRun] if cached else []
        assert [type(message) for message in sent] == [Predict, *end, Keep, Predict]
        assert relative_error(actual, expected_prediction(untouched, **given)) <= TOLERANCE
        # Conditioning of which a sample does not say enough is compared in full from then on.
        sent.clear()
        given["context"][0, -1, -1] += 100
        evaluate(single, **given)
        assert [type(message) for message in sent] == [Keep, Predict]

    def test_another_dtype_is_not_the_same(self, single, sent):
        given = inputs(seed=120)
        evaluate(single, **given)
        evaluate(single, **given | {"context": given["context"].double()})
        assert sum(isinstance(message, Keep) for message in sent) == 2

    def test_the_least_recently_used_goes_first(self, single, sent, untouched, monkeypatch):
        monkeypatch.setattr(remote_model, "KEPT_TENSORS", 3)
        while single._kept:
            single._kept.popitem()
        contexts = {name: noise(130 + n, 1, 5, 192) for n, name in enumerate("ABCD")}
        given = inputs(seed=140)

        def predict(name: str) -> list[Keep]:
            sent.clear()
            actual = evaluate(single, **given | {"context": contexts[name]})
            expected = expected_prediction(untouched, **given | {"context": contexts[name]})
            assert relative_error(actual, expected) <= TOLERANCE
            return [message for message in sent if isinstance(message, Keep)]

        names = {name: f"t{predict(name)[0].id}" for name in "ABC"}
        assert predict("A") == []  # B is now the oldest
        (keep,) = predict("D")
        assert keep.forget == [names["B"]]
        assert predict("A") == predict("C") == predict("D") == []
        request = Predict(single.group.next_id(), single.name, names["B"])
        with pytest.raises(ValueError, match=f"conditioning {names['B']} was not sent"):
            single.group.call(request, {"x": given["x"], "timestep": given["timestep"]})
        (keep,) = predict("B")
        assert keep.forget == [names["A"]]

    def test_what_a_call_uses_is_not_forgotten_for_the_rest_of_it(self, single, untouched, monkeypatch):
        monkeypatch.setattr(remote_model, "KEPT_TENSORS", 2)
        given = inputs(seed=150) | {"references": [noise(151 + n, 1, 128, 2, 2) for n in range(4)]}
        assert relative_error(evaluate(single, **given), expected_prediction(untouched, **given)) <= TOLERANCE


class TestCancel:
    """A check() that raises gives control back at once, and the group is as good as before."""

    def test_in_the_middle_of_a_step(self, group, untouched):
        given = inputs(seed=200)
        evaluate(group, **given)
        cancelled_at: list[float] = []
        stopped = group.group._pids[1]
        os.kill(stopped, signal.SIGSTOP)  # the step cannot end now
        try:
            timer = threading.Timer(0.3, lambda: cancelled_at.append(time.perf_counter()))
            timer.start()

            def check() -> None:
                if cancelled_at:
                    raise Cancelled

            with pytest.raises(Cancelled):
                evaluate(group, **given | {"x": noise(7, 1, 128, 4, 6)}, check=check)
            # The wait is looked at every 50 ms.
            assert time.perf_counter() - cancelled_at[0] < 0.2
        finally:
            os.kill(stopped, signal.SIGCONT)
        # Its inputs have the same shapes: the answer to the step that was given up would not be noticed by shape.
        assert relative_error(evaluate(group, **given), expected_prediction(untouched, **given)) <= TOLERANCE

    def test_while_conditioning_is_sent(self, group, sent, untouched):
        given = inputs(seed=210)
        stopped = group.group._pids[3]
        os.kill(stopped, signal.SIGSTOP)

        def check() -> None:
            raise Cancelled

        try:
            with pytest.raises(Cancelled):
                evaluate(group, **given, check=check)
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert relative_error(evaluate(group, **given), expected_prediction(untouched, **given)) <= TOLERANCE
        # Whether all workers have the first one is not known, so they forget it.
        assert [type(message) for message in sent] == [Keep, Keep, Predict]
        assert sent[1].forget == [f"t{sent[0].id}"]


class TestBadInput:
    """What the request is at fault for is a ValueError, and the group stays usable."""

    def test_conditioning_that_was_never_sent(self, group, untouched):
        given = inputs()
        request = Predict(group.group.next_id(), group.name, "t999999", ["t999998"])
        with pytest.raises(ValueError, match="conditioning t999999, t999998 was not sent to the workers"):
            group.group.call(request, {"x": given["x"], "timestep": given["timestep"]})
        assert_works(group, untouched)

    def test_a_reference_batch_that_does_not_fit(self, group, untouched):
        with pytest.raises(ValueError, match="a reference batch of 3 does not fit a batch of 2"):
            evaluate(group, **inputs(batch=2), references=[noise(1, 3, 128, 2, 2)])
        assert_works(group, untouched)

    def test_a_dtype_that_cannot_be_sent(self, group, untouched):
        given = inputs()
        with pytest.raises(ValueError, match="tensor x has dtype bool, which is not sent"):
            evaluate(group, **given | {"x": given["x"] > 0})
        assert_works(group, untouched)

    def test_shapes_that_break_the_model(self, group, untouched):
        """Not foreseen, so no ValueError; but every rank stumbles at the same place and goes on."""
        with pytest.raises(RuntimeError, match=r"rank \d failed: RuntimeError") as caught:
            evaluate(group, **inputs() | {"context": noise(1, 1, 7, 100)})
        assert not isinstance(caught.value, WorkersFailedError)
        assert "Traceback" in str(caught.value)
        assert_works(group, untouched)


class TestReport:
    def test_every_field_is_there(self, group, config):
        group.reset_timings()
        before = group.report()
        assert before["seconds"]["steps"] == []
        assert before["seconds"]["step_median"] is None
        draw(group, ImageRequest("a cat", 64, 64, steps=3))
        report = json.loads(json.dumps(group.report()))
        assert report["layout"] == {"name": "Ulysses-2-TP-2", "ulysses": 2, "ring": 1, "tp": 2, "ranks": 4}
        assert report["backend"] == "gloo"
        assert report["model"] == {"family": "flux2", "path": config.path, "dtype": "float32"}
        assert set(report["versions"]) == {"hybrid_dit", "torch", "diffusers", "transformers"}
        assert report["versions"]["torch"] == torch.__version__
        seconds = report["seconds"]
        names = {"start", "imports", "load", "text", "steps", "step_median", "compile", "workers", "decode"}
        assert set(seconds) == names
        assert seconds["compile"] is None
        assert 0 < seconds["imports"] < seconds["start"]
        assert len(seconds["steps"]) == 3
        assert seconds["step_median"] == sorted(seconds["steps"])[1]
        assert all(seconds[name] > 0 for name in ("start", "load", "text", "decode"))
        assert [rank["rank"] for rank in report["ranks"]] == [0, 1, 2, 3]
        for rank in report["ranks"]:
            assert set(rank) >= {"rank", "device", "device_name", "weight_bytes", "peak_bytes"}
            assert rank["device"] == "cpu"
            assert rank["peak_bytes"] > 50 * 2**20  # of the whole process: Python and torch alone take more

    def test_each_rank_holds_its_share_of_the_weights(self, group, single, untouched):
        """Megatron's scheme on the full models' parameters, counted here without the plan under test."""
        transformer = {name: p.nbytes for name, p in untouched.transformer.named_parameters()}
        matrix = re.compile(r"(transformer_blocks\..*|.*_modulation.*|norm_out\.linear)\.weight")
        split = sum(
            nbytes
            for name, nbytes in transformer.items()
            if (matrix.fullmatch(name) or name.startswith("single_transformer_blocks.")) and ".norm_" not in name
        )
        whole = sum(transformer.values()) - split
        assert split > 10 * whole > 0

        text = {
            name: p.nbytes
            for name, p in untouched.text_encoder.model.language_model.named_parameters()
            if not name.startswith("layers.4.") and name != "norm.weight"  # what comes after layer 4 is not read
        }
        norms = sum(nbytes for name, nbytes in text.items() if "norm" in name)
        kv = sum(nbytes for name, nbytes in text.items() if "k_proj" in name or "v_proj" in name)
        others = sum(text.values()) - norms - kv
        vae = sum(p.nbytes for p in untouched.vae.parameters())

        ranks = [rank["weight_bytes"] for rank in group.report()["ranks"]]
        for number, held in enumerate(ranks):
            assert held["transformer"] == split // 2 + whole  # over tp 2, on each of two ulysses ranks
            assert held["text_encoder"] == others // 4 + kv // 2 + norms  # over all 4, with 2 kv heads
            assert held.get("vae", 0) == (0 if number else vae)
        (alone,) = [rank["weight_bytes"] for rank in single.report()["ranks"]]
        assert alone == {"transformer": split + whole, "text_encoder": sum(text.values()), "vae": vae}


class TestEnvironment:
    def test_the_socket_is_private_and_gone_once_all_are_connected(self, group):
        launcher = Launcher(1, Devices("cpu"))
        launcher.start()
        try:
            assert stat.S_IMODE(launcher.private.stat().st_mode) == 0o700
            assert launcher.private.stat().st_uid == os.getuid()
            assert [entry.name for entry in launcher.private.iterdir()] == ["control"]
        finally:
            launcher.stop()
        assert not launcher.private.exists()
        assert not group.group._launcher.private.exists()

    def test_nothing_listens_beyond_this_machine(self, group):
        listening = listening_addresses(processes_of(group.group))
        assert len(listening) > 4  # the rendezvous, and each rank's own for gloo
        assert {address for address, _ in listening} == {"127.0.0.1"}

    def test_a_temporary_folder_with_a_long_path(self, tmp_path, monkeypatch):
        deep = tmp_path / ("d" * 100)
        deep.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(deep))
        launcher = Launcher(1, Devices("cpu"))
        launcher.start()
        launcher.stop()
        assert not launcher.private.exists()

    @pytest.mark.parametrize(
        ("number", "says"),
        [
            (errno.EMFILE, "raise the limit where it is started"),
            (errno.EAGAIN, "raise the limit of processes"),
            (errno.ENOSPC, "the disk is full"),
            (errno.EIO, "see what else runs here"),
        ],
    )
    def test_a_system_that_has_no_more_of_something(self, number, says, single_config, monkeypatch):
        def refused(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(launching.fork_server, "fork", refused)
        group = WorkerGroup(single_config.group)
        with pytest.raises(ValueError, match=f"the workers cannot be started: .*{os.strerror(number)}; .*{says}"):
            group.start()
        assert not group._launcher.private.exists()

    def test_no_more_open_files(self, single_config, monkeypatch):
        def refused(*_: object, **__: object) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(paths, "_try_socket", refused)
        with pytest.raises(ValueError, match="Too many open files; ComfyUI has as many files open as it may"):
            WorkerGroup(single_config.group).start()

    def test_the_ranks_logs_are_in_the_projects_home(self, group, own_home):
        assert own_home in group.group._launcher.logs.parents
        for rank in range(4):
            log = group.group._launcher.logs / f"rank-{rank}.log"
            assert stat.S_IMODE(log.stat().st_mode) == 0o600
        assert stat.S_IMODE(group.group._launcher.logs.stat().st_mode) == 0o700


class TestBeforeAnyProcess:
    """What can be known to be wrong beforehand is."""

    @pytest.mark.parametrize(
        ("layout", "devices", "dtype", "message"),
        [
            (ParallelismConfig(tp_size=2), "auto", "auto", "2 ranks but this machine has 1 GPU"),
            (ParallelismConfig(), "1", "auto", "name GPU 1, but this machine has 1 GPU"),
            (ParallelismConfig(), "cpu", "fp16", "dtype 'fp16' is not known; choose one of auto, bfloat16"),
            (ParallelismConfig(tp_size=3), "cpu", "auto", "8 attention heads"),
        ],
        ids=["more ranks than GPUs", "absent GPU", "dtype", "heads"],
    )
    def test_a_configuration(self, pipeline, no_process, monkeypatch, layout, devices, dtype, message):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(ValueError, match=message):
            ModelConfig.create(pipeline, layout, devices, dtype)

    @pytest.mark.parametrize(
        ("devices", "asked", "expected"),
        [("cpu", "auto", "float32"), ("0", "auto", "bfloat16"), ("cpu", "bfloat16", "bfloat16")],
    )
    def test_dtype(self, pipeline, no_process, monkeypatch, devices, asked, expected):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert ModelConfig.create(pipeline, ParallelismConfig(), devices, asked).dtype == expected

    def test_a_port_in_use(self, single_config, no_process, own_home):
        states = []
        logs = sorted((own_home / "logs").glob("*"))
        with socket.create_server(("localhost", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ValueError, match=f"port {port} cannot be used .*leave the port at 0"):
                WorkerGroup(single_config.group, port).start(lambda *state: states.append(state))
        assert states == [("failed", 0, 1, "")]
        assert sorted((own_home / "logs").glob("*")) == logs

    @pytest.mark.parametrize("port", [70000, -1])
    def test_a_port_out_of_range(self, single_config, no_process, port):
        with pytest.raises(ValueError, match=f"port {port} cannot be used"):
            WorkerGroup(single_config.group, port).start()


class TestLife:
    """Groups are found again, replaced and ended. The tests from here on end the groups that the others share."""

    def test_an_equal_configuration_finds_the_group(self, group, pipeline):
        equal = ModelConfig.create(str(pipeline), ParallelismConfig(tp_size=2, ulysses_size=2), " CPU ", "float32")
        states = []
        assert acquire_model(equal, lambda *state: states.append(state)) is group
        assert find_model(equal) is group
        assert states == []
        other = ModelConfig.create(pipeline, ParallelismConfig(tp_size=2, ring_size=2), "cpu")
        assert find_model(other) is None

    def test_a_closed_group_is_replaced(self, single, single_config, untouched):
        with Watched(processes_of(single.group)) as watched:
            single.group.close()
            assert watched.alive_after(1) == []
        assert find_model(single_config) is None
        with pytest.raises(WorkersFailedError, match="the worker group is closed"):
            evaluate(single, **inputs())
        single.group.close()

        states = []
        fresh = acquire_model(single_config, lambda *state: states.append(state))
        assert fresh is not single
        assert fresh is acquire_model(single_config)
        assert_works(fresh, untouched)
        assert states[0] == ("starting", 0, 1, "")
        assert states[-1][:3] == ("ready", 1, 1)
        assert re.fullmatch(r"started in \d+\.\d s \(imports \d+\.\d\), loaded in \d+\.\d s", states[-1][3])
        loading = [(done, total) for state, done, total, _ in states if state == "loading"]
        assert [detail for *_, detail in states][-2] == "ranks at 100 %"
        assert [done for done, _ in loading] == sorted(done for done, _ in loading)
        held = fresh.report()["ranks"][0]["weight_bytes"]
        assert loading[-1] == (sum(held.values()),) * 2

    def test_giving_up_while_starting_loses_nothing(self, single_config):
        group = WorkerGroup(single_config.group)
        states: list[str] = []

        def check() -> None:
            if group._launcher.process is not None:
                raise Cancelled

        with pytest.raises(Cancelled):
            group.start(lambda state, *_: states.append(state), check)
        assert group.usable
        assert not group.ready
        process = group._launcher.process
        group.start()
        assert group.ready
        assert group._launcher.process is process
        assert "failed" not in states
        with Watched(processes_of(group)) as watched:
            group.close()
            assert watched.alive_after(1) == []
        assert not group._launcher.private.exists()


class TestDeath:
    """A rank that dies takes its group with it, quickly and with an explanation; the next run has a fresh one."""

    @staticmethod
    def assert_explained(caught: pytest.ExceptionInfo, rank: int) -> None:
        first = str(caught.value).splitlines()[0]
        assert first.startswith(f"rank {rank} ended, killed by signal 9 (SIGKILL)")
        assert f"/rank-{rank}.log)" in first

    def test_a_rank_killed_while_idle(self, group, config, untouched):
        given = inputs()
        with Watched(processes_of(group.group)) as watched, Watched([group.group._pids[2]]) as victim:
            os.kill(group.group._pids[2], signal.SIGKILL)
            assert victim.alive_after(5) == []
            began = time.monotonic()
            with pytest.raises(WorkersFailedError) as caught:
                evaluate(group, **given)
            assert time.monotonic() - began < 10
            self.assert_explained(caught, 2)
            assert watched.alive_after(10) == []
        assert not group.group._launcher.private.exists()
        fresh = acquire_model(config)
        assert fresh is not group
        assert_works(fresh, untouched)

    def test_a_rank_killed_in_a_step(self, group):
        given = inputs(height=64, width=64, text=512)
        evaluate(group, **inputs() | {"context": given["context"]})
        killed_at: list[float] = []

        def check() -> None:
            if not killed_at:
                os.kill(group.group._pids[1], signal.SIGKILL)
                killed_at.append(time.monotonic())

        with Watched(processes_of(group.group)) as watched:
            with pytest.raises(WorkersFailedError) as caught:
                evaluate(group, **given, check=check)
            assert time.monotonic() - killed_at[0] < 10
            self.assert_explained(caught, 1)
            assert watched.alive_after(10) == []
        assert not group.ready


CLIENT = """
import json, os, signal, sys
import torch
from parallel_backend import ParallelismConfig, paths
from parallel_backend.families import Conditioning
from parallel_backend.runtime.group_config import ModelConfig
from parallel_backend.runtime.client.groups import acquire_model, find_group
from parallel_backend.runtime.client.fork_server import fork_server_pid

config = ModelConfig.create(sys.argv[1], ParallelismConfig(ring_size=2), "cpu")
told = []

def tell(*_):
    group = find_group(config.group)
    told.append([*group._pids.values(), group._launcher.process.pid, fork_server_pid()])
    print(json.dumps(told[0]), flush=True)

def held_up(state, *_):
    if state == "loading" and sys.argv[2] == "load" and not told:
        os.kill(find_group(config.group)._pids[1], signal.SIGSTOP)
        tell()
        print("stuck", flush=True)

group = acquire_model(config, held_up)
x, context = torch.randn(1, 128, 32, 32), torch.randn(1, 64, 192)
conditioning = Conditioning(context, tensors={"guidance": torch.tensor([4.0])})
group.predict(x, torch.tensor([0.5]), conditioning)
tell()
while True:
    waits = iter(range(1000))
    group.predict(
        x,
        torch.tensor([0.5]),
        conditioning,
        check=lambda: print("stuck", flush=True) if next(waits) == 20 else None,  # a second in one step
    )
"""


def test_the_end_of_a_run_is_told_and_not_waited_for(single_config, pipeline):
    group = WorkerGroup(single_config.group)  # not started: its one rank never answers
    model = RemoteModel(group, single_config, open_checkpoint(pipeline), "m0")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    group._channels[0] = Channel(ours)
    run = CacheRun(PRESETS["quality"], steps=4)
    model.end_run(run)
    assert Channel(theirs).receive()[0] == EndRun(1, "m0", run.id)
    theirs.close()
    model.end_run(run)  # a rank that is gone hides no error
    ours.close()


@pytest.mark.parametrize(("moment", "number"), [("predict", signal.SIGKILL), ("load", signal.SIGHUP)])
def test_workers_end_with_their_client(pipeline, tmp_path_factory, moment, number):
    """It is killed, or the terminal that all of its process group belongs to is closed."""
    command = [sys.executable, "-c", CLIENT, str(pipeline), moment]
    # Who is killed does not tidy up: the folder of the socket stays, so let it be in one that pytest removes.
    environment = os.environ | {"TMPDIR": str(tmp_path_factory.mktemp("tmp"))}
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as client:
        signal.signal(signal.SIGHUP, inherited)
        first, second, *others = json.loads(client.stdout.readline())
        with Watched([first, second, *others]) as watched, Watched([first]) as in_a_collective:
            if moment == "predict":
                os.kill(second, signal.SIGSTOP)
            try:
                assert client.stdout.readline() == b"stuck\n"  # the first rank waits for the second
                os.killpg(client.pid, number)
                assert in_a_collective.alive_after(10) == []
            finally:
                with contextlib.suppress(ProcessLookupError):  # it was killed, stopped as it is
                    os.kill(second, signal.SIGCONT)
            assert watched.alive_after(10) == []
