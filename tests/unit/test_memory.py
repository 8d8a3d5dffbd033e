"""The memory estimate: the weights of reference models on each layout, and how activations go with it."""

from pathlib import Path

import pytest

from parallel_backend.cli.doctor import check_formats
from parallel_backend.config import ParallelismConfig
from parallel_backend.families import FAMILIES, family_of_name
from parallel_backend.planning.fits import best_fit, fits_table, usable
from parallel_backend.planning.memory import (
    GIB,
    RUNTIME_BYTES,
    can_split,
    layout_fits,
    reference_config,
    reference_memory,
    reference_step_bytes,
    step_activation_bytes,
    transformer_activation_bytes,
    vae_activation_bytes,
    weight_bytes,
)

FLUX2, QWEN, WAN = (family_of_name(name) for name in ("flux2", "qwen_image", "wan"))


def weights(family=FLUX2, dtype_bytes=2, **degrees):
    text = family.reference_model.text_config
    return weight_bytes(family, reference_config(family), text, ParallelismConfig(**degrees), dtype_bytes)


def test_flux2_dev_whole():
    whole = weights()
    assert whole.transformer / GIB == pytest.approx(60.0, abs=0.1)
    # 30 of 40 layers, no lm_head: by hand 30 * (2 * 5120 * 4096 + 2 * 5120 * 1024 + 3 * 5120 * 32768) + 131072 * 5120.
    assert whole.text_encoder / GIB == pytest.approx(32.3, abs=0.1)
    assert whole.vae / GIB == pytest.approx(0.313, abs=0.01)  # fp32
    assert whole.total == whole.transformer + whole.text_encoder + whole.vae


def test_qwen_image_whole():
    whole = weights(family_of_name("qwen_image"))
    assert whole.transformer == pytest.approx(2 * 20.43e9, rel=1e-3)
    # Qwen2.5-VL-7B's text model by hand, without biases and norms, and without lm_head.
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    assert whole.text_encoder == pytest.approx(2 * (28 * layer + 152064 * 3584), rel=1e-3)


@pytest.mark.parametrize(("tp", "most"), [(2, 30.8), (4, 16.1), (8, 8.0)])
def test_tensor_parallelism_splits_the_transformer(tp, most):
    got = weights(tp_size=tp).transformer / GIB
    assert 60.0 / tp < got <= most


@pytest.mark.parametrize("degrees", [{"ulysses_size": 8}, {"ring_size": 8}, {"ulysses_size": 2, "ring_size": 4}])
def test_context_parallelism_keeps_the_transformer_whole_and_splits_the_text_encoder(degrees):
    whole, got = weights(), weights(**degrees)
    assert got.transformer == whole.transformer
    # Only the norms' weights are on every rank.
    assert whole.text_encoder / 8 < got.text_encoder < whole.text_encoder / 8 * 1.001


def test_text_encoder_over_ranks_that_its_heads_do_not_divide_by():
    # 32 heads do not divide by 3: every rank holds it whole; of 6 ranks, 2 share a copy.
    assert weights(ring_size=3).text_encoder == weights().text_encoder
    assert weights(ring_size=6).text_encoder == weights(ring_size=2).text_encoder


def test_dtype_scales_all_but_the_vae():
    single = weights(dtype_bytes=4)
    assert single.transformer == 2 * weights().transformer
    assert single.text_encoder == 2 * weights().text_encoder
    assert single.vae == weights().vae


def test_a_layout_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="48 attention heads, which do not divide by tp x ulysses = 5"):
        weights(tp_size=5)


@pytest.mark.parametrize(
    # GiB: the peak of allocations in a forward of one double and one single block traced on the meta device, rank 0.
    ("degrees", "traced"),
    [
        ({}, 1.085),
        ({"tp_size": 2}, 0.611),
        ({"tp_size": 8}, 0.417),
        ({"ulysses_size": 2}, 0.551),
        ({"ulysses_size": 8}, 0.150),
        ({"ulysses_size": 4, "tp_size": 2}, 0.165),
        ({"ulysses_size": 2, "tp_size": 4}, 0.217),
    ],
)
def test_activations_agree_with_traced_allocations(degrees, traced):
    got = transformer_activation_bytes(FLUX2, reference_config(FLUX2), ParallelismConfig(**degrees), 4096 + 512) / GIB
    assert got == pytest.approx(traced, rel=0.1)


@pytest.mark.parametrize(
    # GiB beside the weights, rank 0, 1328 x 1328 and 512 tokens of text, by benchmarks/against_cache_dit.py on an H100.
    ("degrees", "measured"),
    [({"ulysses_size": 2}, 0.35), ({"tp_size": 2}, 0.50), ({"tp_size": 8}, 0.52)],
)
def test_qwen_images_activations_agree_with_what_a_gpu_needed(degrees, measured):
    layout, tokens = ParallelismConfig(**degrees), 83 * 83 + 512
    got = transformer_activation_bytes(QWEN, reference_config(QWEN), layout, tokens) / GIB
    assert got == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("side", "measured"), [(1024, 8.26), (1328, 13.89)])
def test_qwen_images_vae_agrees_with_what_a_gpu_needed(side, measured):
    config = {"base_dim": 96, "dim_mult": [1, 2, 4, 4]}
    assert vae_activation_bytes(QWEN, config, side**2) / GIB == pytest.approx(measured, rel=0.05)


def test_ranks_that_share_a_frame_share_what_it_takes():
    config = {"base_dim": 96, "block_out_channels": [128, 256, 512, 512]}
    for family, share in ((QWEN, 4), (FLUX2, 1)):
        alone, of_four = (vae_activation_bytes(family, config, 1024**2, ranks) for ranks in (1, 4))
        assert of_four * share == alone


@pytest.mark.parametrize(
    # GiB of allocated memory at its highest, rank 0, read on an H200 by benchmarks/layout_memory.py (torch 2.11).
    ("degrees", "measured"),
    [
        ({}, 97.46),
        ({"tp_size": 2}, 51.46),
        ({"tp_size": 8}, 17.03),
        ({"ring_size": 8}, 69.20),
        ({"ulysses_size": 4, "tp_size": 2}, 39.35),
        ({"ulysses_size": 2, "tp_size": 4}, 24.43),
        ({"ulysses_size": 2, "ring_size": 2, "tp_size": 2}, 39.35),
    ],
)
def test_total_agrees_with_what_a_gpu_needed(degrees, measured):
    estimate = reference_memory(FLUX2, ParallelismConfig(**degrees))
    # Nothing is promised to fit that does not, and nothing is refused for want of more than half a GiB.
    assert measured < (estimate.total - RUNTIME_BYTES) / GIB < measured + 0.7


def test_a_clip_is_decoded_a_latent_frame_at_a_time():
    for layout in (ParallelismConfig(), ParallelismConfig(ulysses_size=8)):
        frames = vae_activation_bytes(WAN, {"base_dim": 96}, 832 * 480 * 4, layout.world_size)
        found = step_activation_bytes(WAN, reference_config(WAN), layout)
        assert found == max(frames, reference_step_bytes(WAN, layout))
    assert found * 8 >= vae_activation_bytes(WAN, {"base_dim": 96}, 832 * 480 * 4)


def test_total_of_rank_0():
    estimate = reference_memory(FLUX2, ParallelismConfig(tp_size=2))
    assert estimate.total == estimate.weights.total + estimate.activations + RUNTIME_BYTES
    # Decoding in fp32 takes more than the transformer here, and the two take turns.
    assert estimate.activations == vae_activation_bytes(
        FLUX2, {"block_out_channels": [128, 256, 512, 512]}, 1024 * 1024
    )


def test_layouts_that_do_not_divide_are_left_out():
    layouts = [ParallelismConfig(ulysses_size=5), ParallelismConfig(ring_size=5), ParallelismConfig(tp_size=5)]
    assert [row.name for row in layout_fits(FLUX2, layouts, [])] == ["Ring-5"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_says_what_its_reference_model_needs(family):
    most = max(degree for degree in range(1, 9) if can_split(family, ParallelismConfig(tp_size=degree)))
    assert most >= 6
    layouts = [ParallelismConfig(tp_size=degree) for degree in (1, most)]
    one, many = layout_fits(family, layouts, [(2**40, 2**40)] * 8)
    assert one.fits == many.fits == "yes"
    assert many.transformer < one.transformer / (most - 1)
    # What stays ComfyUI's own counts nothing.
    assert many.text_encoder < one.text_encoder if family.text_encoder else many.text_encoder == one.text_encoder == 0
    assert many.vae == one.vae
    assert (one.vae > 0) == (family.vae is not None)
    parts = (many.transformer, many.text_encoder, many.vae, many.activations, many.runtime)
    assert sum(parts) == pytest.approx(many.total, abs=0.05)


@pytest.mark.parametrize(
    ("family", "transformer", "text"),
    [
        # Sizes of the files: 35.5, 18.0, 20.4 GB; of the last (9.4), the vision tower and the head are left out.
        (FLUX2, 35.5e9, 18.0e9),
        (QWEN, 20.43e9, 7.6e9),
    ],
)
def test_fp8_files_as_the_workers_hold_them(family, transformer, text):
    whole = reference_memory(family, ParallelismConfig(), fp8=True).weights
    assert whole.transformer == pytest.approx(transformer, rel=0.01)
    assert whole.text_encoder == pytest.approx(text, rel=0.01)
    half = reference_memory(family, ParallelismConfig(tp_size=2), fp8=True).weights
    assert half.transformer == pytest.approx(whole.transformer / 2, rel=0.02)


def test_both_experts_of_wan_fit_two_gpus_of_24_gb_in_fp8():
    """At 480p, 81 frames, from the shapes of both experts, umT5-XXL and the VAE."""
    layout = ParallelismConfig(tp_size=2)
    need, reference = reference_memory(WAN, layout, fp8=True), WAN.reference_model
    assert (reference.width, reference.height, reference.frames, reference.transformers) == (832, 480, 81, 2)
    experts, text = need.weights.transformer + need.others, need.weights.text_encoder
    assert need.others == need.weights.transformer  # both are resident
    # Files have 14.295 GB of each expert; of umT5 the embedding, 1.96 GiB, and 24 layers of 192 M weights in a byte.
    assert experts == pytest.approx(14.295e9, rel=0.03)
    assert text == pytest.approx((256384 * 4096 * 2 + 24 * (4 * 4096**2 + 3 * 4096 * 10240)) / 2, rel=0.01)
    held = experts + text + need.weights.vae + RUNTIME_BYTES
    assert held + reference_step_bytes(WAN, layout) <= usable(24)
    # Decoding by the workers takes more than a step; the prompt's encoder is not needed by then.
    assert held + need.activations > usable(24) >= held + need.activations - text
    assert str(best_fit(WAN, 2, usable(24), fp8=True)) == "TP-2"
    assert reference_memory(WAN, ParallelismConfig(ulysses_size=2), fp8=True).total > usable(24)
    assert any("_fp8_scaled" in one.text and "2 x 24 GB: TP-2," in one.text for one in check_formats(WAN, []))


def test_what_fits_is_what_the_readme_says():
    assert f"\n{fits_table()}\n" in (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_more_memory_never_needs_more_tp():
    for family in FAMILIES:
        for fp8 in (False, True):
            fits = [best_fit(family, 2, usable(size), fp8) for size in (4, 12, 24, 32, 48, 80, 141)]
            order = [("", False), ("TP-2", True), ("TP-2", False), ("Ulysses-2", True), ("Ulysses-2", False)]
            ranks = [order.index((fit.layout, fit.apart)) for fit in fits]
            assert ranks[0] == 0
            assert ranks[-1] == len(order) - 1
