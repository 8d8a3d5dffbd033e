"""Small faults, one at a time, in a copy of the checkout: the tests of ``make test`` have to find each of them.

    python tests/mutations.py             all of them; the name of the test that found it, and the seconds
    python tests/mutations.py NAME ...    these

By hand, as it takes a while: every fault is looked for by the tests that are named with it, until the first one fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
SECONDS = 900
"""How long the tests of one fault may take."""


@dataclass(frozen=True)
class Mutation:
    """A fault.

    Args:
        name: what is wrong.
        file: where.
        old, new: what stands there once, and what is put in its place.
        tests: folders or files, with blanks between, that have to find it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    Mutation(
        "a wrong shard boundary",
        "parallel_backend/parallel/tensor.py",
        "ranges.append((start + index * step, start + (index + 1) * step))",
        "ranges.append((start + index * step - (index > 0), start + (index + 1) * step - (index > 0)))",
        "tests/distributed/test_parity.py",
    ),
    Mutation(
        "the sequence is cut one token off",
        "parallel_backend/parallel/sequence.py",
        "return full.narrow(dim, sum(sizes[: self.mesh.cp.rank]), sizes[self.mesh.cp.rank])",
        "first = max(0, sum(sizes[: self.mesh.cp.rank]) - 1)\n"
        "        return full.narrow(dim, first, sizes[self.mesh.cp.rank])",
        "tests/distributed/test_parity.py",
    ),
    Mutation(
        "swapped streams",
        "parallel_backend/families/flux2/blocks.py",
        "        image,\n        text,\n        image_tables,\n        text_tables,\n",
        "        image,\n        text,\n        text_tables,\n        image_tables,\n",
        "tests/distributed/test_parity.py",
    ),
    Mutation(
        "a missed all-reduce",
        "parallel_backend/parallel/exchange.py",
        'return InFlight(_functional.all_reduce_(x, "sum", axis.name), x)',
        'return InFlight(_functional.all_reduce_(x.clone(), "sum", axis.name), x)._replace(tensor=x)',
        "tests/distributed/test_parity.py",
    ),
    Mutation(
        "a ring that merges without weights",
        "parallel_backend/parallel/ring.py",
        "out, lse = merge(out, lse, part, part_lse, query.dtype if last else torch.float32)",
        "out, lse = merge(out, lse, part, lse, query.dtype if last else torch.float32)",
        "tests/distributed/test_parity.py",
    ),
    Mutation(
        "keys that a mask hides are seen",
        "parallel_backend/parallel/ring.py",
        "one, keys[i : i + 1, tokens], values[i : i + 1, tokens]",
        "one, keys[i : i + 1], values[i : i + 1]",
        "tests/distributed/test_qwen_image.py",
    ),
    Mutation(
        "a stale context",
        "parallel_backend/runtime/client/same_content.py",
        "    if (a.dtype, a.device, a.shape) != (b.dtype, b.device, b.shape):\n        return False\n",
        "    return (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)\n",
        "tests/runtime/test_group.py",
    ),
    Mutation(
        "an answer to another request",
        "parallel_backend/runtime/client/ranks.py",
        "if message.id == request_id:",
        "if message.id <= request_id:",
        "tests/runtime/test_group.py",
    ),
    Mutation(
        "a leaked descriptor",
        "parallel_backend/runtime/wire/shared_tensors.py",
        "    finally:\n        if descriptor is not None:\n            os.close(descriptor)\n",
        "    finally:\n        pass\n",
        "tests/unit/test_channel.py",
    ),
    Mutation(
        "a dropped error",
        "parallel_backend/runtime/client/ranks.py",
        "failures = [answer for answer in answers.values() if isinstance(answer, Failed)]",
        "failures = [answer for answer in answers.values() if isinstance(answer, Failed) and not answer.bad_input]",
        "tests/runtime/test_group.py",
    ),
    Mutation(
        "an ignored argument",
        "nodes/comfy_model.py",
        "left = [name for name, value in given.items() if value is not None]",
        "left: list[str] = []",
        "tests/comfyui/test_errors.py",
    ),
    Mutation(
        "an ignored number format",
        "parallel_backend/runtime/rank/worker.py",
        "getattr(torch, request.dtype),",
        "torch.float32,",
        "tests/comfyui/test_load_clip.py",
    ),
    Mutation(
        "a wrong scale",
        "parallel_backend/loading/targets.py",
        "factor = torch.tensor(scale, dtype=torch.float64).to(self.dtype).item()  # rounded first, as ComfyUI does",
        "factor = None",
        "tests/unit/test_single_file.py",
    ),
    Mutation(
        "a wrong node input",
        "nodes/layout.py",
        "degrees = ParallelismConfig(ulysses_size=ulysses, ring_size=ring, tp_size=tp)",
        "degrees = ParallelismConfig(ulysses_size=ring, ring_size=ulysses, tp_size=tp)",
        "tests/comfyui/test_errors.py",
    ),
    Mutation(
        "a cache that each rank decides about alone",
        "parallel_backend/cache/block_cache.py",
        "            dist.all_reduce(both, group=self.axis.group)\n",
        "            pass\n",
        "tests/distributed/test_cache.py",
    ),
    Mutation(
        "a warmup that ends a step early",
        "parallel_backend/cache/decision.py",
        "if step < self.warmup and",
        "if step < self.warmup - 1 and",
        "tests/unit/test_cache.py",
    ),
    Mutation(
        "a part that left is taken to be there",
        "parallel_backend/runtime/rank/component.py",
        "        self.module = self.host = self._built = None\n        self.place = Place.FILE\n",
        "        self.host = self._built = None\n",
        "tests/unit/test_eviction.py",
    ),
    Mutation(
        "a rank that hangs is never told of",
        "parallel_backend/runtime/client/deadlines.py",
        "        return max(least, TIMES_MEDIAN * statistics.median(self._seconds[shape]))",
        "        return None",
        "tests/unit/test_deadlines.py",
    ),
    Mutation(
        "the text encoder's layers are one off",
        "parallel_backend/families/text_encoders/mistral3.py",
        'return tuple(config.get("text_encoder_out_layers", LAYERS))',
        'return tuple(layer - 1 for layer in config.get("text_encoder_out_layers", LAYERS))',
        "tests/runtime/test_group.py",
    ),
    Mutation(
        "a latent's statistics are left out",
        "parallel_backend/families/vaes/flux2.py",
        "return vae.decode(Flux2Pipeline._unpatchify_latents(latent * std + mean), return_dict=False)[0]",
        "return vae.decode(Flux2Pipeline._unpatchify_latents(latent), return_dict=False)[0]",
        "tests/runtime/test_group.py",
    ),
    Mutation(
        "logs that others can read",
        "parallel_backend/runtime/rank/rank_log.py",
        "os.O_APPEND, 0o600)",
        "os.O_APPEND, 0o644)",
        "tests/unit/test_rank_log.py",
    ),
    Mutation(
        "workers that outlive their client",
        "parallel_backend/runtime/rank/worker.py",
        "    poll.poll()\n    os._exit(0)\n",
        "    poll.poll()\n",
        "tests/unit/test_end_of_client.py",
    ),
    Mutation(
        "blocks that are to be compiled are not",
        "parallel_backend/blocks/forwards.py",
        "if forwards.speed.compile:",
        "if False:",
        "tests/runtime/test_speed.py",
    ),
    Mutation(
        "what a cache keeps of a picture that is given up",
        "parallel_backend/runtime/rank/engine.py",
        "            part.cache.forget(run)\n",
        "            pass\n",
        "tests/runtime/test_cache.py",
    ),
    Mutation(
        "a host that cannot take part is waited for",
        "parallel_backend/runtime/client/other_hosts.py",
        'if notice.state == "refused":',
        "if False:",
        "tests/unit/test_hosts.py",
    ),
    Mutation(
        "a host that is lost is waited for",
        "parallel_backend/runtime/client/other_hosts.py",
        "if self._silence(host) > LOST_SECONDS:",
        "if False:",
        "tests/unit/test_hosts.py tests/faults/test_hosts.py",
    ),
    Mutation(
        "memory that grows with the model",
        "parallel_backend/loading/weight_loader.py",
        "        for target in targets:\n            sent = target.to_send()\n",
        "        kept = []\n        for target in targets:\n            sent = target.to_send()\n"
        "            kept.append(sent.clone())\n",
        "tests/unit/test_loading_memory.py",
    ),
    Mutation(
        "the second best layout",
        "parallel_backend/planning/auto_layout.py",
        "best = fitting[0]",
        "best = fitting[-1]",
        "tests/unit/test_auto_layout.py",
    ),
    Mutation(
        "states that the page does not hear",
        "web/state.js",
        'const EVENT = "hybrid_dit.state";',
        'const EVENT = "hybrid_dit.states";',
        "tests/browser/test_drag_and_drop.py",
    ),
    Mutation(
        "a step that may take any time where it is the first",
        "parallel_backend/runtime/client/deadlines.py",
        "        if self.is_first(shape):\n            return least\n",
        "        if self.is_first(shape):\n            return None\n",
        "tests/unit/test_deadlines.py",
    ),
    Mutation(
        "a LoRA whose strength is dropped",
        "parallel_backend/loading/adapters.py",
        "part.add_(patch.strength * added)",
        "part.add_(added)",
        "tests/unit/test_adapters.py",
    ),
    Mutation(
        "a lost zero point",
        "parallel_backend/parallel/quantized.py",
        " + zeros.t().unsqueeze(-1).to(dtype)",
        "",
        "tests/unit/test_quantized.py",
    ),
    Mutation(
        "scales of the first columns on every rank",
        "parallel_backend/loading/quantized_weight.py",
        "across = (first // columns, -(-end // columns)) if columns else (0, 0)",
        "across = (0, -(-end // columns) - first // columns) if columns else (0, 0)",
        "tests/unit/test_quantized.py",
    ),
    Mutation(
        "a rotation that is left out",
        "parallel_backend/parallel/formats.py",
        'rotated = "convrot_groupsize" in self.options and options.get("convrot", True)',
        "rotated = False",
        "tests/unit/test_quantized.py",
    ),
    Mutation(
        "too little memory is lent",
        "parallel_backend/runtime/client/worker_group.py",
        "Lend(self.next_id(), size, [rank])",
        "Lend(self.next_id(), size // 2, [rank])",
        "tests/unit/test_worker_group.py",
    ),
    Mutation(
        "memory of another GPU is lent",
        "parallel_backend/runtime/client/worker_group.py",
        "rank = self._local[self.config.devices.visible.index(device)]",
        "rank = self._local[0]",
        "tests/unit/test_worker_group.py",
    ),
    Mutation(
        "a VAE's band takes the wrong lines of the one before",
        "parallel_backend/parallel/bands.py",
        "gathered[self.index - 1].narrow(self.dim, after, before)",
        "gathered[self.index - 1].narrow(self.dim, 0, before)",
        "tests/distributed/test_wan_vae.py",
    ),
    Mutation(
        "positions of a video's tokens are off by the rank",
        "parallel_backend/families/wan/entrance.py",
        "self.shards.shard(_angles(grid, dim, device, start=int(first)), 0, 0)",
        "self.shards.shard(_angles(grid, dim, device, start=int(first)), 0, 0).roll(self.shards.mesh.cp.rank, 0)",
        "tests/distributed/test_wan.py",
    ),
    Mutation(
        "a LoRA's rows begin where the weight's do",
        "parallel_backend/loading/adapted_weights.py",
        "yield Piece(local + a - first, key, (part - number) * height + a, b - a)",
        "yield Piece(local + a - first, key, part * height, b - a)",
        "tests/distributed/test_adapters.py",
    ),
    Mutation(
        "a text encoder's keys are cut within a head",
        "parallel_backend/families/text_encoders/decoder.py",
        'kv = Shard("column", units=kv_heads)',
        'kv = Shard("column")',
        "tests/distributed/test_text_file.py",
    ),
    Mutation(
        "the size of a head is left open to the compiler",
        "parallel_backend/blocks/forwards.py",
        "torch._dynamo.mark_static(tensor, tensor.ndim - 1)",
        "pass",
        "tests/unit/test_compiled_blocks.py",
    ),
)


def look_for(mutation: Mutation, copy: Path) -> str:
    """The first test that finds a fault; empty where none does."""
    file = copy / mutation.file
    sound = file.read_text()
    assert sound.count(mutation.old) == 1, f"{mutation.file} has {mutation.old!r} {sound.count(mutation.old)} times"
    file.write_text(sound.replace(mutation.old, mutation.new))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not thorough",
        *mutation.tests.split(),
    ]
    try:
        done = subprocess.run(
            command,
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"none within {SECONDS} s"
    finally:
        file.write_text(sound)
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return found.group(1) if found else ""


def main(names: list[str]) -> int:
    """How many faults were not found."""
    missed = 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder) / "checkout"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(copy)], cwd=CHECKOUT, check=True)
        try:
            for mutation in MUTATIONS:
                if names and mutation.name not in names:
                    continue
                began = time.monotonic()
                found = look_for(mutation, copy)
                missed += not found
                print(f"{time.monotonic() - began:4.0f} s  {mutation.name}: {found or 'NOT FOUND'}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(copy)], cwd=CHECKOUT, check=True)
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
