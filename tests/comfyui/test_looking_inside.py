"""Packs that look into a CLIP or a VAE get the answers of ComfyUI's own; what would change it is refused by name."""

from __future__ import annotations

import pytest

from tests.vae_file import write_vae
from tests.wan_vae import write_wan_vae

from .graphs import Graph, add_layout, add_loader, add_prompt, add_reference, run_well
from .qwen_models import PIPELINE
from .test_errors import failure
from .test_load_clip import PARITY, save_conditioning, saved_conditioning

LAYOUT = {"ulysses": 1, "tp": 1}
VAES = {"wan21.safetensors": "2.1", "flux2.safetensors": ""}
LOOKS = {
    "CLIP": [
        "[hasattr(dm, name) for name in ('qwen25_7b', 'clip_l', 'clip_g', 't5xxl', 'nothing')], dm.clip, dm.clip_name",
        "isinstance(m, comfy.sd.CLIP), isinstance(dm, comfy.text_encoders.qwen_image.QwenImageTEModel), dm.dtypes",
        "sorted((name, tuple(p.shape)) for name, p in dm.qwen25_7b.transformer.named_parameters())",
        "len(dm.qwen25_7b.transformer.model.layers), dm.qwen25_7b.transformer.num_layers",
        "dm.qwen25_7b.transformer.model.layers[0].self_attn.q_proj.in_features",
        "sorted(name for name in m.patcher.model_state_dict() if 'logit_scale' not in name)",
        "m.layer_idx, m.use_clip_schedule, m.tokenizer_options, m.apply_hooks_to_conds, m.patcher.is_clip",
        "m.patcher.model is dm, m.clone().patcher.is_clone(m.patcher), m.is_dynamic()",
        "dm.requires_grad_(False).eval() is dm, dm.to('cpu') is dm, m.tokenize('a cat')",
        "isinstance(copy.deepcopy(m), comfy.sd.CLIP)",
    ],
    "VAE": [
        "dm.__class__.__name__, [isinstance(dm, kind) for kind in (comfy.ldm.wan.vae.WanVAE, "
        "comfy.ldm.models.autoencoder.AutoencoderKL, comfy.ldm.models.autoencoder.AutoencodingEngine)]",
        "[hasattr(dm, name) for name in ('encoder', 'decoder', 'taesd_decoder', 'bn', 'conv1', 'config')]",
        "sorted((name, tuple(tensor.shape)) for name, tensor in dm.state_dict().items() if 'num_batches' not in name)",
        "m.latent_channels, m.latent_dim, m.output_channels, m.not_video, m.pad_channel_value, m.handles_tiling",
        "m.spacial_compression_decode(), m.spacial_compression_encode(), m.temporal_compression_decode()",
        "m.downscale_index_formula, m.upscale_index_formula, m.extra_1d_channel, m.crop_input, m.format_encoded",
        "isinstance(m, comfy.sd.VAE), m.throw_exception_if_invalid(), m.is_dynamic(), m.disable_offload",
        "m.patcher.model is dm, m.patcher.clone().is_clone(m.patcher), isinstance(copy.deepcopy(m), comfy.sd.VAE)",
        "dm.requires_grad_(False).eval() is dm, dm.to('cpu') is dm, str(m.patcher.load_device) == str(m.device)",
    ],
}


def loaded(server, graph, kind, name):
    """Ours and ComfyUI's own."""
    if kind == "CLIP":
        return (add_loader(graph, PIPELINE, **LAYOUT), 1), (add_reference(graph, PIPELINE), 1)
    folder = server.models / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).exists():
        write_wan_vae(folder / name, VAES[name]) if VAES[name] else write_vae(folder / name)
    ours = graph.add("HybridDiT_LoadVAE", vae_name=name, layout=add_layout(graph, **LAYOUT))
    return ours, graph.add("VAELoader", vae_name=name)


@pytest.mark.parametrize(("kind", "name"), [("CLIP", PIPELINE), *(("VAE", name) for name in VAES)])
def test_looking_gets_the_answers_of_comfyuis_own(kind, name, qwen):
    graph = Graph()
    both = loaded(qwen, graph, kind, name)
    asked = [[graph.add("ReferenceLook", model=one, expression=look) for one in both] for look in LOOKS[kind]]
    outputs = run_well(qwen, graph).outputs
    for look, (mine, theirs) in zip(LOOKS[kind], asked, strict=True):
        assert outputs[str(mine)]["text"] == outputs[str(theirs)]["text"], look


@pytest.mark.parametrize(
    ("kind", "statements", "what"),
    [
        ("CLIP", "m.load_sd({})", "the text encoder"),
        ("CLIP", "dm.load_sd({})", "the text encoder"),
        ("CLIP", "dm.load_state_dict({}, strict=False)", "the text encoder"),
        ("CLIP", "m.get_sd()", "the weights"),
        ("CLIP", "dm.qwen25_7b.transformer.model.layers[0].self_attn.q_proj.weight.data.mul_(2)", "a weight"),
        ("CLIP", "dm.qwen25_7b.transformer.model.layers[0].forward = print", "model.layers.0.forward"),
        ("CLIP", "dm.qwen25_7b.transformer.register_forward_hook(print)", "the text encoder"),
        ("CLIP", "dm.qwen25_7b.transformer.model.norm(torch.zeros(1))", "model.norm"),
        ("VAE", "dm.load_state_dict({}, strict=False)", "the VAE"),
        ("VAE", "m.get_sd()", "the weights"),
        ("VAE", "dm.decode = print", "its decode"),
        ("VAE", "dm.decoder = torch.nn.Identity()", "its decoder"),
        ("VAE", "dm.decoder.conv1.weight.data.mul_(2)", "a weight"),
        ("VAE", "dm.decoder.register_forward_hook(print)", "decoder"),
        ("VAE", "dm.decoder(torch.zeros(1))", "decoder"),
        ("VAE", "m.patcher.add_patches({'decoder.conv1.weight': (None,)})", "1 weights of a VAE"),
    ],
)
def test_reaching_in_is_refused_on_the_node_that_does_it(kind, statements, what, qwen):
    graph = Graph()
    ours, _ = loaded(qwen, graph, kind, "wan21.safetensors")
    changed = graph.add("ReferenceChange", model=ours, statements=statements)
    if kind == "CLIP":
        last = graph.add("CLIPTextEncode", text="a cat", clip=changed)
    else:
        image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0x804020)
        last = graph.add("VAEEncode", pixels=image, vae=changed)
    graph.add("PreviewAny", source=last)
    text = failure(qwen, graph, changed)
    assert what in text
    assert f'"ReferenceChange" (node {changed})' in text
    assert "bypass" in text or "use ComfyUI's own loader" in text


def test_a_copy_of_a_clip_encodes_as_it_does_and_what_changes_one_leaves_the_other(qwen):
    graph = Graph()
    loader = add_loader(graph, PIPELINE, **LAYOUT)
    copied = graph.add("ReferenceChange", model=(loader, 1), statements="m = copy.deepcopy(m)")
    lora = "m.patcher.add_patches({'qwen25_7b.transformer.model.norm.weight': ('diff', (torch.ones(256),))})"
    patched = graph.add("ReferenceChange", model=(loader, 1), statements=f"m = copy.deepcopy(m); {lora}")
    texts = [graph.add("CLIPTextEncode", text="a cat", clip=clip) for clip in (copied, patched)]
    saves = [save_conditioning(graph, text) for text in (*texts, add_prompt(graph, loader, "a cat"))]
    result = run_well(qwen, graph)
    copy, changed, original = (saved_conditioning(qwen, result, save)["cond"] for save in saves)
    assert copy.equal(original)
    assert (changed - original).abs().max() > PARITY
