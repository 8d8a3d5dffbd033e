"""Node packs that look into a MODEL get the answers that ComfyUI's own gives; what changes it is refused by name."""

from __future__ import annotations

import pytest

from tests.errors import relative_error

from .graphs import (
    Graph,
    NodeId,
    add_loader,
    add_reference,
    add_sampler,
    latents_of_both,
    run_well,
    save_latent,
    saved_latent,
)
from .qwen_models import PIPELINE
from .test_errors import failure, sampled
from .test_model import TOLERANCE

LAYOUT = {"ulysses": 1, "tp": 1}

LOOKS = [
    "[hasattr(dm, name) for name in ('double_blocks', 'joint_blocks', 'forward_orig', 'nothing', 'params')]",
    "getattr(dm, 'transformer_blocks', None) is None",
    "len(dm.double_blocks), len(dm.single_blocks), type(dm.double_blocks[0].img_attn.qkv.weight.shape).__name__",
    "isinstance(dm, comfy.ldm.flux.model.Flux), isinstance(dm, comfy.ldm.qwen_image.model.QwenImageTransformer2DModel)",
    "dm.__class__.__name__, dm.__class__ is comfy.ldm.flux.model.Flux, m.model.__class__.__name__",
    "isinstance(m.model, comfy.model_base.Flux2), isinstance(m.model, comfy.model_base.QwenImage)",
    "dm.in_channels, dm.out_channels, dm.hidden_size, dm.num_heads, dm.patch_size, dm.params.depth",
    "{n: getattr(dm.params, n) for n in comfy.ldm.flux.model.FluxParams.__dataclass_fields__}",
    "m.model.model_config.unet_config['image_model'], m.model.latent_format.__class__.__name__",
    # Modules without weights (activations, norms without scale) are not looked for.
    "sorted(name for name, module in dm.named_modules() if list(module.parameters(recurse=False)))",
    "sorted((name, tuple(p.shape)) for name, p in m.model.named_parameters() if name.startswith('diffusion_model.'))",
    "sum(isinstance(module, torch.nn.Linear) for module in m.model.modules())",
    "sum(p.numel() for p in dm.parameters()), sorted(dm.state_dict()) == sorted(n for n, _ in dm.named_parameters())",
    "m.get_model_object('diffusion_model.double_blocks.0.img_attn.qkv').in_features",
    "[(block.img_attn.qkv.out_features, block.img_attn.proj.bias) for block in dm.double_blocks]",
    "len(m.clone().clone().model.diffusion_model.single_blocks)",
    "len(copy.deepcopy(dm).double_blocks), type(copy.deepcopy(m.model_options)).__name__",
    "m.model.requires_grad_(False).eval() is m.model, m.model.to('cpu') is m.model",
    "m.is_clone(m.clone()), m.clone_has_same_weights(m.clone()), m.is_dynamic()",
]


def test_looking_gets_the_answers_of_comfyuis_own_model(server):
    graph = Graph()
    ours, stock = add_loader(graph, **LAYOUT), add_reference(graph)
    asked = [[graph.add("ReferenceLook", model=(one, 0), expression=look) for one in (ours, stock)] for look in LOOKS]
    outputs = run_well(server, graph).outputs
    for look, (mine, theirs) in zip(LOOKS, asked, strict=True):
        assert outputs[str(mine)]["text"] == outputs[str(theirs)]["text"], look


def test_looking_into_another_family(qwen):
    looks = [
        "isinstance(dm, comfy.ldm.qwen_image.model.QwenImageTransformer2DModel), dm.__class__.__name__",
        "len(dm.transformer_blocks), hasattr(dm, 'double_blocks'), dm.in_channels, dm.patch_size",
        "sorted((name, tuple(p.shape)) for name, p in dm.named_parameters())",
    ]
    graph = Graph()
    loaders = [add_loader(graph, PIPELINE, **LAYOUT), add_reference(graph, PIPELINE)]
    asked = [[graph.add("ReferenceLook", model=(one, 0), expression=look) for one in loaders] for look in looks]
    outputs = run_well(qwen, graph).outputs
    for look, (mine, theirs) in zip(looks, asked, strict=True):
        assert outputs[str(mine)]["text"] == outputs[str(theirs)]["text"], look


@pytest.mark.parametrize(
    ("statements", "what"),
    [
        ("dm.double_blocks[0].forward = print", "double_blocks.0.forward"),
        ("dm.forward_orig = types.MethodType(print, dm)", "its forward_orig"),
        ("dm.forward = print", "its forward"),
        ("dm.in_channels = 1", "its in_channels"),
        ("dm.params.default_ref_method = 'offset'", "its params.default_ref_method"),
        ("dm.double_blocks = torch.nn.ModuleList()", "its double_blocks"),
        ("dm.double_blocks[0] = torch.nn.Identity()", "double_blocks.0"),
        ("dm.double_blocks[0].img_attn.qkv.weight.data.mul_(2)", "a weight"),
        ("dm.double_blocks[0].img_attn.qkv.weight.copy_(torch.zeros(1))", "double_blocks.0.img_attn.qkv.weight"),
        ("dm.double_blocks[0].img_attn.qkv.weight = torch.nn.Parameter(torch.zeros(1))", "img_attn.qkv.weight"),
        ("dm.double_blocks[0].register_forward_hook(print)", "double_blocks.0"),
        ("dm.register_forward_pre_hook(print)", "the diffusion model"),
        ("dm.load_state_dict({})", "the diffusion model"),
        ("dm.double_blocks[0](torch.zeros(1))", "double_blocks.0"),
        ("dm.forward_orig(torch.zeros(1))", "its forward_orig"),
        ("m.add_object_patch('diffusion_model.double_blocks.0.forward', print)", "double_blocks.0.forward"),
    ],
)
def test_reaching_in_is_refused_on_the_node_that_does_it(statements, what, server):
    graph = Graph()
    loader = add_loader(graph, **LAYOUT)
    changed = graph.add("ReferenceChange", model=(loader, 0), statements=statements)
    sampled(graph, loader, model=changed)
    text = failure(server, graph, changed)
    assert what in text
    assert f'"ReferenceChange" (node {changed})' in text
    assert "bypass" in text


@pytest.mark.parametrize(
    ("statements", "what"),
    [
        ("m.model_options['transformer_options']['patches_replace'] = {'dit': {('double_block', 0): print}}", "dit"),
        ("m.model_options['transformer_options'].setdefault('patches', {})['post_input'] = [print]", "post_input"),
        ("m.model_options['transformer_options']['rope_options'] = {'scale_x': 2.0}", "rope_options"),
        ("m.object_patches['diffusion_model.pe_embedder'] = print", "diffusion_model.pe_embedder"),
        ("m.injections['lora'] = [print]", "lora"),
        ("m.weight_wrapper_patches['diffusion_model.img_in.weight'] = [print]", "diffusion_model.img_in.weight"),
    ],
)
def test_what_is_put_there_past_the_methods_is_refused_by_the_nodes_name(statements, what, server):
    """The sampler finds it; the message has the node that did it, and not those around it."""
    graph = Graph()
    loader = add_loader(graph, **LAYOUT)
    before = graph.add("CFGNorm", model=(loader, 0), strength=1.0)
    changed = graph.add("ReferenceChange", model=before, statements=statements)
    after = graph.add("CFGZeroStar", model=changed)
    text = failure(server, graph, sampled(graph, loader, model=after))
    assert what in text
    assert f'"ReferenceChange" (node {changed})' in text
    assert "bypass" in text


def test_a_copy_draws_what_the_model_draws(server):
    """ComfyUI's own MODEL cannot be copied; a copy of this one is a clone."""
    graph = Graph()
    loader = add_loader(graph, **LAYOUT)
    copied = graph.add("ReferenceChange", model=(loader, 0), statements="m = copy.deepcopy(m)")
    saves = [save_latent(graph, add_sampler(graph, loader, model=model)) for model in (copied, None)]
    result = run_well(server, graph)
    assert relative_error(*(saved_latent(server, result, save) for save in saves)) <= TOLERANCE


OVERRIDE = """
def sage(attention, *args, **kwargs):
    return attention(*args, **kwargs)
m.model_options["transformer_options"]["optimized_attention_override"] = sage
m.model_options["transformer_options"]["of_a_pack"] = 1
"""


def test_an_attention_kernel_and_an_unknown_option_are_said_in_the_log_once(server):
    """As a patch for Sage attention sets it: the picture is that of any other kernel."""
    nodes = []

    def build(graph: Graph, loader: NodeId) -> NodeId:
        nodes.append(graph.add("ReferenceChange", model=(loader, 0), statements=OVERRIDE))
        return add_sampler(graph, loader, model=nodes[-1], steps=3)

    assert relative_error(*latents_of_both(server, build, **LAYOUT)) <= TOLERANCE
    log = server.log_text()
    who = f'"ReferenceChange" (node {nodes[0]})'
    assert log.count(f"{who} chooses an attention kernel (sage)") == 1
    assert log.count(f"the model's option of_a_pack (of {who}) is not read by parallel workers") == 1


def test_devices_that_nodes_choose_are_said_in_the_log(server):
    def build(graph: Graph, loader: NodeId) -> NodeId:
        chosen = graph.add("SelectModelDevice", model=(loader, 0), device="cpu")
        split = graph.add("MultiGPU_WorkUnits", model=chosen, max_gpus=2)
        return add_sampler(graph, loader, model=split)

    assert relative_error(*latents_of_both(server, build, **LAYOUT)) <= TOLERANCE
    assert "chooses the device cpu for a model in parallel workers" in server.log_text()


def test_copies_for_other_devices_are_the_model_itself(server):
    """What MultiGPU CFG Split and Select Model Device do where ComfyUI has several GPUs."""
    statements = """
copied = m.deepclone_multigpu(new_load_device=torch.device("meta"))
copied.is_multigpu_base_clone = True
m.set_additional_models("multigpu", [copied])
m.match_multigpu_clones()
assert m.get_additional_models() == [] and copied.load_device == m.load_device
m = copied
"""

    def build(graph: Graph, loader: NodeId) -> NodeId:
        changed = graph.add("ReferenceChange", model=(loader, 0), statements=statements)
        return add_sampler(graph, loader, model=changed)

    graph = Graph()
    loader = add_loader(graph, **LAYOUT)
    saves = [save_latent(graph, latent) for latent in (build(graph, loader), add_sampler(graph, loader))]
    result = run_well(server, graph)
    one, other = (saved_latent(server, result, save) for save in saves)
    assert relative_error(one, other) <= TOLERANCE


def test_a_controlnet_is_refused_by_the_name_of_its_node(server):
    graph = Graph()
    loader = add_loader(graph, **LAYOUT)
    prompt = graph.add("CLIPTextEncode", text="a cat", clip=(loader, 1))
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0)
    control = graph.add("ReferenceControl")
    applied = graph.add(
        "ControlNetApplyAdvanced", positive=prompt, negative=prompt, control_net=control, image=image, strength=1.0,
        start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    text = failure(server, graph, sampled(graph, loader, positive=(applied, 0)))
    assert f"(node {applied})" in text
    assert "ControlNet" in text
    assert "bypass" in text
