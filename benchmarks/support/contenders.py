"""Who is measured: this pack's kernel in its forms, torch's backends, and other packages where they are installed."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from support.masks import TILE
from torch import Tensor

NEVER_DROPS = -30.0
"""log2. On the benchmark's data every tile has a weight above 2^-30 of its rows' strongest: recording drops nothing."""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}
INT8_TOLERANCE = 5e-2
"""Relative L2. INT8 scores of unit-variance q, k with a scale per 64 to 128 tokens are off by 1 to 2 % of a weight."""


@dataclass
class Problem:
    """One group's data: q, k, v [1, H, N, D] over [1, N, H, D] memory; bits bool [1, H, QT, KT]; scratch memory."""

    q: Tensor
    k: Tensor
    v: Tensor
    bits: Tensor
    workspace: object = None
    masks: dict[str, object] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.q.shape[2]

    def mask(self, name: str, full: bool = False) -> object:
        """This contender's own `SkipMask`: of `bits`, or with every tile active."""
        from liteattention.kernels import SkipMask

        if name not in self.masks:
            bits = torch.ones_like(self.bits) if full else self.bits
            self.masks[name] = SkipMask.from_bool(bits, self.tokens, self.tokens)
        return self.masks[name]


Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        form: "dense": another package's, without a mask; "unskipped": a mask with every tile; "read", "record": the
            group's mask, max test; "default": the same as the node launches it by default, recording by the mass test
            with pooled keys; "masked": the group's mask by another package; "own": as many tiles as the mask, chosen
            by itself.
        build: makes the call to time.
        build_check: makes the call to check where it is another one (form "own": all tiles kept; "default": without
            the pooled keys, whose values the kernel tests check).
    """

    name: str
    form: str
    precision: str
    build: Callable[[Problem], Call]
    build_check: Callable[[Problem], Call] | None = None

    @property
    def sparse(self) -> bool:
        """Whether its time depends on the mask."""
        return self.form in ("read", "record", "default", "masked", "own")

    def tolerance(self, dtype: torch.dtype) -> float:
        """Relative L2 against float32 that it has to stay within."""
        return max(TOLERANCES[dtype], INT8_TOLERANCE if self.precision == "int8" else 0.0)


def _lite(name: str, form: str, precision: str) -> Contender:
    def build(p: Problem, pooled: bool = form == "default") -> Call:
        from liteattention.kernels import lite_attention

        # A reader with a threshold visits as a recorder does, so the two differ by the recording alone.
        return functools.partial(
            lite_attention, p.q, p.k, p.v, p.mask(name, full=form == "unskipped"), threshold=NEVER_DROPS,
            criterion="mass" if form == "default" else "max", record=form in ("record", "default"), pool_skipped=pooled,
            precision=precision, workspace=p.workspace, backend="triton" if p.q.is_cuda else "torch")

    without_pooled = functools.partial(build, pooled=False) if form == "default" else None
    return Contender(name, form, precision, build, without_pooled)


def _by_hopper(contender: Contender) -> Contender:
    """The same by the kernel for Hopper, which a run takes on request only."""
    def asked(make: Callable[[Problem], Call]) -> Callable[[Problem], Call]:
        def build(p: Problem) -> Call:
            call = make(p)

            def with_request() -> Tensor:
                os.environ["LITEATTENTION_HOPPER"] = "1"
                try:
                    return call()
                finally:
                    del os.environ["LITEATTENTION_HOPPER"]
            return with_request
        return build

    return replace(contender, precision="hopper", build=asked(contender.build),
                   build_check=contender.build_check and asked(contender.build_check))


def _hopper_passes(device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    if device.type != "cuda":
        return False  # perhaps without Triton
    from liteattention.kernels.triton_hopper_launch import hopper_passes

    return hopper_passes(device, head_dim, dtype)


def _sdpa(name: str, backend: str | None) -> Contender:
    def build(p: Problem) -> Call:
        attention = functools.partial(torch.nn.functional.scaled_dot_product_attention, p.q, p.k, p.v)
        if backend is None:
            return attention

        def call() -> Tensor:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            with sdpa_kernel(SDPBackend[backend]):
                return attention()
        return call

    return Contender(name, "dense", "full", build)


@functools.lru_cache(maxsize=1)
def compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    # Each length is compiled by itself: a kernel for any length is slower, and would be an unfair contender.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    return torch.compile(flex_attention, dynamic=False)


def flex_block_mask(bits: Tensor, tokens: int) -> object:
    """The FlexAttention `BlockMask` of bool [1, H, QT, KT] bits: 128 x 128 blocks, each all active or all inactive.

    All are "full" blocks, so no function is evaluated per score; a ragged last block is cut by the kernel itself.
    """
    from torch.nn.attention.flex_attention import BlockMask

    count = bits.sum(-1, dtype=torch.int32)
    order = bits.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32).contiguous()
    return BlockMask.from_kv_blocks(torch.zeros_like(count), torch.zeros_like(order), count, order,
                                    BLOCK_SIZE=(TILE, TILE), seq_lengths=(tokens, tokens), compute_q_blocks=False)


def _flex(p: Problem) -> Call:
    return functools.partial(compiled_flex(), p.q, p.k, p.v, block_mask=flex_block_mask(p.bits, p.tokens))


def _sage(p: Problem) -> Call:
    from sageattention import sageattn

    # It subtracts the keys' mean in place; on the common k that would change everybody else's data.
    return functools.partial(sageattn, p.q, p.k.clone(), p.v)


def _kitchen_int8(p: Problem) -> Call:
    import comfy_kitchen

    return functools.partial(comfy_kitchen.int8_attention, p.q, p.k, p.v)


def _kitchen_sol(p: Problem, whole: bool = False) -> Call:
    import comfy_kitchen

    q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
    blocks = -(-p.tokens // 64)
    options = {"sink_q": [0, blocks]} if whole else {"topk_ratio": p.bits.float().mean().item(), "tail": False}

    def call() -> Tensor:
        return comfy_kitchen.sol_attn(q, k, v, **options).transpose(1, 2)
    return call


def _why_absent(module: str, attribute: str, package: str) -> str | None:
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a package for another torch or GPU can fail in any way
        return f"{package} cannot be imported: {type(error).__name__}: {error}"
    if not hasattr(found, attribute):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "here"
        return f"{package} {version} has no {attribute}"
    return None


def contenders(device: torch.device, head_dim: int, dtype: torch.dtype) -> tuple[list[Contender], dict[str, str]]:
    """Those that can take part, in the order in which they take turns, and for each other one why not."""
    from liteattention.kernels import precision_choice

    cuda, absent = device.type == "cuda", {}
    present = [_sdpa("sdpa cudnn", "CUDNN_ATTENTION"), _sdpa("sdpa flash", "FLASH_ATTENTION")] if cuda else [
        _sdpa("sdpa", None)]
    if not cuda:
        absent["sdpa cudnn"] = absent["sdpa flash"] = "needs a GPU; here it is torch's own choice for the CPU"
    forms = ("unskipped", "read", "record", "default")
    present += [_lite(f"{form} full", form, "full") for form in forms]
    reason = precision_choice(device, head_dim, dtype, 1 << 20, "int8", "triton" if cuda else "torch").reason
    if reason:
        absent |= {f"{form} int8": reason for form in forms}
    else:
        present += [_lite(f"{form} int8", form, "int8") for form in forms]
    if _hopper_passes(device, head_dim, dtype):
        present += [_by_hopper(_lite(f"{form} hopper", form, "full")) for form in forms]
    else:
        absent |= {f"{form} hopper": "needs sm_90, Triton 3.6 and its passed self-test" for form in forms}
    others = [
        (Contender("flex", "masked", "full", _flex), "torch.nn.attention.flex_attention", "flex_attention", "torch"),
        (Contender("sage", "dense", "int8", _sage), "sageattention", "sageattn", "sageattention"),
        (Contender("kitchen int8", "dense", "int8", _kitchen_int8), "comfy_kitchen", "int8_attention",
         "comfy-kitchen"),
        (Contender("kitchen sol", "own", "int8", _kitchen_sol, functools.partial(_kitchen_sol, whole=True)),
         "comfy_kitchen", "sol_attn", "comfy-kitchen"),
    ]
    for contender, module, attribute, package in others:
        reason = _why_absent(module, attribute, package)
        if not reason and not cuda:
            reason = "runs on a GPU only"
        if not reason and contender.name == "kitchen sol" and head_dim != 128:
            reason = f"head_dim is {head_dim}; it takes 128"
        if reason:
            absent[contender.name] = reason
        else:
            present.append(contender)
    return present, absent
