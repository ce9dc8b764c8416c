"""A small, readable Wan 2.1 text-to-video transformer whose self-attention can be replaced.

Architecture: Wan: Open and Advanced Large-Scale Video Generative Models, arXiv 2503.20314, section 4.2. Parameter
names are those of the released checkpoints, so that a bare state dict loads as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

Attention = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
"""(q, k, v, heads, block_index) -> out; all [B, N, H*D]."""


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer; the patch is (frames, height, width) in latent cells."""

    dim: int
    num_layers: int
    ffn_dim: int
    freq_dim: int
    text_dim: int
    channels: int
    head_dim: int = 128
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    @property
    def num_heads(self) -> int:
        return self.dim // self.head_dim

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], head_dim: int = 128) -> WanConfig:
        """Sizes read off a bare Wan state dict, which does not tell the size of a head."""
        patch = state["patch_embedding.weight"]
        ffn = state["blocks.0.ffn.0.weight"]
        return cls(
            dim=patch.shape[0], num_layers=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
            ffn_dim=ffn.shape[0], freq_dim=state["time_embedding.0.weight"].shape[1],
            text_dim=state["text_embedding.0.weight"].shape[1], channels=patch.shape[1],
            head_dim=head_dim, patch_size=tuple(patch.shape[2:]))


def dense_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, block_index: int = 0) -> Tensor:
    """Plain softmax attention; q [B, N, H*D], k and v [B, M, H*D]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def rope_angles(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Rotation angles [N, D/2], float64, of 3-D rotary embedding over (frame, row, column) in raster order."""
    spatial = 2 * (head_dim // 6)
    parts = []
    for size, dim in zip(grid, (head_dim - 2 * spatial, spatial, spatial), strict=True):
        frequencies = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        parts.append(torch.outer(torch.arange(size, dtype=torch.float64, device=device), frequencies))
    t, h, w = grid
    return torch.cat([parts[0][:, None, None].expand(t, h, w, -1), parts[1][None, :, None].expand(t, h, w, -1),
                      parts[2][None, None].expand(t, h, w, -1)], -1).flatten(0, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Apply rotary embedding to x [B, N, H*D]; cos and sin are [N, 1, D/2]; channel pairs are neighbours."""
    even, odd = x.unflatten(-1, (heads, -1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(2)


class WanAttention(nn.Module):
    """Projections of one attention; RMS norm over all channels of q and k."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(config.dim, eps=config.eps) for _ in range(2))

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q from x; k and v from context."""
        return self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)


class WanBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last modulated by the timestep."""

    def __init__(self, config: WanConfig, index: int):
        super().__init__()
        self.index = index
        self.heads = config.num_heads
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.self_attn = WanAttention(config)
        self.cross_attn = WanAttention(config)
        self.ffn = nn.Sequential(nn.Linear(config.dim, config.ffn_dim), nn.GELU("tanh"),
                                 nn.Linear(config.ffn_dim, config.dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(self, x: Tensor, time: Tensor, context: Tensor, cos: Tensor, sin: Tensor,
                attention: Attention) -> Tensor:
        """x [B, N, C], time [B, 6, C], context [B, L, C]."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation + time).chunk(6, dim=1)
        y = self.norm(x) * (1 + scale_a) + shift_a
        q, k, v = self.self_attn.project(y, y)
        q, k = (rotate(t, cos, sin, self.heads) for t in (q, k))
        x = x + self.self_attn.o(attention(q, k, v, self.heads, self.index)) * gate_a
        q, k, v = self.cross_attn.project(self.norm3(x), context)
        x = x + self.cross_attn.o(dense_attention(q, k, v, self.heads))
        return x + self.ffn(self.norm(x) * (1 + scale_f) + shift_f) * gate_f


class WanHead(nn.Module):
    """Token features to patches, modulated by the timestep."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.channels * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, N, C], time [B, C]."""
        shift, scale = (self.modulation + time.unsqueeze(1)).chunk(2, dim=1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class TinyWan(nn.Module):
    """Wan 2.1 T2V."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv3d(config.channels, config.dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, config.dim), nn.GELU("tanh"),
                                            nn.Linear(config.dim, config.dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, config.dim), nn.SiLU(),
                                            nn.Linear(config.dim, config.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, config.dim * 6))
        self.blocks = nn.ModuleList(WanBlock(config, i) for i in range(config.num_layers))
        self.head = WanHead(config)

    def grid(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Tokens per axis for a latent [B, C, T, h, w].

        Raises:
            ValueError: an axis that the patch does not divide.
        """
        for name, size, patch in zip(("T", "h", "w"), latent_shape[2:], self.config.patch_size, strict=True):
            if size % patch:
                raise ValueError(f"latent {name} is {size}; it has to be a multiple of {patch}")
        t, h, w = (size // patch for size, patch in zip(latent_shape[2:], self.config.patch_size, strict=True))
        return t, h, w

    def token_count(self, latent_shape: tuple[int, ...]) -> int:
        """Tokens of a latent [B, C, T, h, w]."""
        return math.prod(self.grid(latent_shape))

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, attention: Attention = dense_attention) -> Tensor:
        """The flow prediction [B, C, T, h, w].

        Args:
            x: noisy latent [B, C, T, h, w].
            timestep: [B], sigma * 1000.
            context: text tokens [B, L, text_dim].
            attention: computes every self-attention.
        """
        config = self.config
        grid = self.grid(tuple(x.shape))
        angles = rope_angles(grid, config.head_dim, x.device).unsqueeze(1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        half = config.freq_dim // 2
        frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float32, device=x.device) / half)
        phase = torch.outer(timestep.float(), frequencies)
        time = self.time_embedding(torch.cat([phase.cos(), phase.sin()], 1).to(x.dtype))
        modulation = self.time_projection(time).unflatten(1, (6, config.dim))
        context = self.text_embedding(context)
        tokens = self.patch_embedding(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, modulation, context, cos, sin, attention)
        patches = self.head(tokens, time).unflatten(1, grid).unflatten(-1, (*config.patch_size, config.channels))
        # [B, t, h, w, pt, ph, pw, C] -> [B, C, t pt, h ph, w pw]
        patches = patches.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return patches.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def load_tiny_wan(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> TinyWan:
    """The model from a bare Wan state dict in safetensors; its metadata may name a head_dim other than 128."""
    with safe_open(path, "pt") as file:
        head_dim = int((file.metadata() or {}).get("head_dim", 128))
    state = load_file(path)
    model = TinyWan(WanConfig.from_state_dict(state, head_dim))
    model.load_state_dict(state)
    return model.to(device=device, dtype=dtype).eval()


def sparse_attention(model: TinyWan, run: object) -> Callable[..., Attention]:
    """An `on_evaluation` of `euler_flow` whose attention goes through a `SamplingRun`, as ComfyUI's does."""
    from liteattention.runtime import AttentionCall, LayerId

    def on_evaluation(step: int, sigma: float, latent_shape: tuple[int, ...], rows: list[tuple[str, int]]) -> Attention:
        forward = run.forward_pass(model=id(model), rows=rows, video_tokens=model.token_count(latent_shape))

        def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, block_index: int) -> Tensor:
            return forward.attend(AttentionCall.from_hook(q, k, v, heads),
                                  LayerId("block", block_index, model.config.num_layers),
                                  lambda: dense_attention(q, k, v, heads))

        return attention

    return on_evaluation
