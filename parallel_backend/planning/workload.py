"""What one step of a model does, counted on the meta device: no weights, no values, no GPU."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..config import AS_IT_IS
from ..families import Conditioning, Family, family_of_name
from ..mesh import single_mesh
from ..parallel.attention import Begun, Lengths, ShardedAttention
from ..parallel.sequence import SequenceShards, shard_sequence
from .cost_model import Workload


def count_workload(
    family: Family, config: Mapping[str, Any], width: int, height: int, text: int | None = None, frames: int = 1
) -> Workload:
    """Count a step of a transformer.

    Args:
        family: which model.
        config: the transformer's configuration; what it leaves out has diffusers' defaults.
        width, height: pixels of the picture.
        text: tokens of a prompt; by default those of the family's reference model.
        frames: of pixels, where it is a video.
    """
    key = json.dumps(dict(config), sort_keys=True, default=list)
    return _count(family.name, key, width, height, text or family.reference_model.text_tokens, frames)


def sample_workload(family: Family, config: Mapping[str, Any]) -> Workload:
    """Count a step of a transformer for its family's sample (`ReferenceModel.sample`)."""
    size = family.reference_model
    return count_workload(family, config, size.width, size.height, frames=size.frames)


@lru_cache(maxsize=32)
@torch.no_grad()
def _count(name: str, config: str, width: int, height: int, text: int, frames: int) -> Workload:
    kind = family_of_name(name).transformer
    model = kind.build(json.loads(config))
    attention = _Recorder(SequenceShards(single_mesh("cpu")))
    entrance = kind.install(model, attention, AS_IT_IS)
    shard_sequence(model, attention.shards, kind.sequence_inputs, kind.output_stream, entrance)
    outputs: list[int] = []
    modules = dict(model.named_modules())
    for pattern, shard in kind.plan(dict(model.config)).items():
        for found in fnmatch.filter(modules, pattern) if shard.style == "row" else ():
            modules[found].__class__ = _WholeLinear
            modules[found].register_forward_hook(lambda _, args, out: outputs.append(out.numel()))
    with torch.device("meta"):
        full = dict(model.config)
        x = torch.empty(kind.latent_shape(full, width, height, frames), dtype=torch.bfloat16)
        context = torch.empty(1, text, kind.context_width(full), dtype=torch.bfloat16)
        shapes = kind.example_tensors(full, x.shape)
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        nn.Module.to(model, torch.bfloat16)  # not diffusers' own, which warns of modules that it would keep
        with FlopCounterMode(display=False) as counter:
            model(**kind.inputs(x, torch.empty(1), Conditioning(context, tensors=tensors)))
    flops = sum(counter.get_flop_counts()["Global"].values())
    return Workload(
        gemm_flops=float(flops),
        attention_flops=attention.flops,
        attentions=attention.calls,
        attention_elements=attention.elements,
        reductions=len(outputs),
        reduced_elements=float(sum(outputs)),
    )


class _WholeLinear(nn.Linear):
    """One that blocks call, rather than multiply with parts of its weight: so its hooks see all that it gives."""


class _Recorder(ShardedAttention):
    """Counts attention instead of computing it."""

    def __init__(self, shards: SequenceShards) -> None:
        super().__init__(shards)
        self.calls, self.elements, self.flops = 0, 0.0, 0.0

    def attend(self, begun: Begun, lengths: Lengths, kept: list[list[Tensor]] | None) -> Tensor:
        assert isinstance(begun.heads, Tensor)
        query, key = (x.transpose(0, 1) for x in begun.heads.unbind(2)[:2])
        self.calls += 1
        self.elements += query.numel()
        self.flops += 4.0 * query.numel() * key.shape[1]  # two products, each a multiplication and an addition
        return torch.empty_like(query)
