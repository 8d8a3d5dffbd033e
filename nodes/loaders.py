"""Load Pipeline (Parallel): a diffusers pipeline folder as stock MODEL, CLIP and VAE that compute in the workers."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..parallel_backend.config import ParallelismConfig
from ..parallel_backend.demo_model import DEMO_FOLDER_NAME, demo_folder
from ..parallel_backend.loading.pipeline_folder import open_pipeline_folder
from ..parallel_backend.runtime.group_config import DTYPES, GroupConfig
from .comfy_clip import make_clip
from .comfy_model import make_model
from .comfy_vae import make_vae
from .group import GroupHandle, NodeState, show_text
from .layout import CATEGORY, Layout, LayoutSocket


class LoadPipeline(io.ComfyNode):
    """Starts the workers of a layout and loads a pipeline into them; with equal settings it finds them up already."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HybridDiT_LoadPipeline",
            display_name="Load Pipeline (Parallel)",
            category=CATEGORY,
            description=(
                "Loads a diffusers pipeline folder from models/diffusers into worker processes, split as the layout "
                "says. MODEL, CLIP and VAE go to the stock nodes."
            ),
            search_aliases=["diffusers loader", "multi gpu loader", "flux.2 parallel"],
            inputs=[
                io.Combo.Input(
                    "pipeline",
                    options=list_pipelines(),
                    default=DEMO_FOLDER_NAME,
                    tooltip="A folder with a model_index.json under models/diffusers. "
                    f"'{DEMO_FOLDER_NAME}' is a small FLUX.2 that comes along; it draws simple shapes.",
                ),
                LayoutSocket.Input(
                    "layout",
                    optional=True,
                    tooltip="From Parallel Layout. Without it one process holds the whole pipeline.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Number format of the weights; 'auto' is bfloat16 on GPUs and float32 on the CPU.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="For samplers and guiders. Its evaluations run in the workers."),
                io.Clip.Output("CLIP", tooltip="For CLIPTextEncode. The text encoder is split over all workers."),
                io.Vae.Output("VAE", tooltip="For VAEDecode and VAEEncode. It runs on the first worker."),
            ],
        )

    @classmethod
    def validate_inputs(cls, pipeline=None):
        if pipeline is None:
            return True
        try:
            folder = find_pipeline(pipeline)
            open_pipeline_folder(folder).check(ParallelismConfig())
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, pipeline=None, **_):
        # A folder that was replaced is loaded anew.
        return open_pipeline_folder(find_pipeline(pipeline)).fingerprint() if pipeline is not None else ""

    @classmethod
    def execute(cls, pipeline: str, layout: Layout | None = None, dtype: str = "auto") -> io.NodeOutput:
        layout = layout or Layout(ParallelismConfig(), "auto")
        try:
            folder = find_pipeline(pipeline)
            handle = GroupHandle(GroupConfig.create(folder, layout.degrees, layout.devices, dtype))
            source = handle.get().source
        except (ValueError, RuntimeError) as error:
            show_text(f"failed: {str(error).splitlines()[0]}")
            raise
        NodeState(handle.config)("ready", 1, 1)
        return io.NodeOutput(make_model(handle, source), make_clip(handle, source), make_vae(handle, source))


def list_pipelines() -> list[str]:
    """Names of the pipeline folders that ComfyUI's model paths hold, and of the demo."""
    names = {
        entry.name
        for root in folder_paths.get_folder_paths("diffusers")
        if Path(root).is_dir()
        for entry in Path(root).iterdir()
        if (entry / "model_index.json").is_file()
    }
    return sorted(names | {DEMO_FOLDER_NAME})


def find_pipeline(name: str) -> Path:
    """The folder of a listed name.

    Raises:
        ValueError: there is no such folder under models/diffusers.
    """
    roots = folder_paths.get_folder_paths("diffusers")
    # A name, not a path: nothing outside of the model folders can be reached.
    if name in (".", "..") or Path(name).name != name:
        raise ValueError(f"{name!r} is not the name of a pipeline folder")
    for root in roots:
        if (Path(root) / name).is_dir():
            return Path(root) / name
    if name == DEMO_FOLDER_NAME:
        return demo_folder()
    raise ValueError(f"there is no pipeline folder {name!r} under {', '.join(map(str, roots))}")
