"""The tiny model in a real ComfyUI in this process: load, patch, sample, watch."""

import comfy.sample
import comfy.sd
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3

from liteattention.demo.pixels import empty_prompt, prompt_tokens
from liteattention.host import attach
from liteattention.runtime import LiteAttentionConfig, RunHandle, Threshold

LAYERS = 5
SIZE = (7, 20, 20)
"""Latent frames, height, width: 700 tokens, 6 x 6 tiles."""


class Kit:
    def __init__(self, model_folder):
        loaded = comfy.sd.load_diffusion_model(str(model_folder / "tiny_wan_t2v.safetensors"),
                                               model_options={"dtype": torch.float32})
        self.model = ModelSamplingSD3().patch(loaded, 3.0)[0]
        self.positive = [[prompt_tokens(0, 2, 1), {}]]
        self.negative = [[empty_prompt(), {}]]

    def lite(self, model=None, handle=None, node_id=None, continue_from=None, **settings):
        """The model with LiteAttention at a threshold where this model drops tiles."""
        config = LiteAttentionConfig(**{"rule": Threshold(-1.0), "min_tokens": 128, "warmup_steps": 1, **settings})
        return attach(model or self.model, config, node_id=node_id, handle=handle or RunHandle(),
                      continue_from=continue_from)

    def latent(self, batch=1, size=SIZE):
        return torch.zeros(batch, 16, *size)

    def sample(self, model, steps=4, cfg=2.0, sampler="euler", positive=None, negative=None, batch=1, size=SIZE,
               seed=1, **kwargs):
        latent = self.latent(batch, size)
        with torch.inference_mode():
            return comfy.sample.sample(
                model, comfy.sample.prepare_noise(latent, seed), steps, cfg, sampler, "simple",
                positive or self.positive, negative or self.negative, latent, seed=seed, disable_pbar=True, **kwargs)

    def watched(self, model):
        """(clone with a counting attention override, list that gets one entry per attention call)."""
        calls = []

        def counting(func, *args, **kwargs):
            calls.append(args[0].shape)
            return func(*args, **kwargs)

        clone = model.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = counting
        return clone, calls


def dense_calls(summary):
    """The dense calls of a run by the text of their reason."""
    return {reason.text: count for reason, count in summary.dense_calls.items()}


def count_backend_calls(monkeypatch):
    """Every attention call of Wan's layers, sparse or dense, counted where it is made."""
    import comfy.ldm.wan.model as wan

    calls = []
    original = wan.optimized_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(wan, "optimized_attention", counted)
    return calls
