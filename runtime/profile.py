"""A calibrated model: a threshold for each layer and each part of a run, and the file that keeps it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from ..kernels import tiles
from ..kernels.api import CRITERIA
from .config import THRESHOLD_MAX, THRESHOLD_MIN

VERSION = 1
SUFFIX = ".safetensors"
METRICS = ("relative L2", "relative L1", "cosine")
LAYERS_LIMIT, KNOTS_LIMIT = 1024, 256
FILE_LIMIT, HEADER_LIMIT = 8 * 2**20, 2**20
"""Bytes; the largest profile that the other limits allow is smaller."""
TOKENS_LIMIT = 2**24
ERROR_LIMIT = 1e3
_SAME = 1e-9
"""Progress of the same step in runs of other lengths differs by rounding."""
_KEY = "lite_attention_profile"
_TENSORS = ("progress", "thresholds", "restarts", "achieved_error")
_FIELDS = {"version": int, "architecture": str, "layers": list, "criterion": str, "pool_skipped": bool,
           "target_error": float, "metric": str, "steps": int, "seqlen": int}


class ProfileError(ValueError):
    """A profile that cannot be used; says which file and field, its value and what is allowed."""


@dataclass(frozen=True)
class ProfiledLayer:
    """A layer as its model names it (`LayerId`), e.g. "block 3"."""

    name: str
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Profile:
    """Thresholds by layer and progress. Independent of prompt, seed and number of steps.

    Progress is how far the run's schedule has come when a step starts: step / steps, counted from 0. Under one
    scheduler that is the same noise level, whatever the number of steps.

    Attributes:
        architecture: ComfyUI's name of the model class.
        layers: those that were calibrated; others stay with the attention that was there before.
        progress: [K], 0..1, ascending.
        thresholds: log2, [layers, K].
        restarts: [layers, K], knots at which a layer's mask starts anew, with every tile active.
        achieved_error: worst error that the calibrating run measured, [layers, K].
        criterion: the skip test (see `lite_attention`), as is pool_skipped.
        target_error, metric: what no call was to exceed.
        steps: of the calibrating run.
        seqlen: tokens of its attention calls.

    Raises:
        ProfileError: a field with a wrong type, shape or value.
    """

    architecture: str
    layers: tuple[ProfiledLayer, ...]
    progress: tuple[float, ...]
    thresholds: tuple[tuple[float, ...], ...]
    restarts: tuple[tuple[bool, ...], ...]
    achieved_error: tuple[tuple[float, ...], ...]
    criterion: str
    pool_skipped: bool
    target_error: float
    metric: str
    steps: int
    seqlen: int

    def __post_init__(self) -> None:
        def check(good: bool, field: str, value: object, allowed: str) -> None:
            if not good:
                raise ProfileError(f"{field} is {str(value)[:80]!r}; allowed: {allowed}")

        def whole(value: object, low: int, high: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

        def name(value: object) -> bool:
            return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()

        check(name(self.architecture), "architecture", self.architecture, "1 to 100 printable characters")
        check(0 < len(self.layers) <= LAYERS_LIMIT, "number of layers", len(self.layers), f"1 to {LAYERS_LIMIT}")
        for i, layer in enumerate(self.layers):
            check(name(layer.name), f"layers[{i}].name", layer.name, "1 to 100 printable characters")
            check(whole(layer.heads, 1, 1024), f"layers[{i}].heads", layer.heads, "1 to 1024")
            check(whole(layer.head_dim, 1, 1024), f"layers[{i}].head_dim", layer.head_dim, "1 to 1024")
        names = [layer.name for layer in self.layers]
        check(len(set(names)) == len(names), "layers", names, "each name once")
        knots = len(self.progress)
        check(0 < knots <= KNOTS_LIMIT, "number of progress knots", knots, f"1 to {KNOTS_LIMIT}")
        check(all(0 <= p <= 1 for p in self.progress) and
              all(a < b for a, b in zip(self.progress, self.progress[1:], strict=False)),
              "progress", self.progress, "ascending from 0 to 1")
        low, high = THRESHOLD_MIN, THRESHOLD_MAX
        for field, allowed, good in (
                ("thresholds", f"{low:g} to {high:g}", lambda x: low <= x <= high),
                ("restarts", "true, false", lambda x: isinstance(x, bool)),
                ("achieved_error", f"0 to {ERROR_LIMIT:g}", lambda x: 0 <= x <= ERROR_LIMIT)):
            rows = getattr(self, field)
            check(len(rows) == len(self.layers) and all(len(row) == knots for row in rows), f"shape of {field}",
                  [len(rows), *{len(row) for row in rows}], f"[{len(self.layers)}, {knots}]")
            for row in rows:
                for value in row:
                    check(good(value), field, value, allowed)  # NaN is in no range
        check(self.criterion in CRITERIA, "criterion", self.criterion, ", ".join(CRITERIA))
        check(isinstance(self.pool_skipped, bool), "pool_skipped", self.pool_skipped, "true, false")
        check(self.metric in METRICS, "metric", self.metric, ", ".join(METRICS))
        check(0 < self.target_error <= 1, "target_error", self.target_error, "above 0, up to 1")
        check(whole(self.steps, 1, 10000), "steps", self.steps, "1 to 10000")
        check(whole(self.seqlen, 1, TOKENS_LIMIT), "seqlen", self.seqlen, f"1 to {TOKENS_LIMIT}")

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {layer.name: i for i, layer in enumerate(self.layers)}

    def layer(self, name: str) -> ProfiledLayer | None:
        """The layer of this name, or None."""
        number = self._numbers.get(name)
        return None if number is None else self.layers[number]

    def at(self, name: str, progress: float, since: float = -1.0, seqlen: int | None = None) -> tuple[float, bool]:
        """(threshold in log2, whether the mask starts anew) of a layer at this progress.

        A recording pass drops for the rest of the run, so each knot has to act once, in runs of more steps and of
        fewer: the threshold is the highest of the knots that were passed since the layer last recorded at `since` (of
        those from the last restart on), and the lowest possible where none was. A mass threshold is a share of one tile
        of many: at another size it is divided among as many more.
        """
        number = self._numbers[name]
        first, after = (bisect_right(self.progress, at + _SAME) for at in (since, progress))
        restarts = [i for i in range(first, after) if self.restarts[number][i]]
        value = max(self.thresholds[number][restarts[-1] if restarts else first:after], default=THRESHOLD_MIN)
        if self.criterion == "mass" and seqlen is not None:
            value += math.log2(tiles(self.seqlen) / tiles(seqlen))
        return min(max(value, THRESHOLD_MIN), THRESHOLD_MAX), bool(restarts)

    def check_architecture(self, architecture: str) -> None:
        """Raises:
            ProfileError: the model is of another class than the one that was calibrated.
        """
        if architecture != self.architecture:
            raise ProfileError(f"profile was made for {self.architecture}, this model is {architecture}; calibrate "
                               "this model, or remove the profile")

    def layer_problem(self, name: str, heads: int, head_dim: int) -> str | None:
        """Why a layer of the model is not the one of this name that was calibrated, or None."""
        layer = self.layer(name)
        if layer is None:
            return f"layer {name} is not in the profile"
        if (layer.heads, layer.head_dim) == (heads, head_dim):
            return None
        return (f"layer {name} has {heads} heads of {head_dim}, the profile is for {layer.heads} of {layer.head_dim}: "
                f"another size of {self.architecture}; calibrate this model")

    def size_warning(self, seqlen: int) -> str | None:
        """A sentence if calls over so many tokens are not what was calibrated, or None."""
        if tiles(seqlen) == tiles(self.seqlen):
            return None
        return (f"profile was made at {self.seqlen} tokens, this video has {seqlen}: the error may be above the target "
                f"of {self.target_error:g}")

    def describe(self) -> str:
        """One line for people."""
        return (f"profile of {self.architecture}: {len(self.layers)} layers, {self.metric} {self.target_error:g}, "
                f"criterion {self.criterion}{', stand-ins' if self.pool_skipped else ''}, made in {self.steps} steps at "
                f"{self.seqlen} tokens")

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write the file, whole or not at all.

        Raises:
            FileExistsError: there is another one, and `overwrite` is off.
        """
        header = {"version": VERSION, "architecture": self.architecture, "criterion": self.criterion,
                  "layers": [[x.name, x.heads, x.head_dim] for x in self.layers], "pool_skipped": self.pool_skipped,
                  "target_error": float(self.target_error), "metric": self.metric, "steps": self.steps,
                  "seqlen": self.seqlen}
        tensors = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in _TENSORS}
        content = safetensors_torch.save(tensors, {_KEY: json.dumps(header)})
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                os.replace(temporary, path)
            elif not (path.exists() and path.read_bytes() == content):
                _link(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read and check a file.

        Raises:
            ProfileError: it is damaged, of another version or not a profile.
            FileNotFoundError: there is none.
        """
        try:
            return cls(**_read(path))
        except ProfileError as error:
            raise ProfileError(f"{path.name}: {error}") from None


def _link(temporary: str, path: Path) -> None:
    """Give the file its name unless that is taken, in one step where the file system can."""
    taken = FileExistsError(f"{path.name} exists already; choose another name or turn overwrite on")
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise taken from None
    except OSError:  # no hard links here
        if path.exists():
            raise taken from None
        os.replace(temporary, path)


def _read(path: Path) -> dict:
    """The fields of `Profile` from a file, of the right types; their values are checked there."""
    size = path.stat().st_size
    if not 8 < size <= FILE_LIMIT:
        raise ProfileError(f"size is {size} bytes; allowed: 9 to {FILE_LIMIT}")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if length > min(HEADER_LIMIT, len(content) - 8):
        raise ProfileError(f"header length is {length}; allowed: up to {min(HEADER_LIMIT, len(content) - 8)}")
    try:
        tensors = safetensors_torch.load(content)
        metadata = json.loads(content[8:8 + length]).get("__metadata__") or {}
        header = json.loads(metadata[_KEY]) if _KEY in metadata else None
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProfileError(f"not a readable safetensors file: {str(error)[:100]}") from None
    if not isinstance(header, Mapping):
        raise ProfileError(f"{_KEY} is missing from its metadata; allowed: files written by LiteAttention Save Profile")
    version = header.get("version")
    if isinstance(version, bool) or version != VERSION:
        raise ProfileError(f"version is {str(version)[:80]!r}; allowed: {VERSION}")
    if set(header) != set(_FIELDS):
        raise ProfileError(f"fields are {str(sorted(header))[:300]}; allowed: {', '.join(sorted(_FIELDS))}")
    for name, kind in _FIELDS.items():
        if not isinstance(header[name], kind) or (kind is not bool and isinstance(header[name], bool)):
            raise ProfileError(f"{name} is {str(header[name])[:80]!r}; allowed: {kind.__name__}")
    layers = []
    for entry in header["layers"]:
        if not isinstance(entry, list) or [type(x) for x in entry] != [str, int, int]:
            raise ProfileError(f"layers holds {str(entry)[:80]}; allowed: [name, heads, head_dim]")
        layers.append(ProfiledLayer(*entry))
    if set(tensors) != set(_TENSORS):
        raise ProfileError(f"tensors are {str(sorted(tensors))[:300]}; allowed: {', '.join(_TENSORS)}")
    values = {name: _values(name, tensors[name]) for name in _TENSORS}
    return {**{name: header[name] for name in _FIELDS if name not in ("version", "layers")}, **values,
            "layers": tuple(layers)}


def _values(name: str, tensor: Tensor) -> tuple:
    dims = 1 if name == "progress" else 2
    if tensor.dtype != torch.float64 or tensor.dim() != dims or tensor.numel() > LAYERS_LIMIT * KNOTS_LIMIT:
        raise ProfileError(f"{name} is {tensor.dtype} {list(tensor.shape)}; allowed: float64 of {dims} dimensions")
    values = tuple(tensor.tolist()) if dims == 1 else tuple(map(tuple, tensor.tolist()))
    # What is not 0 or 1 stays as it is, and is refused by name.
    return tuple(tuple(bool(x) if x in (0, 1) else x for x in row) for row in values) if name == "restarts" else values
