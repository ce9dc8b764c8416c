"""Three nodes for the tiny demo model: the model, a prompt and a decoder."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
from comfy_api.latest import io

from .pixels import decode, empty_prompt, from_comfy_latent, prompt_tokens

MODEL_FILE = Path(__file__).parent / "model" / "tiny_wan_t2v.safetensors"
SHAPES = ("disc", "square")
SPEEDS = ("slow", "medium", "fast")


class LiteAttentionDemoModel(io.ComfyNode):
    """The tiny demo model. A loader of its own, so that its file is in no list of the user's models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttentionDemoModel", display_name="LiteAttention Demo Model", category="model/patch/demo",
            description="A video model of 11 MB in the architecture of Wan that draws moving shapes; comes with this "
                        "pack.",
            inputs=[],
            outputs=[io.Model.Output(display_name="model", tooltip="As from Load Diffusion Model.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(comfy.sd.load_diffusion_model(str(MODEL_FILE)))


class LiteAttentionDemoPrompt(io.ComfyNode):
    """Text conditioning of the tiny demo model, which knows four attributes and no language."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttentionDemoPrompt", display_name="LiteAttention Demo Prompt", category="model/patch/demo",
            description="Prompts for the tiny demo model, which knows four attributes and no language.",
            inputs=[
                io.Combo.Input("shape", options=list(SHAPES), tooltip="What moves in the clip."),
                io.Int.Input("count", default=2, min=1, max=4, tooltip="How many of them there are."),
                io.Combo.Input("speed", options=list(SPEEDS), default="medium", tooltip="At what speed they move."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="What is asked for."),
                io.Conditioning.Output(display_name="negative", tooltip="The empty prompt, for cfg."),
            ],
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
            description="Frames of a latent of the tiny demo model, which has no VAE.",
            inputs=[io.Latent.Input("samples", tooltip="Latent from a sampler that ran the tiny demo model.")],
            outputs=[io.Image.Output(display_name="frames", tooltip="The clip.")],
        )

    @classmethod
    def execute(cls, samples: dict) -> io.NodeOutput:
        return io.NodeOutput(decode(from_comfy_latent(samples["samples"])))
