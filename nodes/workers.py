"""Workers Report and Unload Workers: what a group took so far, and how to end it."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io, ui

from ..parallel_backend.runtime.groups import close_groups, find_model
from .comfy_model import RemoteDiffusionModel
from .group import show_text
from .layout import CATEGORY


class WorkersReport(io.ComfyNode):
    """The report of the workers behind a MODEL, as text on the node and as JSON for other nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HybridDiT_WorkersReport",
            display_name="Workers Report",
            category=CATEGORY,
            description="Layout, versions, seconds a step, and memory of each worker behind a parallel MODEL.",
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
    """A report in a few lines, as they stand on the node."""
    layout, seconds = report["layout"], report["seconds"]
    lines = [
        f"ulysses {layout['ulysses']} x ring {layout['ring']} x tp {layout['tp']} = {layout['ranks']} rank(s)",
        f"{report['backend']}, {report['model']['dtype']}",
        f"start {seconds['start']:.1f} s, load {seconds['load']:.1f} s",
    ]
    if seconds["step_median"] is not None:
        lines.append(f"step {seconds['step_median']:.3f} s (median of {len(seconds['steps'])})")
    lines.append("weights of peak memory:")
    for rank in report["ranks"]:
        weights = sum(rank["weight_bytes"].values())
        lines.append(
            f"rank {rank['rank']}, {rank['device']}: {weights / 2**30:.2f} of {rank['peak_bytes'] / 2**30:.2f} GiB"
        )
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
