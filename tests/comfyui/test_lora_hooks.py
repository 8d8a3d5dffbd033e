"""LoRA by hooks: on some prompts and in some steps alone, of the MODEL and of the CLIP, against stock ComfyUI."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.errors import relative_error
from tests.text_encoder_file import write_text

from .graphs import Graph, NodeId, add_loader, add_prompt, add_sampler, run_well, save_latent, saved_latent
from .lora_files import FILE, PARITY, ours, with_loras, write_loras
from .server import ComfyServer
from .test_errors import failure
from .test_load_clip import add_clip, save_conditioning, saved_conditioning, write_lora
from .test_load_clip import add_reference as add_stock_clip


@pytest.fixture(scope="module")
def loras(server: ComfyServer) -> dict[str, str]:
    return write_loras(server)


def hooks_of(graph: Graph, *files: tuple[str, float], keyframes: tuple[tuple[float, float], ...] = ()) -> NodeId:
    """LoRAs with their strengths, and how strong they are from a share of the steps on."""
    found: dict[str, NodeId] = {}
    for file, strength in files:
        found = {"prev_hooks": graph.add("CreateHookLoraModelOnly", lora_name=file, strength_model=strength, **found)}
    hooks = found["prev_hooks"]
    frames: dict[str, NodeId] = {}
    for strength, start in keyframes:
        frames = {
            "prev_hook_kf": graph.add("CreateHookKeyframe", strength_mult=strength, start_percent=start, **frames)
        }
    if frames:
        hooks = graph.add("SetHookKeyframes", hooks=hooks, hook_kf=frames["prev_hook_kf"])
    return hooks


def hooked(
    graph: Graph, model: NodeId, positive: NodeId, negative: NodeId, hooks: NodeId | None, steps: int = 2
) -> NodeId:
    """A picture of which the positive prompt alone has hooks; saved."""
    if hooks is not None:
        positive = graph.add("ConditioningSetProperties", cond_NEW=positive, strength=1.0, set_cond_area="default",
                             hooks=hooks)  # fmt: skip
    sampler = add_sampler(graph, model, model=model, positive=positive, negative=negative, cfg=3.0, steps=steps)
    return save_latent(graph, sampler)


def draw(
    server: ComfyServer, layout: str, *runs: tuple[list, list, tuple], steps: int = 2
) -> list[tuple[Tensor, Tensor]]:
    """Ours and stock's latent for each of some runs one after the other: loaders' LoRAs, hooks' LoRAs, keyframes."""
    graph = Graph()
    loader = add_loader(graph)
    positive, negative = add_prompt(graph, loader), add_prompt(graph, loader, "a cat")
    stock = graph.add("UNETLoader", unet_name=FILE, weight_dtype="default")
    saved = []
    for model in (ours(graph, layout), stock):
        for with_it, by_hook, keyframes in runs:
            hooks = hooks_of(graph, *by_hook, keyframes=keyframes) if by_hook else None
            saved.append(hooked(graph, with_loras(graph, model, *with_it), positive, negative, hooks, steps))
    result = run_well(server, graph)
    found = [saved_latent(server, result, node) for node in saved]
    return list(zip(found[: len(runs)], found[len(runs) :], strict=True))


# With whole weights there is less to do: test_lora has them with a loader's LoRA.
@pytest.mark.parametrize("layout", ["TP-2", pytest.param("Ulysses-2", marks=pytest.mark.thorough)])
def test_a_lora_on_one_of_two_prompts(server, loras, layout):
    """Also on top of a loader's LoRA, and as a loader's on all; the model is as before in the end, to the bit."""
    every, other = (loras["every layer"], 0.8), (loras["kohya"], 1.0)
    runs = ([], []), ([], [every]), ([other], [every]), ([every], []), ([], [every, other]), ([], [])
    found = draw(server, layout, *((with_it, by_hook, ()) for with_it, by_hook in runs))
    for mine, theirs in found:
        assert relative_error(mine, theirs) <= PARITY
    before, on, both, everywhere, two, after = (mine for mine, _ in found)
    assert torch.equal(after, before)
    for index, one in enumerate((before, on, both, everywhere, two)):
        assert all(relative_error(one, other) > 10 * PARITY for other in (before, on, both, everywhere, two)[:index])


def test_keyframes(server, loras):
    """Half as strong from the second quarter of the steps on, off in the last."""
    one = (loras["kohya"], 1.0)
    frames = ((1.0, 0.0), (0.5, 0.25), (0.0, 0.75))
    (mine, theirs), (steady, _) = draw(server, "TP-2", ([], [one], frames), ([], [one], ()), steps=4)
    assert relative_error(mine, theirs) <= PARITY
    assert relative_error(mine, steady) > 10 * PARITY


# test_lora merges the other, too.
@pytest.mark.parametrize("style", ["lycoris", pytest.param("lengths", marks=pytest.mark.thorough)])
def test_what_is_no_product_of_thin_matrices(server, loras, style):
    """It is merged for each evaluation that has it."""
    one = (loras[style], 0.7)
    (mine, theirs), (without, _) = draw(server, "TP-2", ([], [one], ()), ([], [], ()))
    assert relative_error(mine, theirs) <= PARITY
    assert relative_error(mine, without) > 10 * PARITY


def test_on_the_clip(server):
    """Set CLIP Hooks: the conditioning is stock's, and without it as before."""
    folder = server.models / "text_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    file = write_text(folder / "hooked.safetensors").name
    lora = write_lora(server, "hooked-text.safetensors")
    graph, nodes = Graph(), []
    for clip in (add_clip(graph, file), add_stock_clip(graph, file)):
        hooks = graph.add("CreateHookLora", lora_name=lora, strength_model=0.0, strength_clip=0.7)
        with_hooks = graph.add("SetClipHooks", clip=clip, apply_to_conds=False, schedule_clip=False, hooks=hooks)
        for one in (clip, with_hooks, clip):
            nodes.append(save_conditioning(graph, graph.add("CLIPTextEncode", text=f"a cat {len(nodes) % 3 // 2}",
                                                            clip=one)))  # fmt: skip
    result = run_well(server, graph)
    found = [saved_conditioning(server, result, node)["cond"] for node in nodes]
    for mine, theirs in zip(found[:3], found[3:], strict=True):
        assert relative_error(mine, theirs) <= PARITY
    assert relative_error(found[1], found[0]) > 100 * PARITY


def test_a_lora_for_another_model_is_refused(server, loras):
    """Where stock goes on without it."""
    graph = Graph()
    positive = add_prompt(graph, add_loader(graph))
    text = write_lora(server, "for-text-alone.safetensors")
    latent = hooked(graph, ours(graph, "TP-2"), positive, positive, hooks_of(graph, (text, 1.0)))
    sampler = NodeId(graph[str(latent)]["inputs"]["samples"][0])
    assert "changes no weight that this model has" in failure(server, graph, sampler)
