"""Synthetic q, k, v of one attention layer over a denoising run, shaped like those of a video model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Latent tokens of a video: frames x rows x columns, in this order. Wan: 81 frames are 21 latent frames."""

    frames: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.frames * self.rows * self.columns

    def positions(self, device: torch.device) -> Tensor:
        """float32 [N, 3]: frame, row, column of each token."""
        axes = [torch.arange(n, dtype=torch.float32, device=device) for n in (self.frames, self.rows, self.columns)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


class DriftingLayer:
    """q, k, v of one layer, step by step. `next()` gives those of the next step.

    A score (natural log units, after the softmax scale) is the sum of four parts:

    * position: `strength` * exp(-|d / reach|^2 / 2) of the distance d in (frame, row, column), made of 24 random
      Fourier features. Each head draws its strength (3 to 36) and its three reaches (0.5 frames to all of them, 1.5
      tokens to the whole height and width) log-uniformly: some heads look at a spot, some along time, some everywhere.
    * content: smooth random fields over the video, the same for q and k, mixed at random in each head; standard
      deviation of the score `content` = 1.2.
    * importance of a key: log-normal with `tail` = 0.5, less 1: 0 for half of them, at most 6; the same for all
      queries of a head, and in eight dimensions, or it would be an outlier that no model has for INT8.
    * noise, different for every token and head: standard deviation of the score `noise` = 0.6.

    From one step to the next content, noise and v turn towards fresh ones: x' = sqrt(1 - r^2) x + r fresh, r going from
    `drift` at the first step to `drift` / 20 at the last, linearly, as a denoising run settles. Position and importance
    stay. All figures are assumptions, chosen so that heads differ as much as published maps of video models do; nothing
    here was fitted to a real model. Quote results as synthetic.

    Args:
        grid: of the video's tokens.
        heads, head_dim: 48 dimensions of a head carry position, 8 importance, the others content and noise.
        steps: of the run. dtype, device: of q, k, v. seed: of everything random.
    """

    FEATURES = 24
    MODES = 12
    IMPORTANCE = 8

    def __init__(self, grid: Grid, heads: int, head_dim: int, steps: int, *, dtype: torch.dtype, device: torch.device,
                 seed: int, drift: float = 0.35, content: float = 1.2, tail: float = 0.5, noise: float = 0.6):
        free = head_dim - 2 * self.FEATURES - self.IMPORTANCE
        if free < 8:
            raise ValueError(f"head_dim is {head_dim}; position and importance alone take {head_dim - free} of it")
        self.grid, self.heads, self.head_dim, self.steps, self.dtype = grid, heads, head_dim, steps, dtype
        self.drift, self.content, self.noise = drift, content, noise
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.device = device
        self.step = 0
        self.position = grid.positions(device)
        extent = torch.tensor([grid.frames, grid.rows, grid.columns], dtype=torch.float32, device=device)
        shortest = torch.tensor([0.5, 1.5, 1.5], device=device)
        reach = shortest * (extent / shortest) ** self._uniform(heads, 3)
        self.waves = self._normal(heads, self.FEATURES, 3) / reach[:, None, :]
        # One draw from each of as many equal parts as there are heads: few heads would vary too much with the seed.
        order = torch.randperm(heads, generator=self.generator, device=device)
        self.strength = 3.0 * 12.0 ** ((order + self._uniform(heads)) / heads)
        self.importance = self._normal(grid.tokens, heads).mul_(tail).exp_().sub_(1.0).clamp_(0.0, 6.0)
        self.mixing = self._normal(heads, 3, self.MODES, free) / math.sqrt(self.MODES)
        self.field_waves = self._normal(self.MODES, 3) * 2 * math.pi / extent * 3
        self.field_phases = self._uniform(2, self.MODES) * 2 * math.pi
        self.state = [self._normal(grid.tokens, heads, free, dtype=dtype) for _ in range(2)]
        self.state.append(self._normal(grid.tokens, heads, head_dim, dtype=dtype))
        self.weights = self._normal(2, self.MODES)

    def _normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def _turn(self, old: Tensor, rate: float) -> Tensor:
        return old.mul_(math.sqrt(1 - rate * rate)).add_(self._normal(*old.shape, dtype=old.dtype), alpha=rate)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of this step: [1, H, N, D] over [1, N, H, D] memory; then the step counter moves on."""
        if self.step:
            rate = self.drift * (1 - 0.95 * self.step / max(1, self.steps - 1))
            self.state = [self._turn(x, rate) for x in self.state]
            self.weights = self._turn(self.weights, rate)
        self.step += 1
        # Fourier features of video fields: cos(w x + phase), two sets blended by the drifting weights.
        angles = self.position @ self.field_waves.T
        fields = (self.weights[0] * (angles + self.field_phases[0]).cos()
                  + self.weights[1] * (angles + self.field_phases[1]).cos())
        return tuple(self._tensor(which, fields) for which in range(3))

    def _tensor(self, which: int, fields: Tensor) -> Tensor:
        """q (0), k (1) or v (2), head by head: float32 of all heads at once would take gigabytes."""
        out = torch.empty(1, self.grid.tokens, self.heads, self.head_dim, dtype=self.dtype, device=self.device)
        n_position = 2 * self.FEATURES
        free = self.head_dim - n_position - self.IMPORTANCE
        scale = math.sqrt(math.sqrt(self.head_dim))  # on q and on k: undoes the softmax scale
        for head in range(self.heads):
            rows = out[0, :, head]
            if which == 2:
                rows[:, :free] = fields @ self.mixing[head, 2]
                rows[:, free:] = 0.0
                rows += self.state[2][:, head]
                continue
            angles = self.position @ self.waves[head].T
            size = scale * math.sqrt(self.strength[head].item() / self.FEATURES)
            rows[:, :self.FEATURES] = angles.cos() * size
            rows[:, self.FEATURES:n_position] = angles.sin() * size
            common = fields @ self.mixing[head, 0] * math.sqrt(self.content * math.sqrt(self.MODES) / free)
            own = self.state[which][:, head].float() * math.sqrt(self.noise / math.sqrt(free))
            rows[:, n_position:-self.IMPORTANCE] = (common + own) * scale
            share = scale / math.sqrt(self.IMPORTANCE)
            rows[:, -self.IMPORTANCE:] = self.importance[:, head, None] * share if which else share
        return out.transpose(1, 2)
