"""Workers Report and Unload Workers: what a group took so far, and how to end it."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io, ui

from ..parallel_backend.runtime.client.groups import close_groups, find_model
from .comfy_model import RemoteDiffusionModel
from .group import show_text
from .layout import ALIASES, CATEGORY


class WorkersReport(io.ComfyNode):
    """The report of the workers behind a MODEL, as text on the node and as JSON for other nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HybridDiT_WorkersReport",
            display_name="Workers Report",
            category=CATEGORY,
            description="Layout, versions, seconds a step, and memory of each worker behind a parallel MODEL.",
            search_aliases=["memory", "benchmark", *ALIASES],
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from a parallel loader."),
                io.Image.Input(
                    "after",
                    optional=True,
                    tooltip="Wire the picture here, so that the report is made after the picture.",
                ),
            ],
            outputs=[io.String.Output("report", tooltip="The report as JSON; docs/report.md explains its fields.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return float("nan")  # the figures change with each run

    @classmethod
    def execute(cls, model, after=None) -> io.NodeOutput:
        diffusion_model = model.model.diffusion_model
        if not isinstance(diffusion_model, RemoteDiffusionModel):
            raise ValueError("this MODEL does not come from a parallel loader: there are no workers to report on")
        remote = find_model(diffusion_model.handle.config)
        if remote is None:
            raise ValueError("the workers of this MODEL are not up; queue a picture first")
        report = remote.report()
        show_text(summarize(report))
        text = json.dumps(report, indent=2)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def summarize(report: dict[str, Any]) -> str:
    """A report in a few lines, as they stand on the node: the step, the layout, and the memory of each rank."""
    layout, seconds = report["layout"], report["seconds"]
    degrees = " x ".join(f"{axis} {layout[axis]}" for axis in ("ulysses", "ring", "tp") if layout[axis] > 1)
    lines = []
    if seconds["step_median"] is not None:
        lines.append(f"{seconds['step_median']:.3f} s a step (median of {len(seconds['steps'])})")
    lines.append(
        f"{layout['ranks']} rank(s): {degrees or 'not split'}, {report['model']['dtype']}, {report['backend']}"
    )
    lines.append(f"{seconds['start']:.1f} s to start, {seconds['load']:.1f} s to load")
    for rank in report["ranks"]:
        weights, most = sum(rank["weight_bytes"].values()) / 2**30, rank["peak_bytes"] / 2**30
        lines.append(f"rank {rank['rank']}, {rank['device']}: {most:.2f} GiB at most, {weights:.2f} of it weights")
    return "\n".join(lines)


class UnloadWorkers(io.ComfyNode):
    """Ends all worker groups and frees their memory; the next use starts them again."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HybridDiT_UnloadWorkers",
            display_name="Unload Workers",
            category=CATEGORY,
            description="Ends all parallel workers and frees their memory. The next use starts them again.",
            search_aliases=["free memory", "vram", *ALIASES],
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                io.AnyType.Input(
                    "after", tooltip="Anything that has to be finished first, such as the picture; it is passed on."
                )
            ],
            outputs=[io.AnyType.Output("after", tooltip="What came in.")],
        )

    @classmethod
    def execute(cls, after) -> io.NodeOutput:
        count = close_groups()
        text = f"{count} worker group(s) ended"
        show_text(text)
        return io.NodeOutput(after, ui=ui.PreviewText(text))
