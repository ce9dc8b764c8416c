"""The demo command: what it runs, and what it says of it."""

import types

import pytest
import torch

from liteattention.benchmarks.demo_pipeline import run as demo
from liteattention.benchmarks.demo_pipeline.sampler import comfy_noise, euler_flow, flow_sigmas
from liteattention.benchmarks.demo_pipeline.wan import load_tiny_wan
from liteattention.demo.pixels import empty_prompt, prompt_tokens

MODEL = demo.ROOT / "demo" / "model" / "tiny_wan_t2v.safetensors"


def result(seconds, steps=10, latent=None):
    return demo.Result({"seconds": seconds, "total_steps": steps}, latent)


@pytest.mark.parametrize(("lite_seconds", "fit"), [(14.0, 14), (14.4, 14), (19.9, None), (25.0, None), (0.1, 1)])
def test_dense_in_the_same_time(lite_seconds, fit):
    calls = []

    def sample(steps, sparse):
        calls.append((steps, sparse))
        return result(lite_seconds if sparse else 1.0 * steps, steps)

    runs = demo.compare(sample, 20)
    assert calls == [(1, False), (20, False), (20, True), *([] if fit is None else [(fit, False)])]
    assert runs.lite.seconds == lite_seconds and runs.dense.seconds == 20.0
    assert (runs.fewer_steps and runs.fewer_steps.summary["total_steps"]) == fit


def test_the_table_puts_the_gain_first():
    numbers = {"seconds": 10.0, "dense_seconds": 30.0, "dense_attention": "attention_sub_quad",
               "fused": {"seconds": 9.0, "dense_seconds": 13.5}, "skipped": 0.5, "psnr_db": 50.0,
               "motion_psnr_db": 48.0,
               "fewer_steps": {"steps": 13, "seconds": 9.8, "psnr_db": 35.0}, "skipped_per_step": [None, 0.5],
               "steps": 20, "tokens": 5184, "mask_bytes": 8, "backend": "b", "engine": "e"}
    rows = demo.table(numbers, {"plan": "p", "rule": "r"})
    assert rows[0] == ("sampling", "10.0 s, dense 30.0 s: 3.00x as fast (attention_sub_quad)")
    assert rows[1] == ("with torch's fused attention", "9.0 s, dense 13.5 s: 1.50x as fast")
    assert dict(rows)["in the same time"] == "dense in 13 steps (9.8 s): 35.0 dB"
    slower = demo.table({**numbers, "seconds": 40.0, "fewer_steps": None, "fused": None}, {"plan": "p", "rule": "r"})
    assert "0.75x" in slower[0][1] and slower[1][0] == "attention skipped"


def test_embedded_runs_are_the_samplers():
    args = demo.make_parser().parse_args(["--frames", "5", "--size", "24", "--error-budget", "1"])
    with demo.embedded(args) as sample:
        dense, lite = sample(3, False), sample(3, True)
    model = load_tiny_wan(MODEL)
    expected = euler_flow(model, comfy_noise((1, 16, 5, 24, 24), args.seed), flow_sigmas(3, 3.0),
                          prompt_tokens(0, 2, 1), empty_prompt(), 2.0)
    assert torch.equal(dense.latent, expected) and not torch.equal(lite.latent, expected)
    assert dense.summary["sparse_calls"] == 0 < lite.summary["sparse_calls"]
    assert dense.seconds > 0 and lite.summary["skipped"] > 0


def test_the_command_gives_the_numbers_again():
    args = demo.make_parser().parse_args(["--threshold", "-3", "--no-pool-skipped", "--size", "32", "--out", "x"])
    again = demo.make_parser().parse_args(demo.command(args).split()[2:])
    assert vars(again) == {**vars(args), "out": again.out}


def test_on_a_cpu_comfyui_runs_with_both_attentions(monkeypatch):
    started = []

    class Server:
        def __init__(self, options):
            started.append(options)

        def __enter__(self):
            return lambda steps, sparse: result(steps / 20 * (2.0 if sparse else 6.0 / len(started)), steps)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(demo, "in_comfyui", lambda args, path, options: Server(options))
    runs = demo.compare_in_comfyui(types.SimpleNamespace(steps=20), None)
    assert started == [("--cpu",), ("--cpu", "--use-pytorch-cross-attention")]
    assert (runs.dense.seconds, runs.fused.dense.seconds) == (6.0, 3.0)
