"""What ComfyUI's own memory management asks of the workers, on a GPU that is pretended, for five pictures.

Run by ComfyUI's Python in its folder: ``memory_requests.py PACK NEEDS -- FLAGS``. ComfyUI's functions are its own; what
is pretended is how much of the GPU is free, and what workers hold of it. It prints a line of JSON: for each picture the
bytes of weights that moved, and whether a whole model was unloaded.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

GIB = 2**30
PICTURES = 5
TOTAL = 24 * GIB
TRANSFORMER, TEXT, KEPT = 16 * GIB, 3 * GIB, 2 * GIB
"""What workers hold: weights, and what their allocator keeps between steps."""
PIECE = GIB // 4
STOCK = 12 * GIB
"""Another model of ComfyUI's own, for which the workers have to leave in part."""
ESTIMATE, TAKEN = 6 * GIB, 3 * GIB
"""What ComfyUI says that a decode of its VAE takes, and what it takes."""


class Workers:
    """A group with a transformer and a text encoder, as the client sees it, and its side of the device."""

    def __init__(self) -> None:
        self.kept, self.away = 0, {"transformer": 0, "text_encoder": 0}
        self.sizes = {"transformer": TRANSFORMER, "text_encoder": TEXT}
        self.lent: dict[str, int] = {}
        self.moved = 0
        self.unloaded: list[str] = []

    def held(self) -> int:
        return self.kept + sum(self.sizes[name] - self.away[name] for name in self.sizes)

    def lend(self, size: int, device: str) -> tuple[int, int]:
        freed, self.kept = self.kept, 0
        for name in ("text_encoder", "transformer"):
            while freed < size and self.away[name] < self.sizes[name]:
                self.away[name] += PIECE
                self.moved += PIECE
                freed += PIECE
        self.lent = {name: away for name, away in self.away.items() if away}
        return freed, self.held()

    def offload(self, component: str) -> None:
        self.unloaded.append(component)
        self.away[component] = self.lent[component] = self.sizes[component]

    def use(self, component: str) -> None:
        self.away[component] = 0
        self.lent.pop(component, None)
        self.kept = KEPT


def main(pack: Path, taken: int) -> None:
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.cli_args import args

    args.cpu = True
    import comfy.model_management as management
    import comfy.model_patcher
    import torch

    spec = importlib.util.spec_from_file_location("pack", pack / "__init__.py", submodule_search_locations=[str(pack)])
    assert spec is not None
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    shared = importlib.import_module("pack.nodes.shared_memory")
    patcher = importlib.import_module("pack.nodes.comfy_patcher")
    devices = importlib.import_module("pack.parallel_backend.planning.devices")

    # What the flags set where there is a GPU.
    states = management.VRAMState
    management.vram_state = (
        states.HIGH_VRAM if args.highvram else states.LOW_VRAM if args.lowvram else states.NORMAL_VRAM
    )
    workers, others = Workers(), [0]
    device = torch.device("cuda", 0)

    def free() -> int:
        return TOTAL - workers.held() - others[0]

    management.get_free_memory = lambda dev=None, torch_free_too=False: (free(), 0) if torch_free_too else free()
    config = SimpleNamespace(devices=devices.Devices("cuda", ("0",)), group=None)
    shared.find_model = lambda _: workers
    shared.find_group = lambda _: workers
    shared.gpu_names = lambda count: ["0"]
    torch.cuda.mem_get_info = lambda device=None: (free(), TOTAL)

    class Handle:
        def is_there(self, device: torch.device) -> bool:
            return shared.is_there(config, device)

        def lend(self, device: torch.device, asked: int) -> int:
            return shared.lend(config, device, asked)

        def offload(self, component: str) -> None:
            workers.offload(component)

        def get(self, component: str) -> None:
            shared.take_back(config, component)
            workers.use(component)

    class Stock(comfy.model_patcher.ModelPatcher):
        """One of ComfyUI's own models, whose weights are not really moved."""

        def load(self, *args, **kwargs) -> None:
            others[0] += self.size - self.model.model_loaded_weight_memory
            self.model.model_loaded_weight_memory, self.model.device = self.size, device

        def detach(self, unpatch_all: bool = True):
            others[0] -= self.model.model_loaded_weight_memory
            self.model.model_loaded_weight_memory, self.model.device = 0, self.offload_device

        def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
            return 0

    def model(component: str):
        module = torch.nn.Module()
        module.remote_part = patcher.RemotePart(Handle(), component)
        if component == "transformer":
            module.diffusion_model = torch.nn.Module()
        return module

    cpu = torch.device("cpu")
    clip = patcher.RemotePatcher(model("text_encoder"), device, cpu)
    unet = patcher.RemotePatcher(model("transformer"), device, cpu)
    vae = Stock(torch.nn.Module(), device, cpu, size=GIB // 4)
    stock = Stock(torch.nn.Module(), device, cpu, size=STOCK)
    report = []
    for _ in range(PICTURES):
        workers.moved, workers.unloaded = 0, []
        management.load_models_gpu([clip])
        Handle().get("text_encoder")
        management.load_models_gpu([unet], memory_required=GIB)
        for _ in range(3):
            Handle().get("transformer")
        management.load_models_gpu([vae], memory_required=ESTIMATE)
        room = free()
        others[0] += min(taken, room)
        if "0" in shared._needs:
            shared._needs["0"]._watch._over.wait(0.1)  # it looks meanwhile
        others[0] -= min(taken, room)
        report.append({"moved": workers.moved, "unloaded": workers.unloaded, "lacked": max(0, taken - room)})
    # A stock model takes the place, and ours comes back: ComfyUI's has to go for it.
    management.load_models_gpu([stock], memory_required=ESTIMATE)
    there = others[0]
    management.load_models_gpu([unet], memory_required=GIB)
    Handle().get("transformer")
    print(json.dumps({"pictures": report, "stock": there, "stock_left": others[0], "free": free()}))


if __name__ == "__main__":
    separator = sys.argv.index("--")
    own: Sequence[str] = sys.argv[1:separator]
    sys.argv = [sys.argv[0], *sys.argv[separator + 1 :]]
    runpy.run_path(str(Path(__file__).with_name("launch_server.py")), run_name="launch_server")[
        "install_import_hooks"
    ]()
    sys.path[0] = str(Path.cwd())  # our own folder has a server.py, too
    logging.disable(logging.WARNING)
    main(Path(own[0]), int(own[1]))
