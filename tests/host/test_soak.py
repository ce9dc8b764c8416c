"""Many short prompts through ComfyUI's executor in one process: each output is what it was, and memory stays flat.

LITEATTENTION_SOAK_SEED repeats a run, LITEATTENTION_SOAK_COUNT sets how many prompts.
"""

import gc
import logging
import os
import random
import sys
import tracemalloc
import types
from pathlib import Path

import comfy.model_management
import comfy.utils
import pytest
import torch

from liteattention.kernels import SkipMask
from liteattention.nodes.apply import LiteAttention
from liteattention.runtime import ForwardPass, RunHandle, SamplingRun, compute

ROOT = Path(__file__).resolve().parents[2]
execution = pytest.importorskip("execution")
COUNT = int(os.environ.get("LITEATTENTION_SOAK_COUNT", 200))
SEED = int(os.environ.get("LITEATTENTION_SOAK_SEED", random.SystemRandom().randrange(10**6)))
SETTINGS = 24
"""Distinct prompts; the rest are repetitions."""
LOOK = 20
"""Prompts between two looks at the memory."""
TRACED = 0.6
"""From this part of the prompts on, what is allocated is traced."""
PACK_FILES = [tracemalloc.Filter(True, str(ROOT / folder / "*")) for folder in ("kernels", "runtime", "host", "nodes")]


def graph_nodes(kit, results):
    """The ends of the graph: what comes from files otherwise, and an output that keeps the latent's bytes."""
    class Source:
        RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING")
        FUNCTION, CATEGORY = "give", "test"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def give(self):
            return kit.model, kit.positive, kit.negative

    class Latent:
        RETURN_TYPES = ("LATENT",)
        FUNCTION, CATEGORY = "give", "test"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"frames": ("INT", {"default": 5}), "batch": ("INT", {"default": 1}),
                                 "nonce": ("INT", {"default": 0})}}

        def give(self, frames, batch, nonce):
            return ({"samples": kit.latent(batch, (frames, 12, 12))},)

    class Sink:
        RETURN_TYPES, OUTPUT_NODE = (), True
        FUNCTION, CATEGORY = "take", "test"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"samples": ("LATENT",), "nonce": ("INT", {"default": 0})}}

        def take(self, samples, nonce):
            results.append(samples["samples"].numpy().tobytes())
            return {}

    return {"TestSource": Source, "TestLatent": Latent, "TestSink": Sink, "LiteAttention": LiteAttention}


def random_prompt(pick):
    """(prompt without nonces, fault or None)."""
    rules = [{"rule": "threshold", "rule.threshold": value} for value in (-0.5, -1.0, -3.0, -30.0, 0.0)]
    rules += [{"rule": "error budget", "rule.error_budget": value} for value in (0.1, 0.3, 1.0)]

    def node():
        return {"class_type": "LiteAttention", "inputs": {
            "model": ["1", 0], **pick.choice(rules),
            "warmup_steps": pick.choice([0, 1, 1, 2, 100]), "dense_end_steps": pick.choice([0, 0, 1]),
            "dense_blocks": pick.choice(["", "", "0", "-1, 1"]), "min_tokens": 64,
            "precision": pick.choice(["auto", "full", "int8"]), "pool_skipped": pick.random() < 0.7}}

    steps, sampler, cfg = pick.choice([1, 2, 2, 3]), pick.choice(["euler"] * 4 + ["heun"]), pick.choice([1.0, 1.0, 2.0])
    common = {"steps": steps, "cfg": cfg, "sampler_name": sampler, "scheduler": "simple",
              "positive": ["1", 1], "negative": ["1", 2]}
    prompt = {"1": {"class_type": "TestSource", "inputs": {}}, "2": node(),
              "3": {"class_type": "TestLatent", "inputs": {"frames": pick.choice([5, 5, 8]),
                                                           "batch": pick.choice([1, 1, 2])}},
              "9": {"class_type": "TestSink", "inputs": {"samples": ["4", 0]}}}
    seed = pick.randrange(2)
    if steps < 3 or pick.random() < 0.3:
        prompt["4"] = {"class_type": "KSampler", "inputs": {**common, "model": ["2", 0], "latent_image": ["3", 0],
                                                            "seed": seed, "denoise": 1.0}}
    else:
        prompt["5"] = node()
        prompt["5"]["inputs"]["continue_from"] = ["2", 1]
        halves = (("6", ["2", 0], ["3", 0], "enable", 0, 2), ("4", ["5", 0], ["6", 0], "disable", 2, 10000))
        for name, model, latent, noise, start, end in halves:
            prompt[name] = {"class_type": "KSamplerAdvanced", "inputs": {
                **common, "model": model, "latent_image": latent, "add_noise": noise, "noise_seed": seed,
                "start_at_step": start, "end_at_step": end, "return_with_leftover_noise": noise}}
    return prompt, pick.choice([None] * 6 + ["interrupt", "oom", "kernel"])


class Executor:
    """ComfyUI's executor with a server that listens to nobody."""

    def __init__(self, patch, kit):
        import nodes

        self.results, self.runs = [], 0
        for name, cls in graph_nodes(kit, self.results).items():
            patch.setitem(nodes.NODE_CLASS_MAPPINGS, name, cls)
        self.queue = types.SimpleNamespace(currently_running={})
        self.server = types.SimpleNamespace(
            client_id=None, last_node_id=None, last_prompt_id=None, prompt_queue=self.queue, sockets_metadata={},
            send_sync=lambda *args: None, send_progress_text=lambda *args: None)
        # As the server does: its progress bar is where an interrupt is noticed.
        patch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *args, **kwargs:
                      comfy.model_management.throw_exception_if_processing_interrupted())
        patch.setitem(sys.modules, "server",
                      types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=self.server)))
        cache = {"lru": 0, "ram": 0, "ram_inactive": 0}
        self.executor = execution.PromptExecutor(self.server, execution.CacheType.CLASSIC, cache)

    def run(self, prompt, nonces):
        """The latent's bytes, or None if the prompt failed."""
        self.runs += 1
        self.results.clear()
        prompt = {name: {**node, "inputs": dict(node["inputs"])} for name, node in prompt.items()}
        prompt["3"]["inputs"]["nonce"], prompt["9"]["inputs"]["nonce"] = nonces
        name = f"prompt {self.runs}"
        self.server.last_prompt_id = name
        self.executor.execute(prompt, name, {}, ["9"])
        return self.results[0] if self.results else None


def alive():
    """(objects of the pack that hold tensors, masks on the handles of nodes in the cache left out, all tensors)."""
    gc.collect()
    objects = gc.get_objects()
    carried = {id(x.mask) for handle in objects if isinstance(handle, RunHandle) for x in handle.masks or ()}
    return (sum(isinstance(x, (SkipMask, SamplingRun, ForwardPass)) and id(x) not in carried for x in objects),
            sum(isinstance(x, torch.Tensor) for x in objects))


def memory():
    """Bytes that Python holds, of all that is traced: (allocated by files of the pack, by any)."""
    if not tracemalloc.is_tracing():
        return 0, 0
    snapshot = tracemalloc.take_snapshot()
    return tuple(sum(trace.size for trace in found.traces) for found in (snapshot.filter_traces(PACK_FILES), snapshot))


def growth(sizes):
    """The least that was added from one look to the next."""
    return min(after - at for at, after in zip(sizes, sizes[1:], strict=False))


def faulty(patch, fault):
    attention, calls = compute.lite_attention, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) in (4, 5):  # twice: out of memory is first tried again without pooled keys
            if fault != "interrupt":
                raise {"kernel": RuntimeError, "oom": torch.OutOfMemoryError}[fault](fault)
            comfy.model_management.interrupt_current_processing()
        return attention(*args, **kwargs)

    if fault is not None:
        patch.setattr(compute, "lite_attention", failing)


def test_prompts_in_random_settings_in_one_process(kit, record_property):
    pick = random.Random(SEED)
    prompts = [random_prompt(pick) for _ in range(SETTINGS)]
    first, tensors, traced = {}, [], []
    before, _ = alive()  # what other tests in this process have left
    logging.disable(logging.CRITICAL)  # pytest keeps every record
    try:
        with pytest.MonkeyPatch.context() as patch:
            server = Executor(patch, kit)
            for number in range(COUNT):
                if number == int(COUNT * TRACED):
                    tracemalloc.start()
                chosen = pick.randrange(SETTINGS)
                prompt, fault = prompts[chosen]
                # Half of the prompts that repeat find the nodes before the sampler in ComfyUI's cache.
                with pytest.MonkeyPatch.context() as broken:
                    faulty(broken, fault)
                    latent = server.run(prompt, (number, number))
                expected = first.setdefault(chosen, latent)
                assert latent == expected, f"prompt {number} of LITEATTENTION_SOAK_SEED={SEED}: {prompt}"
                assert latent is not None or fault is not None, server.executor.status_messages[-1]
                if number % LOOK == LOOK - 1:
                    server.run(prompts[0][0], (-1, number))  # the caches hold the same prompt at every look
                    of_runs, all_tensors = alive()
                    assert of_runs <= before, f"after prompt {number} of LITEATTENTION_SOAK_SEED={SEED}"
                    tensors.append(all_tensors)
                    traced.append(memory())
    finally:
        comfy.model_management.interrupt_current_processing(False)
        tracemalloc.stop()
        logging.disable(logging.NOTSET)
    assert len(set(first.values())) > SETTINGS // 2, "the settings matter"
    settled = int(COUNT * TRACED) // LOOK + 1  # the first look after one full round of what is traced
    assert max(tensors[settled:]) <= tensors[settled], tensors
    own, every = zip(*traced[settled:], strict=True)
    # Memory held for reuse comes and goes; a leak shows between any two looks.
    assert growth(own) < 4 * 2**10, f"bytes that files of the pack have allocated and nobody has freed: {own}"
    assert growth(every) < 64 * 2**10, every
    record_property("counted", ("prompts soaked", COUNT, SEED))
