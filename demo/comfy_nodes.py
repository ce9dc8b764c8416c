"""Two nodes for the tiny demo model, registered only where the demo folder is: a prompt and a decoder."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from .pixels import decode, empty_prompt, from_comfy_latent, prompt_tokens

MODEL_FOLDER = Path(__file__).parent / "model"
SHAPES = ("disc", "square")
SPEEDS = ("slow", "medium", "fast")


class LiteAttentionDemoPrompt(io.ComfyNode):
    """Text conditioning of the tiny demo model, which knows four attributes and no language."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttentionDemoPrompt", display_name="LiteAttention Demo Prompt", category="model/patch/demo",
            description="Prompts for the tiny demo model of the LiteAttention pack.",
            inputs=[
                io.Combo.Input("shape", options=list(SHAPES), tooltip="What moves."),
                io.Int.Input("count", default=2, min=1, max=4, tooltip="How many of them."),
                io.Combo.Input("speed", options=list(SPEEDS), default="medium", tooltip="How fast they move."),
            ],
            outputs=[io.Conditioning.Output(display_name="positive"), io.Conditioning.Output(display_name="negative")],
        )

    @classmethod
    def execute(cls, shape: str, count: int, speed: str) -> io.NodeOutput:
        tokens = prompt_tokens(SHAPES.index(shape), count, SPEEDS.index(speed))
        return io.NodeOutput([[tokens, {}]], [[empty_prompt(), {}]])


class LiteAttentionDemoDecode(io.ComfyNode):
    """Latent of the tiny demo model to frames; the model has no VAE, its channels are pixels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttentionDemoDecode", display_name="LiteAttention Demo Decode", category="model/patch/demo",
            description="Frames of a latent of the tiny demo model of the LiteAttention pack.",
            inputs=[io.Latent.Input("samples", tooltip="Latent from a sampler that ran the tiny demo model.")],
            outputs=[io.Image.Output(display_name="frames")],
        )

    @classmethod
    def execute(cls, samples: dict) -> io.NodeOutput:
        return io.NodeOutput(decode(from_comfy_latent(samples["samples"])))


def register() -> list[type[io.ComfyNode]]:
    """Make the demo model known to UNETLoader and give the demo's nodes."""
    folder_paths.add_model_folder_path("diffusion_models", str(MODEL_FOLDER))
    return [LiteAttentionDemoPrompt, LiteAttentionDemoDecode]
