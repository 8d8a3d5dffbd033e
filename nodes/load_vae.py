"""Load VAE (Parallel): a VAE's file in the workers, which decode and encode together."""

from __future__ import annotations

from comfy_api.latest import io

from ..parallel_backend.families import FAMILIES
from ..parallel_backend.loading.single_file import file_fingerprint
from ..parallel_backend.loading.vae_file import VaeFile, open_known_vae_file
from .comfy_vae import make_vae
from .layout import ALIASES, CATEGORY, Layout
from .loaders import checked, layout_input, load
from .model_paths import VAE_FILES, file_names, find_file
from .states import HIDDEN, Place


class LoadVAE(io.ComfyNode):
    """Stands where Load VAE stands: the file's VAE in the workers, as VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        titles = {family.vae.title for family in FAMILIES if family.vae is not None}
        names = sorted({name.lower() for title in titles for name in title.split(" and ")})
        return io.Schema(
            node_id="HybridDiT_LoadVAE",
            display_name="Load VAE (Parallel)",
            category=CATEGORY,
            description=(
                "Loads a VAE file from models/vae into worker processes. Of Wan's and Qwen-Image's all workers decode "
                "and encode together, each a part of every frame; FLUX.2's runs on the first worker. Takes the place "
                "of Load VAE; with the same layout it shares the workers of the other parallel loaders."
            ),
            search_aliases=[
                "vae loader", "multi gpu vae", "video vae", "parallel vae decode",
                *(f"{name.replace('-', ' ')} vae parallel" for name in names), *ALIASES,
            ],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=file_names(VAE_FILES),
                    tooltip="A .safetensors (or .sft) file under models/vae, such as wan_2.1_vae.safetensors, "
                    "wan2.2_vae.safetensors, qwen_image_vae.safetensors or flux2-vae.safetensors.",
                ),
                layout_input(),
            ],
            hidden=HIDDEN,
            outputs=[
                io.Vae.Output("VAE", tooltip="For VAEDecode, VAEEncode, their tiled kinds and video nodes, in float32.")
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, vae_name=None):
        return checked(vae_name, lambda name: open_known_vae_file(find_file(VAE_FILES, name)))

    @classmethod
    def fingerprint_inputs(cls, vae_name=None, **_):
        return file_fingerprint(find_file(VAE_FILES, vae_name)) if vae_name is not None else ""

    @classmethod
    def execute(cls, vae_name: str, layout: Layout | None = None) -> io.NodeOutput:
        handle, source = load(
            Place.of(cls.hidden), lambda: open_known_vae_file(find_file(VAE_FILES, vae_name)).path, layout, "auto"
        )
        assert isinstance(source, VaeFile)
        return io.NodeOutput(make_vae(handle, source))
