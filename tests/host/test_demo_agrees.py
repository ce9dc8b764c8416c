"""The embedded pipeline against ComfyUI: same file, same seed, same numbers up to the order of float32 sums."""

import pytest
import torch
from host_kit import LAYERS

from liteattention.benchmarks.demo_pipeline.sampler import comfy_noise, euler_flow, flow_sigmas
from liteattention.benchmarks.demo_pipeline.wan import dense_attention, load_tiny_wan
from liteattention.demo.pixels import empty_prompt, from_comfy_latent, prompt_tokens

SIZE = (5, 16, 16)
SHAPE = (1, 16, *SIZE)
TOLERANCE = 1e-4
"""Of latents up to 1.6 after a run. Measured with ComfyUI 0.33.0 on a CPU: at most 7.5e-6."""


@pytest.fixture(scope="module")
def model(model_folder):
    return load_tiny_wan(model_folder / "tiny_wan_t2v.safetensors")


@pytest.fixture
def transformer(kit):
    """ComfyUI's own transformer of the same file, loaded."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([kit.model])
    return kit.model.model.diffusion_model


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("steps", [1, 4, 6, 7, 20, 33, 1000])
def test_sigmas_and_noise_are_equal(kit, steps, shift):
    import comfy.sample
    import comfy.samplers
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    sampling = ModelSamplingSD3().patch(kit.model, shift)[0].get_model_object("model_sampling")
    theirs = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    ours = flow_sigmas(steps, shift)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 2**-23
    assert torch.equal(comfy_noise(SHAPE, steps), comfy.sample.prepare_noise(torch.zeros(SHAPE), steps))


def test_one_evaluation_agrees(model, transformer):
    x, timestep = comfy_noise((2, *SHAPE[1:]), 3), torch.tensor([937.5, 120.0])
    context = torch.cat([empty_prompt(), prompt_tokens(1, 3, 2)])
    with torch.inference_mode():
        theirs = transformer(x, timestep, context=context, transformer_options={})
    assert theirs.abs().max() > 1
    assert (model(x, timestep, context) - theirs).abs().max() < 5e-5


def test_self_attention_sees_the_same_tokens(model, transformer):
    """Queries, keys and values at the seam, per block: what the kernels are given is what ComfyUI gives them."""
    x, timestep, context = comfy_noise(SHAPE, 3), torch.tensor([937.5]), prompt_tokens(0, 2, 1)
    theirs, ours = [], []

    def override(func, q, k, v, heads, *args, **kwargs):
        if q.shape[1] == k.shape[1]:
            theirs.append((q.clone(), k.clone(), v.clone()))
        return func(q, k, v, heads, *args, **kwargs)

    def attention(q, k, v, heads, block_index):
        ours.append((q, k, v))
        return dense_attention(q, k, v, heads)

    with torch.inference_mode():
        transformer(x, timestep, context=context, transformer_options={"optimized_attention_override": override})
    model(x, timestep, context, attention)
    assert len(ours) == len(theirs) == LAYERS
    for mine, other in zip(ours, theirs, strict=True):
        assert all((a - b).abs().max() < 2e-5 * b.abs().max() for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_whole_run_agrees(kit, model, cfg, batch):
    """Latent, and what the step callback is given, after every one of four steps; the rows are batched alike."""
    theirs, ours, chunks, rows = [], [], [], []
    watched = kit.model.clone()

    def wrapper(apply, args):
        chunks.append([("positive", "negative")[i] for i in args["cond_or_uncond"]])
        return apply(args["input"], args["timestep"], **args["c"])

    watched.set_model_unet_function_wrapper(wrapper)
    latent = kit.sample(watched, 4, cfg, batch=batch, size=SIZE, callback=lambda *args: theirs.append(args))
    result = euler_flow(
        model, comfy_noise((batch, *SHAPE[1:]), 1), flow_sigmas(4, 3.0), prompt_tokens(0, 2, 1), empty_prompt(), cfg,
        on_evaluation=lambda step, sigma, shape, names: rows.append(names), callback=lambda *args: ours.append(args))
    assert (result - from_comfy_latent(latent)).abs().max() < TOLERANCE
    assert rows == [[(name, row) for name in names for row in range(batch)] for names in chunks]
    for (step, denoised, x, steps), other in zip(ours, theirs, strict=True):
        assert (step, steps) == (other[0], other[3])
        assert (denoised - other[1]).abs().max() < TOLERANCE and (x - other[2]).abs().max() < TOLERANCE
