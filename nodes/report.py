"""Nodes that show what a run did: its summary as a picture, and two clips of the same seed side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence

from comfy_api.latest import io, ui

from ..host import language, run_handle
from ..report import MaskPicture, compare_clips, draw_run, mask_pictures
from ..runtime import RunHandle, RunSummary, parse_blocks, words

_FRAMES_MAX, _GAIN_MAX = 8, 64.0

NOT_ON_MODEL = "the model has no LiteAttention on it (bypassed or not connected)"
NO_RUN = "no sampling run of this model has finished; connect the latent of the sampler that uses it to samples"


def report_outputs() -> list[io.Output]:
    """What a report gives."""
    return [
        io.Latent.Output(display_name="samples", tooltip="The latent as it came."),
        io.Image.Output(display_name="plot", tooltip="The picture, 1600 x 1200."),
        io.String.Output(display_name="summary", tooltip="The same in a few lines of text."),
        io.String.Output(display_name="stats", tooltip="Every number as JSON. Please add it to bug reports."),
    ]


def reported(node: type[io.ComfyNode], samples: dict, summary: RunSummary,
             pictures: Sequence[MaskPicture] = ()) -> io.NodeOutput:
    """A run as `report_outputs`, with its picture on the node."""
    stats = summary.to_dict()
    plot = draw_run(stats, pictures)
    return io.NodeOutput(samples, plot, summary.report(language()), json.dumps(stats),
                         ui=ui.PreviewImage(plot, cls=node))


class LiteAttentionReport(io.ComfyNode):
    """The last sampling run of a patched model, as a picture, as text and as JSON."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttentionReport",
            display_name="LiteAttention Report",
            category="model/patch",
            search_aliases=["statistics", "skip mask", "benchmark"],
            description="What LiteAttention did in the last sampling run: skipped share per step and layer, the masks, "
                        "which calls stayed dense and why, time saved, what to try.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the sampler used, patched by LiteAttention."),
                io.Latent.Input("samples", tooltip="The sampler's latent; passed through. It makes this node wait for "
                                                   "the sampler."),
                io.String.Input(
                    "layers", default="", advanced=True,
                    tooltip='Transformer blocks whose masks are drawn, as in "0, 12, -1"; at most four. Empty: some, '
                            "evenly spread."),
                io.String.Input(
                    "heads", default="", advanced=True,
                    tooltip='Heads whose masks are drawn, as in "0, 5"; at most two. Empty: all heads at once, and the '
                            "one that skips most."),
            ],
            outputs=report_outputs(),
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, layers: str | None = None, heads: str | None = None) -> bool | str:
        """Numbers that cannot be read; linked values are not known yet and arrive as None."""
        for name, value in (("layers", layers), ("heads", heads)):
            try:
                parse_blocks(value or "")
            except ValueError as error:
                return f"{name}: {error}"
        return True

    @classmethod
    def execute(cls, model, samples: dict, layers: str = "", heads: str = "") -> io.NodeOutput:
        # Without a run there is nothing to report, and still a latent that has to get on: never an error.
        found = run_handle(model)
        handle = found or RunHandle()
        summary = handle.summary or RunSummary.off(NO_RUN if found else NOT_ON_MODEL)
        pictures = [] if handle.masks is None else mask_pictures(
            handle.masks.by_layer(), parse_blocks(layers).holds, parse_blocks(heads).holds,
            handle.layout.frame_edges if handle.layout is not None else lambda seqlen: ())
        return reported(cls, samples, summary, pictures)


class LiteAttentionCompare(io.ComfyNode):
    """A dense and a lite clip of the same seed: PSNR, SSIM and a strip of frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttentionCompare",
            display_name="LiteAttention Compare",
            category="image/video",
            search_aliases=["psnr", "ssim", "difference", "quality"],
            description="Two clips of the same seed, one without and one with LiteAttention: frames, their difference, "
                        "PSNR and SSIM of each frame.",
            inputs=[
                io.Image.Input("dense", tooltip="Decoded frames of the run without LiteAttention."),
                io.Image.Input("lite", tooltip="Decoded frames of the run with it: same seed, size and settings."),
                io.Int.Input("frames", default=4, min=1, max=_FRAMES_MAX,
                             tooltip="How many frames are shown, evenly spread over the clip."),
                io.Float.Input("gain", default=8.0, min=1.0, max=_GAIN_MAX, step=1.0, advanced=True,
                               tooltip="The difference is multiplied by this to be seen at all."),
            ],
            outputs=[
                io.Image.Output(display_name="strip", tooltip="Dense, lite, difference; PSNR and SSIM below."),
                io.String.Output(display_name="summary",
                                 tooltip="PSNR and SSIM, also of the worst frame; PSNR of the motion."),
                io.String.Output(display_name="stats", tooltip="Every number as JSON."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, dense, lite, frames: int = 4, gain: float = 8.0) -> io.NodeOutput:
        strip, summary, stats = compare_clips(dense, lite, frames, gain, words(language()))
        return io.NodeOutput(strip, summary, json.dumps(stats), ui=ui.PreviewImage(strip, cls=cls))
