"""One of several gloo processes that run the tiny Wan as Raylight does: xFuser's own attention in it, the sequence or
the batch split. Writes what its runs gave into a folder.

    python parallel_kit.py FOLDER COMFYUI RANK WORLD ULYSSES CFG

Raylight is not on PyPI. What stands here for its parallel forward does the same with this model: the tokens are padded
to a multiple of the processes and split before the blocks, and gathered after them.
"""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager
from functools import partial
from importlib import import_module, util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INNER_KEY = "raylight_inner_attention"
SETTINGS = {"rule": ("Threshold", -1.0), "min_tokens": 128, "warmup_steps": 1}
ODD = (7, 18, 18)
"""567 tokens."""


def import_xfuser(ulysses, cfg, rank):
    """xFuser's attention without what stands beside it in the package: pipelines, diffusers, a GPU."""
    import torch

    folder = Path(util.find_spec("xfuser").origin).parent
    for name in ("xfuser", "xfuser.core", "xfuser.core.cache_manager"):
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
    cache = sys.modules["xfuser.core.cache_manager.cache_manager"] = types.ModuleType("cache_manager")
    cache.get_cache_manager = None
    envs = sys.modules["xfuser.envs"] = sys.modules["xfuser"].envs = types.ModuleType("xfuser.envs")
    envs._is_npu = lambda: False
    npu = "xfuser.core.long_ctx_attention.ring.ring_npu_flash_attn"  # from 0.5 on
    sys.modules[npu] = types.ModuleType(npu)
    sys.modules[npu].xdit_ring_npu_flash_attn_func = None
    groups = sys.modules["xfuser.core.distributed"] = types.ModuleType("xfuser.core.distributed")
    groups.get_ring_parallel_world_size = lambda: 1
    groups.get_classifier_free_guidance_rank = lambda: rank // ulysses if cfg > 1 else 0
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        attention = import_module("xfuser.core.long_ctx_attention").xFuserLongContextAttention
        import_module("xfuser.core.long_ctx_attention.ring.ring_flash_attn")
    finally:
        torch.cuda.is_available = available
    return attention


class Engine:
    """What Raylight has made of a model's attention and forward."""

    def __init__(self, ulysses, cfg, rank):
        import torch
        import torch.distributed as dist
        from yunchang import set_seq_parallel_pg
        from yunchang.kernels import AttnType

        attention = import_xfuser(ulysses, cfg, rank)
        set_seq_parallel_pg(ulysses, 1, rank, ulysses * cfg)
        self.torch, self.dist, self.ulysses, self.cfg = torch, dist, ulysses, cfg
        self.place, self.row = rank % ulysses, rank // ulysses
        self.sequence = import_module("yunchang.globals").PROCESS_GROUP.ULYSSES_PG
        groups = [dist.new_group([place + ulysses * row for row in range(cfg)]) for place in range(ulysses)]
        self.rows = groups[self.place]
        self.attention = attention(attn_type=AttnType.TORCH_MATH)
        self.dispatches = False
        ring = self.attention.ring_attn_fn

        def dispatch(q, k, v, **keywords):
            if self.options is None:
                return ring(q, k, v, **keywords)
            return self.options[INNER_KEY](lambda q, k, v, **others: ring(q, k, v, **others), q, k, v,
                                           transformer_options=self.options, **keywords)

        self.options = None
        self.attention.ring_attn_fn = dispatch

    def attend(self, q, k, v, heads, mask=None, transformer_options=None, **others):
        """In the place of Wan's attention: q, k, v [B, this process's tokens, H*D]."""
        self.options = transformer_options if self.dispatches and INNER_KEY in (transformer_options or {}) else None
        q, k, v = (x.unflatten(-1, (heads, -1)).contiguous() for x in (q, k, v))
        return self.attention(None, q, k, v).flatten(2)

    def split(self, x, dim=1):
        pad = -x.shape[dim] % self.ulysses
        if pad:
            x = self.torch.cat([x, x.new_zeros(*x.shape[:dim], pad, *x.shape[dim + 1:])], dim)
        return x.chunk(self.ulysses, dim)[self.place]

    def gathered(self, x, group, dim):
        parts = [self.torch.empty_like(x) for _ in range(self.dist.get_world_size(group))]
        self.dist.all_gather(parts, x.contiguous(), group=group)
        return self.torch.cat(parts, dim)

    @contextmanager
    def parallel(self, network, inner):
        """The blocks of `network` get their part of the sequence."""
        import comfy.ldm.wan.model as wan

        tokens = []

        def enter(block, args, kwargs):
            x = args[0]
            if block is network.blocks[0]:
                tokens[:] = [x.shape[1]]
                x = self.split(x)
            return (x, *args[1:]), {**kwargs, "freqs": self.split(kwargs["freqs"])}

        def leave(block, args, out):
            return self.gathered(out, self.sequence, 1)[:, :tokens[0]]

        # In front of all other hooks, as a forward that replaces the model's is.
        hooks = [block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True) for block in network.blocks]
        hooks.append(network.blocks[-1].register_forward_hook(leave))
        original, self.dispatches = wan.optimized_attention, inner
        wan.optimized_attention = self.attend
        try:
            yield
        finally:
            wan.optimized_attention = original
            for hook in hooks:
                hook.remove()

    def split_rows(self, executor, x, t, context, *args, **kwargs):
        """DIFFUSION_MODEL wrapper: each process computes one row of the batch."""
        part = [value.chunk(self.cfg)[self.row] for value in (x, t, context)]
        return self.gathered(executor(*part, *args, **kwargs), self.rows, 0)


class Runs:
    """Runs of the tiny model in this process, and what is left of them."""

    def __init__(self, comfy, engine):
        import comfy.patcher_extension as extension
        from host_kit import Kit

        from liteattention.host.raylight import doors, worker

        self.engine, self.worker, self.doors = engine, worker, doors
        self.kit = Kit(ROOT / "demo" / "model")
        self.network = self.kit.model.model.diffusion_model
        self.model = self.kit.model.clone()
        if engine.cfg > 1:
            self.model.add_wrapper(extension.WrappersMP.DIFFUSION_MODEL, engine.split_rows)
        self.parallel = {"is_xdit": True, "ulysses_degree": engine.ulysses, "ring_degree": 1, "cfg_degree": engine.cfg}
        self.results = {}

    def applied(self, model=None, settings=SETTINGS, **parallel):
        return self.worker.apply(model or self.model, settings, {**self.parallel, **parallel})

    def run(self, name, model, inner=False, **sample):
        from liteattention.runtime import SamplingRun

        masks, close = {}, SamplingRun.close

        def watched(run):
            for key, rows in run.masks.all_masks().items():
                masks.update({(key.name, row.number): mask.to_bool().clone() for row, mask in rows.items()})
            return close(run)

        SamplingRun.close = watched
        try:
            if self.engine.ulysses > 1:
                with self.engine.parallel(self.network, inner):
                    latent = self.kit.sample(model, **sample)
            else:
                latent = self.kit.sample(model, **sample)
        finally:
            SamplingRun.close = close
        state, summary = self.worker.last_run(model)
        self.results[name] = {"latent": latent, "state": state, "summary": summary, "masks": masks}
        return latent


def play(runs):
    run, applied = runs.run, runs.applied
    run("dense", runs.model)
    lite = applied()
    run("lite", lite)
    run("off", applied(lite, None))
    run("twice", applied(applied()))
    if runs.engine.cfg > 1:
        return
    run("odd", lite, size=ODD)
    run("odd dense", runs.model, size=ODD)
    run("ring", applied(ring_degree=2))
    out_of_memory(runs)
    import comfy.ldm.wan.model as wan

    own = wan.optimized_attention
    with runs.engine.parallel(runs.network, False):
        through = wan.optimized_attention
        wan.optimized_attention = partial(apart_from_xfuser, own, runs.engine)
        runs.results["never reached"] = {"latent": runs.kit.sample(lite), "summary": runs.worker.last_run(lite)[1]}
        runs.results["never reached dense"] = {"latent": runs.kit.sample(runs.model)}
        wan.optimized_attention = through
    ring = sys.modules[runs.doors.RING]
    select, ring.select_flash_attn_impl = ring.select_flash_attn_impl, lambda attn_type: None
    closed = applied()
    ring.select_flash_attn_impl = select
    run("no door", closed)
    inner_attention(runs)


def apart_from_xfuser(own, engine, q, k, v, heads, mask=None, transformer_options=None, **others):
    """A later Raylight, that reaches its attention in a way that nobody here knows."""
    k, v = (engine.gathered(x, engine.sequence, 1) for x in (k, v))
    return own(q, k, v, heads)


def out_of_memory(runs):
    """The kernel finds no memory on the last rank, in the third step."""
    import torch

    compute = sys.modules["liteattention.runtime.compute"]
    kernel, calls = compute.lite_attention, []

    def scarce(*args, **kwargs):
        calls.append(1)
        if runs.engine.place == runs.engine.ulysses - 1 and len(calls) > 12:
            raise torch.OutOfMemoryError("no room")
        return kernel(*args, **kwargs)

    lite = runs.applied(settings={**SETTINGS, "pool_skipped": False})
    compute.lite_attention = scarce
    runs.run("out of memory", lite)
    compute.lite_attention = kernel


def inner_attention(runs):
    """A Raylight that has `inner_attention` and passes it Wan's options."""
    name = runs.doors.INNER
    for package in ("raylight", "raylight.distributed_modules", name):
        sys.modules[package] = types.ModuleType(package)
    sys.modules[name].INNER_ATTENTION_KEY = INNER_KEY
    runs.doors.PASSES_OPTIONS.add("WanModel")
    lite = runs.applied()
    runs.run("inner", lite, inner=True)
    runs.run("inner off", runs.applied(lite, None), inner=True)
    runs.run("inner odd", lite, inner=True, size=ODD)

    class MiniMaxH3SLA:
        def __call__(self, dense, q, k, v, *, transformer_options, **keywords):
            return dense(q, k, v, **keywords)

    taken = runs.model.clone()
    taken.model_options["transformer_options"][INNER_KEY] = MiniMaxH3SLA()
    try:
        runs.applied(taken)
    except ValueError as error:
        runs.results["refused"] = str(error)
    lite = runs.applied()
    lite.model_options["transformer_options"][INNER_KEY] = MiniMaxH3SLA()
    runs.run("taken later", lite, inner=True)


def main():
    folder, comfy, rank, world, ulysses, cfg = sys.argv[1:]
    rank, world, ulysses, cfg = map(int, (rank, world, ulysses, cfg))
    sys.path[:0] = [str(ROOT / "tools"), comfy]
    from load_pack import load_pack

    load_pack()
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=Path(folder, "meet").as_uri(), rank=rank, world_size=world)
    runs = Runs(comfy, Engine(ulysses, cfg, rank))
    play(runs)
    torch.save(runs.results, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
