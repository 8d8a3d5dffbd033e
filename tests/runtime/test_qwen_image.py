"""Qwen-Image in real worker processes, against diffusers and transformers in this process."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from safetensors.torch import save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from parallel_backend import ParallelismConfig
from parallel_backend.cache.config import PRESETS
from parallel_backend.cache.run import CacheRun
from parallel_backend.families import Conditioning, VisionImage
from parallel_backend.runtime.client.groups import acquire_model, close_groups
from parallel_backend.runtime.client.remote_model import RemoteModel
from parallel_backend.runtime.group_config import ModelConfig
from tests.errors import relative_error
from tests.tiny_qwen import make_tiny_qwen, single_file_tensors

pytestmark = pytest.mark.timeout(180)

TOLERANCE = 1e-5
"""fp32: the layouts only reorder sums."""
LAYOUT = ParallelismConfig(ulysses_size=2, tp_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield make_tiny_qwen(tmp_path_factory.mktemp("qwen") / "edit", "QwenImageEditPlusPipeline")
    close_groups()


@pytest.fixture(scope="module")
def model(folder) -> RemoteModel:
    return acquire_model(ModelConfig.create(folder, LAYOUT, "cpu"))


@pytest.fixture(scope="module")
def transformer(folder) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel.from_pretrained(folder / "transformer").eval()


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def expected_prediction(transformer, x, timestep, conditioning) -> torch.Tensor:
    """The untouched transformer."""
    images = [x, *(reference.expand(x.shape[0], -1, -1, -1, -1) for reference in conditioning.references)]
    tokens = [image.squeeze(2).unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5) for image in images]
    mask = conditioning.tensors.get("mask")
    out = transformer(
        hidden_states=torch.cat([part.flatten(3).flatten(1, 2) for part in tokens], 1),
        encoder_hidden_states=conditioning.context,
        encoder_hidden_states_mask=None if mask is None else mask.bool(),
        timestep=timestep,
        img_shapes=[[(1, part.shape[1], part.shape[2]) for part in tokens]] * x.shape[0],
        return_dict=False,
    )[0]
    rows, columns = tokens[0].shape[1:3]
    out = out[:, : rows * columns].reshape(x.shape[0], rows, columns, 16, 2, 2)
    return out.permute(0, 3, 1, 4, 2, 5).reshape(x.shape[0], 16, 1, 2 * rows, 2 * columns)


def given(batch: int = 1, text: int = 7, references: int = 1, mask: torch.Tensor | None = None, seed: int = 0):
    conditioning = Conditioning(
        noise(seed, batch, text, 128),
        [noise(seed + 1 + n, 1 if n else batch, 16, 1, 4, 6) for n in range(references)],
        {} if mask is None else {"mask": mask},
        {"positions": "diffusers"},
    )
    return noise(seed + 9, batch, 16, 1, 6, 8), torch.linspace(0.8, 0.3, batch), conditioning


@pytest.mark.parametrize("references", [0, 1, 3])
def test_references_and_batch(model, transformer, references):
    arguments = given(batch=2, references=references)
    assert relative_error(model.predict(*arguments), expected_prediction(transformer, *arguments)) <= TOLERANCE


def test_masks_of_different_lengths(model, transformer):
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 4:], mask[1, 6:] = 0, 0
    arguments = given(batch=2, mask=mask)
    assert relative_error(model.predict(*arguments), expected_prediction(transformer, *arguments)) <= TOLERANCE
    arguments = given(mask=torch.ones(1, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"a text mask of \[1, 6\] does not fit text of \[1, 7\]"):
        model.predict(*arguments)


def test_what_the_family_does_not_take(model):
    x, timestep, conditioning = given()
    with pytest.raises(
        ValueError, match="Qwen-Image in the parallel workers does not take guidance, reference_method=x"
    ):
        model.predict(
            x, timestep, Conditioning(conditioning.context, (), {"guidance": timestep}, {"reference_method": "x"})
        )
    with pytest.raises(ValueError, match=r"the latent has 4 frames \(or layers\), Qwen-Image takes one picture"):
        model.predict(noise(1, 1, 16, 4, 4, 4), timestep, conditioning)


def test_cond_and_uncond_have_streams_of_their_own(model):
    """Prompts of different lengths and batches take turns, and each is cached by itself."""
    run = CacheRun(PRESETS["speed"], steps=12)
    streams = {"cond": given(text=9, references=0), "uncond": given(batch=2, text=4, references=0, seed=20)}
    for step in range(12):
        for stream, (x, timestep, conditioning) in streams.items():
            sigma = timestep * 0 + 0.9 - 0.0001 * step
            model.predict(x, sigma, conditioning, cache=(run, run.evaluation(stream, step)))
    model.end_run(run)
    computed = [(e["stream"], e["computed"]) for e in run.report()["evaluations"]]
    for stream in range(len(streams)):
        decided = [was for name, was in computed if name == stream]
        assert len(decided) == 12
        assert decided[0]
        assert not all(decided), "nothing was cached"


def test_text_with_and_without_images(model, folder):
    oracle = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval()
    image_token = oracle.config.image_token_id
    ids = torch.randint(300, 600, (1, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    grids = [(1, 4, 6), (1, 8, 4)]
    images = [VisionImage(noise(n, grid[1] * grid[2], 1176), grid) for n, grid in enumerate(grids)]
    with torch.no_grad():
        plain = oracle(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        assert relative_error(model.encode_text(ids, mask), plain) <= TOLERANCE
        seen = ids.clone()
        seen[0, 5:11], seen[0, 20:28] = image_token, image_token
        expected = oracle(
            seen,
            attention_mask=mask,
            pixel_values=torch.cat([image.patches for image in images]),
            image_grid_thw=torch.tensor(grids),
            mm_token_type_ids=(seen == image_token).int(),
            output_hidden_states=True,
        ).hidden_states[-1]
    assert relative_error(model.encode_text(seen, mask, images), expected) <= TOLERANCE
    # The tower is there only while it works.
    assert {rank["places"].get("vision_tower") for rank in model.report()["ranks"]} <= {None, "file"}
    with pytest.raises(ValueError, match="the prompt has room for 14 image tokens, but the images make 6"):
        model.encode_text(seen, mask, images[:1])
    with pytest.raises(ValueError, match=r"24 patches do not make a grid of \(1, 4, 8\)"):
        model.encode_text(seen, mask, [VisionImage(images[0].patches, (1, 4, 8))])
    assert relative_error(model.encode_text(ids, mask), plain) <= TOLERANCE


def test_vae(model, folder):
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae").eval()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    latent, image = noise(1, 1, 16, 1, 6, 5), noise(2, 1, 3, 1, 40, 48).clamp(-1, 1)
    with torch.no_grad():
        decoded = model.decode(latent).clamp(-1, 1)
        assert relative_error(decoded, vae.decode(latent * std + mean).sample) <= TOLERANCE
        assert relative_error(model.encode(image), (vae.encode(image).latent_dist.mode() - mean) / std) <= TOLERANCE


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_file(transformer, tmp_path, prefix):
    """Its mark says that references are taken as at timestep 0."""
    path = tmp_path / "qwen_image_edit.safetensors"
    save_file({prefix + name: tensor for name, tensor in single_file_tensors(transformer).items()}, path)
    model = acquire_model(ModelConfig.create(path, LAYOUT, "cpu"))
    arguments = given(references=2)
    assert relative_error(model.predict(*arguments), expected_prediction(transformer, *arguments)) <= TOLERANCE
