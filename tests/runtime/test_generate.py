"""Pictures of every pipeline class, drawn by workers, against diffusers' pipeline of that class in this process."""

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers import AutoImageProcessor, BatchFeature

from parallel_backend import ParallelismConfig
from parallel_backend.cache.config import parse_cache
from parallel_backend.drawing.image_request import ImageRequest
from parallel_backend.drawing.sampling import draw
from parallel_backend.families.flux2.family import FLUX2
from parallel_backend.families.qwen_image.drawing import QwenImageEditDrawing, QwenImageEditPlusDrawing
from parallel_backend.families.qwen_image.family import QWEN_IMAGE
from parallel_backend.runtime.client.groups import acquire_model, close_groups
from parallel_backend.runtime.client.remote_model import RemoteModel
from parallel_backend.runtime.group_config import ModelConfig

pytestmark = pytest.mark.timeout(180)

TOLERANCE = 1e-5
"""Of the last latent, in fp32: layouts only reorder sums; 1e-6 was seen after two steps under true CFG."""
LAYOUT = ParallelismConfig(ulysses_size=2, tp_size=2)
SMALL = {"vision": 96 * 96, "reference": 128 * 128}
"""Areas of reference images in the place of a megapixel, so that tests do not wait for it."""


@pytest.fixture(scope="module", autouse=True)
def groups():
    yield
    close_groups()


@pytest.fixture(scope="module")
def remote():
    """From a folder to its model in four ranks, which are the same for all folders."""
    return lambda folder: acquire_model(ModelConfig.create(folder, LAYOUT, "cpu"))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of soft spots."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


class Processor:
    """Stands in for transformers' processor of text and images, which cannot be made without torchvision."""

    def __init__(self, pipe, folder) -> None:
        self.tokenizer, self.image_processor = pipe.tokenizer, AutoImageProcessor.from_pretrained(folder / "processor")

    def __call__(self, text, images, padding, return_tensors) -> BatchFeature:
        seen = self.image_processor(images, return_tensors="pt")
        token, ids = self.tokenizer.convert_tokens_to_ids("<|image_pad|>"), []
        counts = (seen["image_grid_thw"].prod(-1) // 4).tolist()
        for one in self.tokenizer(text[0])["input_ids"]:
            ids += [token] * counts.pop(0) if one == token else [one]
        assert not counts
        ids = torch.tensor([ids])
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids), **seen})


def load(kind, folder):
    """diffusers' pipeline, whose text encoder is told which tokens are images: transformers 5 wants to know that."""
    pipe = kind.from_pretrained(folder, **({} if kind in (QwenImagePipeline, Flux2Pipeline) else {"processor": None}))
    pipe.set_progress_bar_config(disable=True)
    if kind not in (QwenImagePipeline, Flux2Pipeline):
        pipe.processor = Processor(pipe, folder)

        def tell(module, args, kwargs):
            return args, kwargs | {"mm_token_type_ids": (kwargs["input_ids"] == module.config.image_token_id).int()}

        pipe.text_encoder.register_forward_pre_hook(tell, with_kwargs=True)
    return pipe


def expected(pipe, request: ImageRequest, **options) -> tuple[torch.Tensor, Image.Image]:
    """The last latent in diffusers' packed order, and the picture."""
    latents = []
    picture = pipe(
        prompt=request.prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        generator=torch.Generator().manual_seed(request.seed),
        callback_on_step_end=lambda pipe, step, timestep, tensors: latents.append(tensors["latents"]) or tensors,
        **options,
    ).images[0]
    return latents[-1], picture


def drawn(model: RemoteModel, request: ImageRequest, monkeypatch) -> tuple[torch.Tensor, Image.Image]:
    """The last latent as the workers have it, and the picture."""
    decode, latents = model.decode, []
    monkeypatch.setattr(model, "decode", lambda latent: latents.append(latent) or decode(latent))
    picture = draw(model, request)
    return latents[0], picture


def assert_alike(actual, wanted) -> None:
    (latent, picture), (expected_latent, expected_picture) = actual, wanted
    assert latent.shape == expected_latent.shape
    assert (latent - expected_latent).norm() <= TOLERANCE * expected_latent.norm()
    pixels, expected_pixels = np.asarray(picture, int), np.asarray(expected_picture, int)
    assert pixels.shape == expected_pixels.shape
    assert np.abs(pixels - expected_pixels).max() <= 2
    assert expected_pixels.std() > 20


def unpack(packed: torch.Tensor, width: int, height: int) -> torch.Tensor:
    return QwenImagePipeline._unpack_latents(packed, height, width, 8)


@pytest.fixture
def small_references(monkeypatch):
    calculate = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(
        pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: calculate(SMALL["reference"], ratio)
    )
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", SMALL["vision"])
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", SMALL["reference"])
    monkeypatch.setattr(QwenImageEditDrawing, "vision_area", SMALL["reference"])
    monkeypatch.setattr(QwenImageEditDrawing, "reference_area", SMALL["reference"])
    monkeypatch.setattr(QwenImageEditPlusDrawing, "vision_area", SMALL["vision"])


def test_flux2_with_references(remote, pipeline, monkeypatch):
    images = (photo(100, 70), photo(75, 131, seed=1))
    request = ImageRequest("make the sky orange", 64, 96, 2, 5, guidance=2.5, images=images)
    pipe = load(Flux2Pipeline, pipeline)
    packed, picture = expected(pipe, request, image=list(images), guidance_scale=2.5, text_encoder_out_layers=(1, 2, 4))
    latent = pipe._unpack_latents_with_ids(packed, pipe._prepare_latent_ids(torch.empty(1, 128, 6, 4)))
    assert_alike(drawn(remote(pipeline), request, monkeypatch), (latent, picture))


@pytest.mark.parametrize(
    ("prompt", "negative", "cfg"),
    [("a red circle", None, None), ("", "low quality, blurry", 2.5), ("a cat, " * 600, None, 1.0)],
    ids=["the family's cfg", "a longer negative prompt", "no cfg, a prompt that is cut"],
)
def test_qwen_image(remote, qwen_folder, monkeypatch, prompt, negative, cfg):
    folder = qwen_folder("QwenImagePipeline")
    request = ImageRequest(prompt, 112, 80, 2, 5, cfg=cfg, negative_prompt=negative)
    options = {} if cfg == 1 else {"negative_prompt": negative or " ", "true_cfg_scale": cfg or 4.0}
    packed, picture = expected(load(QwenImagePipeline, folder), request, **options)
    assert_alike(drawn(remote(folder), request, monkeypatch), (unpack(packed, 112, 80), picture))


@pytest.mark.usefixtures("small_references")
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [(QwenImageEditPipeline, [(70, 100)]), (QwenImageEditPlusPipeline, [(70, 100), (200, 90), (64, 64)])],
    ids=["edit", "plus, three images"],
)
def test_qwen_image_edit(remote, qwen_folder, monkeypatch, kind, sizes):
    folder = qwen_folder(kind.__name__)
    images = tuple(photo(*size, seed=seed) for seed, size in enumerate(sizes))
    request = ImageRequest("make the sky orange", 80, 96, 2, 5, images=images)
    given = images[0] if kind is QwenImageEditPipeline else list(images)
    options = {"image": given, "negative_prompt": " ", "true_cfg_scale": 4.0}
    packed, picture = expected(load(kind, folder), request, **options)
    assert_alike(drawn(remote(folder), request, monkeypatch), (unpack(packed, 80, 96), picture))


def test_cond_and_uncond_are_cached_apart(remote, qwen_folder):
    model = remote(qwen_folder("QwenImagePipeline"))
    cache = parse_cache("Fn_compute_blocks=1,residual_diff_threshold=1,max_warmup_steps=2")
    draw(model, ImageRequest("a red circle", 64, 64, steps=4), cache=cache)
    report = model.report()["cache"]
    computed = [True] * 4 + [False] * 4
    assert (report["streams"], report["steps"]) == (2, 4)
    assert [(e["stream"], e["computed"]) for e in report["evaluations"]] == list(zip([0, 1] * 4, computed, strict=True))


def test_sizes_follow_the_images_as_in_diffusers():
    wide, tall = photo(300, 100), photo(90, 200)
    plus = QWEN_IMAGE.drawing("QwenImageEditPlusPipeline")
    assert plus.default_size([wide, tall]) == pipeline_qwenimage_edit_plus.calculate_dimensions(1024**2, 90 / 200)
    flux = FLUX2.drawing("Flux2Pipeline")
    assert flux.default_size([]) == (1024, 1024)
    assert flux.default_size([photo(100, 70), tall]) == (96, 64)
    width, height = flux.default_size([photo(3000, 1000)])
    assert (width, height) == (1760, 576)
    assert flux.reference_pixels([photo(3000, 1000)])[0].shape == (1, 3, height, width)
