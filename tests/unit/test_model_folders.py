"""Model folders as people have them: what is found in them, what is noticed, and what they cannot break."""

import errno
import mmap
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from parallel_backend.loading import model_folders
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.loading.content import content_digest
from parallel_backend.loading.model_folders import files_below, model_name, pipelines_in
from parallel_backend.loading.pipeline_folder import open_pipeline_folder
from parallel_backend.loading.weight_loader import load_weights
from parallel_backend.mesh import Axis
from parallel_backend.parallel.tensor import apply_tensor_parallel
from tests.single_file import flux2_tensors, write
from tests.text_encoder_file import tekken, write_text
from tests.tiny_pipeline import make_tiny_pipeline
from tests.vae_file import write_vae

NOT_TEXT = b"caf\xe9"
"""A name in Latin-1."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("made") / "tiny")


def pipeline(folder: Path) -> Path:
    """Something that is taken for a pipeline folder."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    return folder


def in_cache(root: Path, pipeline: Path, name: str, revision: str = "0123abcd", main: bool = True) -> Path:
    """A pipeline as the Hub's cache keeps it: files are links from a revision's folder into one of blobs."""
    home = root / f"models--{name.replace('/', '--')}"
    (home / "blobs").mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted(file for file in pipeline.glob("**/*") if file.is_file())):
        blob = home / "blobs" / f"{revision}-{number:040x}"
        shutil.copy2(file, blob)
        link = home / "snapshots" / revision / file.relative_to(pipeline)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if main:
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(revision)
    return home / "snapshots" / revision


class TestNames:
    def test_folders_at_any_depth(self, tmp_path):
        for name in ("plain", "black-forest-labs/FLUX.2-dev", "images/Qwen/Qwen-Image"):
            pipeline(tmp_path / name)
        pipeline(tmp_path / "plain" / "inner")  # a part of the pipeline around it
        (tmp_path / "nothing").mkdir()
        assert pipelines_in(tmp_path).keys() == {"plain", "black-forest-labs/FLUX.2-dev", "images/Qwen/Qwen-Image"}

    def test_a_folder_that_is_itself_a_pipeline(self, tmp_path):
        folder = pipeline(tmp_path / "FLUX.2-dev")
        assert pipelines_in(folder) == {"FLUX.2-dev": folder}

    def test_links_to_folders_and_round_in_a_circle(self, tmp_path):
        elsewhere = pipeline(tmp_path / "elsewhere" / "model")
        root = tmp_path / "root"
        (root / "deep").mkdir(parents=True)
        (root / "linked").symlink_to(elsewhere)
        (root / "again").symlink_to(elsewhere)
        (root / "deep" / "up").symlink_to(root)
        (root / "itself").symlink_to("itself")
        assert pipelines_in(root).keys() == {"linked", "again"}

    def test_the_hubs_cache(self, tmp_path, tiny):
        main = in_cache(tmp_path, tiny, "ORG/NAME")
        other = in_cache(tmp_path, tiny, "ORG/NAME", "ffff", main=False)
        lone = in_cache(tmp_path / "hub", tiny, "someone/fine-tune", main=False)
        assert pipelines_in(tmp_path) == {
            "ORG/NAME": main,
            "models--ORG--NAME/snapshots/ffff": other,
            "hub/someone/fine-tune": lone,
        }
        assert (model_name(main), model_name(lone), model_name(tmp_path / "x")) == ("NAME", "fine-tune", "x")
        for file in (main / "model_index.json", main.parent.parent / "refs" / "main"):
            assert file.is_file()
        open_checkpoint(main).check_weights()

    def test_a_folder_goes_before_the_hubs_cache(self, tmp_path, tiny):
        folder, cached = pipeline(tmp_path / "ORG" / "NAME"), in_cache(tmp_path, tiny, "ORG/NAME")
        assert pipelines_in(tmp_path)["ORG/NAME"] == folder
        assert cached in pipelines_in(tmp_path).values()

    @pytest.mark.parametrize("text", ["../../../../outside", "gone", "", "\0"])
    def test_a_main_revision_that_is_not_there(self, tmp_path, tiny, text):
        main = in_cache(tmp_path / "root", tiny, "ORG/NAME")
        pipeline(tmp_path / "outside")
        (main.parent.parent / "refs" / "main").write_text(text)
        assert pipelines_in(tmp_path / "root") == {"ORG/NAME": main}


class TestWhatCannotBeRead:
    """One entry of a folder takes nothing away but itself."""

    def test_links_that_lead_nowhere(self, tmp_path):
        pipeline(tmp_path / "good")
        (tmp_path / "broken").symlink_to("nowhere")
        (tmp_path / "long").symlink_to("n" * 300)  # an error other than that it is not there
        (tmp_path / "circle").symlink_to("circle")
        (tmp_path / "index").mkdir()
        (tmp_path / "index" / "model_index.json").symlink_to("n" * 300)
        assert pipelines_in(tmp_path).keys() == {"good"}

    @pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOTCONN])
    def test_a_folder_whose_disk_fails(self, tmp_path, monkeypatch, code, caplog):
        pipeline(tmp_path / "good")
        pipeline(tmp_path / "lost+found")
        scandir, isfile = os.scandir, os.path.isfile

        def fail(path):
            if "lost+found" in str(path):
                raise OSError(code, os.strerror(code))
            return scandir(path)

        monkeypatch.setattr(model_folders, "_told", set())
        monkeypatch.setattr(os, "scandir", fail)
        monkeypatch.setattr(os.path, "isfile", lambda path: "lost+found" not in str(path) and isfile(path))
        for _ in range(2):
            assert pipelines_in(tmp_path).keys() == {"good"}
        (line,) = [record.getMessage() for record in caplog.records if "lost+found" in record.getMessage()]
        assert os.strerror(code) in line

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    def test_a_folder_that_another_user_may_not_see(self, tmp_path):
        tmp_path.chmod(0o755)
        for parent in tmp_path.parents:  # pytest's own, of which there are more with several processes
            if parent.owner() == tmp_path.owner() and parent.name.startswith(("pytest-", "popen-")):
                parent.chmod(0o755)
        pipeline(tmp_path / "good")
        for mode, name in ((0o700, "lost+found"), (0o744, "listed"), (0o711, "searched")):
            pipeline(tmp_path / name / "inner")
            (tmp_path / name).chmod(mode)
        code = f"""\
            import os, sys
            sys.path.insert(0, {str(Path(model_folders.__file__).parents[2])!r})
            from pathlib import Path
            from parallel_backend.loading.model_folders import pipelines_in
            os.setgid(65534)
            os.setuid(65534)
            print(sorted(pipelines_in(Path({str(tmp_path)!r}))))
        """
        result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
        assert result.stdout == "['good']\n", result.stderr

    def test_no_root(self, tmp_path, caplog):
        assert pipelines_in(tmp_path / "none") == {}
        assert not caplog.records  # a ComfyUI without that folder is as good as any


class TestLinkedComponents:
    """The transformer of a pipeline folder is a link to a folder elsewhere."""

    @pytest.fixture
    def folder(self, tmp_path, tiny):
        folder = shutil.copytree(tiny, tmp_path / "model")
        shutil.move(folder / "transformer", tmp_path / "shared")
        (folder / "transformer").symlink_to("../shared")
        return folder

    @pytest.fixture
    def weights(self, folder):
        (file,) = (folder / "transformer").glob("*.safetensors")
        return file

    def test_it_is_loaded(self, folder):
        open_pipeline_folder(folder).check_weights()

    def test_a_changed_file_is_noticed(self, folder, weights):
        before = open_pipeline_folder(folder).fingerprint()
        status = weights.stat()
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
        assert open_pipeline_folder(folder).fingerprint() != before

    def test_a_link_to_another_folder_is_noticed(self, folder, weights):
        """Of equal sizes and times: what else would tell them apart?"""
        before = open_pipeline_folder(folder).fingerprint()
        shutil.copytree(folder / "transformer", folder.parent / "other")  # with its times
        (folder / "transformer").unlink()
        (folder / "transformer").symlink_to("../other")
        assert open_pipeline_folder(folder).fingerprint() != before

    def test_hosts_with_other_weights_differ(self, folder, weights, tmp_path):
        copy = shutil.copytree(folder, tmp_path / "host" / "model")  # links become folders
        assert content_digest(copy) == content_digest(folder)
        tensors = load_file(weights)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
        assert content_digest(copy) != content_digest(folder)

    def test_a_link_among_a_snapshots_files(self, tmp_path, tiny):
        folder = in_cache(tmp_path, tiny, "ORG/NAME")
        before, content = open_checkpoint(folder).fingerprint(), content_digest(folder)
        file = next(folder.glob("transformer/*.safetensors"))
        assert file.is_symlink()
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
        assert open_checkpoint(folder).fingerprint() != before
        assert content_digest(folder) != content

    def test_the_words_of_a_tokenizer(self, folder):
        (folder / "tokenizer" / "merges.txt").write_text("a b")
        before, content = open_pipeline_folder(folder).fingerprint(), content_digest(folder)
        (folder / "tokenizer" / "merges.txt").write_text("a b\nc d")
        assert open_pipeline_folder(folder).fingerprint() != before
        assert content_digest(folder) != content

    def test_a_blob_that_is_gone(self, tmp_path, tiny):
        folder = in_cache(tmp_path, tiny, "ORG/NAME")
        file = next(folder.glob("transformer/*.safetensors"))
        Path(os.path.realpath(file)).unlink()
        with pytest.raises(ValueError, match=r"is missing: it is a link to \S*blobs/\S*, which is not there"):
            open_checkpoint(folder).check_weights()


class TestFiles:
    @pytest.fixture
    def file(self, tmp_path):
        return write(tmp_path / "model.safetensors", flux2_tensors())

    @pytest.mark.parametrize("name", ["model.sft", "MODEL.SAFETENSORS", "model.Sft"])
    def test_sft_is_the_same_as_safetensors(self, file, name):
        file = file.rename(file.parent / name)
        assert open_checkpoint(file).components == ("transformer",)

    def test_a_link_to_another_file_is_noticed(self, file, tmp_path):
        link = tmp_path / "link.safetensors"
        link.symlink_to(file)
        before = open_checkpoint(link).fingerprint()
        link.unlink()
        link.symlink_to(shutil.copy2(file, tmp_path / "other.safetensors"))
        assert open_checkpoint(link).fingerprint() != before

    def test_files_beside_that_some_systems_make(self, tmp_path, tiny):
        folder = shutil.copytree(tiny, tmp_path / "tiny")
        for file in folder.glob("*/*.safetensors"):
            file.with_name(f"._{file.name}").write_bytes(b"\0\5\26\7")
        open_checkpoint(folder).check_weights()

    def test_a_file_without_rights(self, file, monkeypatch):
        def refuse(*arguments, **named):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
            content_digest(file)


class TestNamesThatAreNoText:
    """No library that reads models takes them, so they are refused; whatever else is in a folder works."""

    def test_a_file(self, tmp_path):
        file = write(tmp_path / "model.safetensors", {"a": torch.zeros(1)})
        file = file.rename(tmp_path / os.fsdecode(NOT_TEXT + b".safetensors"))
        with pytest.raises(ValueError, match=r"caf\\xe9\.safetensors is not UTF-8.*rename") as caught:
            open_checkpoint(file)
        str(caught.value).encode()  # or no log could hold it

    def test_a_pipeline_folder(self, tmp_path, tiny):
        folder = shutil.copytree(tiny, tmp_path / os.fsdecode(NOT_TEXT))
        assert pipelines_in(tmp_path) == {os.fsdecode(NOT_TEXT): folder}
        with pytest.raises(ValueError, match=r"caf\\xe9 is not UTF-8.*rename") as caught:
            open_checkpoint(folder)
        str(caught.value).encode()

    def test_a_file_within_one(self, tmp_path, tiny):
        folder = shutil.copytree(tiny, tmp_path / "tiny")
        (folder / os.fsdecode(NOT_TEXT + b".json")).write_text("{}")
        assert os.fsdecode(NOT_TEXT + b".json") in [file.name for file in files_below(folder)]
        source = open_checkpoint(folder)
        source.check_weights()
        assert source.fingerprint()
        assert content_digest(folder)


class TestDisksThatMapNothing:
    """Network disks on which mmap fails: safetensors' own functions map files, and so did columns of weights."""

    @pytest.fixture(autouse=True)
    def _nothing_is_mapped(self, monkeypatch):
        def refuse(*arguments, **named):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

        monkeypatch.setattr(mmap, "mmap", refuse)
        # They map by themselves; diffusers and this library have to do without.
        monkeypatch.setattr(safetensors.torch, "load_file", refuse)
        monkeypatch.setattr(safetensors, "safe_open", refuse)
        for module in [module for name, module in sys.modules.items() if name.startswith("parallel_backend")]:
            for name, own in (("safe_open", safe_open), ("load_file", load_file)):
                if getattr(module, name, None) is own:
                    monkeypatch.setattr(module, name, refuse)

    def test_a_pipelines_vae(self, tiny):
        vae = open_pipeline_folder(tiny).family.needs_vae().load(tiny / "vae", open_pipeline_folder(tiny).vae_config)
        (file,) = (tiny / "vae").glob("*.safetensors")
        stored = load_file(file)
        assert all(torch.equal(tensor, stored[name]) for name, tensor in vae.state_dict().items())

    def test_a_vae_file(self, tmp_path):
        file = write_vae(tmp_path / "vae.safetensors")
        vae, stored = open_checkpoint(file).load(), load_file(file)
        assert all(torch.equal(tensor, stored[name].float()) for name, tensor in vae.state_dict().items())

    def test_a_tokenizer_in_a_file(self, tmp_path):
        source = open_checkpoint(write_text(tmp_path / "mistral.safetensors"))
        assert source.read_tokenizer() == tekken()

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_ranks_columns(self, tmp_path, rank):
        tensors = flux2_tensors()
        source = open_checkpoint(write(tmp_path / "model.safetensors", tensors))
        model = source.family.transformer.build(source.transformer_config)
        table = apply_tensor_parallel(model, source.family.transformer.plan(dict(model.config)), Axis(None, 2, rank))
        load_weights(model, source.weights("transformer"), table, device=torch.device("cpu"), dtype=torch.float32)
        name = "transformer_blocks.0.ff.linear_out.weight"
        assert table[name].dim == 1
        full = tensors["double_blocks.0.img_mlp.2.weight"]
        assert torch.equal(model.get_parameter(name), table[name].take(full))
