"""Random sequences of model calls: the mask that enters a call is that row's and was only shrunk, a call never raises
but for memory, and the counts add up.

LITEATTENTION_FUZZ_SEED repeats a run, LITEATTENTION_FUZZ_COUNT sets how many sequences.
"""

import os
import random
from collections import Counter

import pytest
import torch

from liteattention.kernels import SkipMask, UnsupportedAttention, tiles
from liteattention.runtime import (
    AttentionCall,
    BreakEvens,
    LayerId,
    LiteAttentionConfig,
    Phase,
    RowName,
    RunHandle,
    SamplingRun,
    Threshold,
    compute,
)
from liteattention.runtime.reasons import EXTRA_PASS

COUNT = int(os.environ.get("LITEATTENTION_FUZZ_COUNT", 1000))
SEED = int(os.environ.get("LITEATTENTION_FUZZ_SEED", random.SystemRandom().randrange(10**6)))
LAYERS = [LayerId("double", 0, 3), LayerId("double", 1, 3), LayerId("single", 0)]
DEVICES = [torch.device("cpu"), torch.device("cpu", 0)]
"""One device under two names: the masks are in main memory, the run sees two."""
ROWS = [RowName("p", 0, 0), RowName("n", 1, 0), RowName("p", 0, 1), RowName("q", 0, 0), RowName("p", 2, 0)]
FAULTS = [["alloc"], ["oom"], ["oom", "oom"], ["unsupported"], ["bug"], ["oom", "bug"]]


class Shape:
    """What is asked of q, k and v before the attention: no data."""

    requires_grad = False

    def __init__(self, batch, seqlen, dtype, device):
        self.shape, self.dtype, self.device = torch.Size((batch, seqlen, 64)), dtype, device

    def dim(self):
        return 3

    def stride(self, axis):
        return 1


def state(mask):
    return tuple(mask.words.flatten().tolist()), mask.passes[0]


def fresh(seqlen):
    return ((1 << tiles(seqlen)) - 1,) * tiles(seqlen), 0


class Wrong(BaseException):
    """A check inside the kernel that fails; a run takes every Exception there for a failure of the kernel."""


class Player:
    """Plays one sequence. `left`: (site, row) -> (mask, its state after the last call, dtype)."""

    def __init__(self, seed, patch):
        self.random = random.Random(seed)
        self.handle, self.faults = RunHandle(), []
        self.full = SkipMask.full
        patch.setattr(compute, "lite_attention", self.attention)
        patch.setattr(SkipMask, "full", self.allocate)

    def allocate(self, *args, **kwargs):
        if "alloc" in self.faults:
            raise torch.OutOfMemoryError("mask")
        return self.full(*args, **kwargs)

    def attention(self, q, k, v, masks, *, must_keep, computed, threshold, criterion, backend, **kwargs):
        """Checks the masks that enter, then drops some of their tiles as a kernel does."""
        try:
            assert (threshold, criterion, backend) == (-4.0, "max", "torch")
            assert (must_keep is None) == (q.shape[1] == self.video), "what is not video is protected"
            self.check(masks, q.shape[1], q.dtype)
            assert not self.broken, "a kernel that has failed is not called again"
        except (AssertionError, LookupError, ValueError) as error:
            raise Wrong from error
        faults = [fault for fault in self.faults if fault != "alloc"]
        if faults:
            self.faults.remove(faults[0])
            self.broken = faults[0] == "bug"
            raise {"oom": torch.OutOfMemoryError("out"), "bug": RuntimeError("no kernel image"),
                   "unsupported": UnsupportedAttention("mask", 1, "2", "not today")}[faults[0]]
        if len(set(map(id, masks))) < len(masks):
            raise UnsupportedAttention("mask", "twice", "once", "mask row used twice")
        for row, mask in zip(self.rows, masks, strict=True):
            words, passes = state(mask)
            self.computed += sum(word.bit_count() for word in words)
            self.total += tiles(q.shape[1]) ** 2
            computed.view(-1)[self.random.randrange(computed.numel())] += sum(word.bit_count() for word in words)
            kept = [word & (self.random.getrandbits(32) | 1 << tile) for tile, word in enumerate(words)]
            mask.words.copy_(torch.tensor(kept, dtype=torch.int32).view_as(mask.words))
            mask.passes[0] += 1
            self.left[self.site, row] = mask, state(mask), q.dtype
        return "sparse"

    def check(self, masks, seqlen, dtype):
        for row, mask in zip(self.rows, masks, strict=True):
            assert self.owner.setdefault(id(mask), (mask, self.site, row))[1:] == (self.site, row), "another row's mask"
            entering = state(mask)
            held, last, was = self.left.get((self.site, row), (None, None, None))
            if held is not None and held.seqlen_q == seqlen:
                anew = self.run.phase() is not Phase.SPARSE and id(held) not in self.carried
                assert (mask is held) == (was == dtype) and entering == (fresh(seqlen) if anew else last)
                self.carried |= {id(mask)} if id(held) in self.carried else set()
            elif entering != fresh(seqlen):
                _, block, ordinal, window, _ = self.site
                self.before[block, ordinal, window, row.role].remove(entering)
                self.carried.add(id(mask))
            self.left[self.site, row] = mask, entering, dtype

    def open(self):
        pick = self.random
        total, prompt = pick.choice([1, 2, 3, 4, 5, 8, 9, 12, 13]), pick.choice([None, "a", "a", "b"])
        config = LiteAttentionConfig(
            rule=Threshold(-4.0), min_tokens=100, dense_blocks=pick.choice(["", "", "1", "0", "-1"]),
            warmup_steps=pick.choice([0, 1, 1, 2, 3]), dense_end_steps=pick.choice([0, 0, 0, 1, 2]))
        density = pick.choice([None, 0.4, 0.6, 0.8])
        masks, why = self.handle.carried() if pick.random() < 0.7 else (None, "not asked for")
        assert (masks is None) == (why != "")
        self.before = {}
        for carried in masks or ():
            place = carried.key.block, carried.key.ordinal, carried.key.window, carried.row.role
            self.before.setdefault(place, []).append(state(carried.mask))
        self.handle.start(prompt)
        known = BreakEvens(lambda *args: density or 1.0, lambda device: None)
        self.run = SamplingRun(config, total, break_evens=known, carried=masks)
        self.left, self.owner, self.carried, self.calls = {}, {}, set(), Counter()
        self.computed = self.total = 0
        self.broken = False
        return total

    def call(self, forward_pass, layer, batch, seqlen, dtype, device):
        """False if the call ran out of memory."""
        self.faults = list(self.random.choice(FAULTS)) if self.random.random() < 0.03 else []
        q, k, v = (Shape(batch, seqlen, dtype, device) for _ in range(3))
        try:
            out = forward_pass.attend(AttentionCall(q, k, v, 1), layer, lambda: "dense")
        except torch.OutOfMemoryError:
            out = "raised"
        self.calls[out] += 1
        held = {id(mask) for rows in self.run.masks.all_masks().values() for mask in rows.values()}
        self.left = {at: entry for at, entry in self.left.items() if id(entry[0]) in held}  # forgotten after a failure
        return out != "raised"

    def forward(self, shapes, extra):
        """One forward pass; False if it was cut short."""
        pick = self.random
        seqlen, dtype = pick.choice(shapes)
        self.video = pick.choice([seqlen - extra] * 12 + [None, seqlen + 1, 100])
        batch = pick.randint(1, 3)
        rows = pick.sample(ROWS[:pick.choice([2, 5])], min(batch, 2)) if batch < 3 else pick.sample(ROWS, 3)
        batch, odd = len(rows), pick.random()
        self.rows = None if odd < 0.01 else rows[1:] if odd < 0.02 else [rows[0]] * batch if odd < 0.05 else rows
        model, window = pick.choice("mmmn"), pick.choice([None, None, None, (0, 1), (1, 2)])
        forward_pass = self.run.forward_pass(model=model, window=window, rows=self.rows, video_tokens=self.video,
                                             stays_dense=pick.choice([None] * 15 + [EXTRA_PASS]))
        device, ordinals = pick.choice([DEVICES[0], DEVICES[0], DEVICES[1]]), Counter()
        for layer in pick.choice([LAYERS, LAYERS, [*LAYERS, LAYERS[0]], [LAYERS[0], None, *LAYERS]]):
            self.site = model, str(layer), ordinals[layer], window, device
            ordinals[layer] += 1
            if not self.call(forward_pass, layer, batch, seqlen, dtype, device) or pick.random() < 0.01:
                return False
        return True

    def play(self):
        for _ in range(self.random.randint(1, 3)):
            total = self.open()
            shapes = self.random.choice([[(300, torch.float16)]] * 4 + [
                [(640, torch.float16)], [(300, torch.float16), (300, torch.float32)],
                [(300, torch.float16), (130, torch.float16)]])
            extra, finished = self.random.choice([0, 0, 10]), True
            for step in range(min(total, 7)):
                for _ in range(self.random.choice([1, 1, 1, 2, 2, 3, 0])):
                    finished = self.forward(shapes, extra)
                    if not finished and self.random.random() < 0.5:
                        break
                    finished = True
                if not finished:
                    break
                assert self.run.end_step(step).step == step + 1
            self.close(finished)

    def close(self, finished):
        run = self.run
        held = [mask for rows in run.masks.all_masks().values() for mask in rows.values()]
        assert run.masks.nbytes == sum(mask.nbytes for mask in held) <= run.masks.peak_bytes
        assert run.counters.sparse_total <= self.total
        if finished:
            self.handle.finish(run)
            carried = [] if self.handle.masks is None else [state(carried.mask) for carried in self.handle.masks]
            assert sorted(carried) == sorted(state(mask) for mask in held if mask.passes[0] and not run.sparse.failed)
        told = run.close()
        assert (told.sparse_calls, sum(told.dense_calls.values())) == (self.calls["sparse"], self.calls["dense"])
        assert (run.counters.sparse_computed, run.counters.sparse_total) == (self.computed, self.total)
        assert told.tiles_total == told.dense_tiles + self.total
        assert told.tiles_computed == told.dense_tiles + self.computed
        by_step, by_layer = run.counters.per_step.values(), run.counters.per_layer.values()
        assert [told.tiles_computed, told.tiles_total] == [sum(sums[i] for sums in by_step) for i in (0, 1)]
        assert [self.computed, self.total] == [sum(sums[i] for steps in by_layer for sums in steps.values())
                                               for i in (0, 1)]
        assert not run.masks.all_masks() and not run.masks.nbytes
        told.text()


def test_random_sequences_of_calls_use_the_masks_they_must(record_property):
    for number in range(COUNT):
        with pytest.MonkeyPatch.context() as patch:
            player = Player(f"{SEED}-{number}", patch)
            try:
                player.play()
            except (Exception, Wrong) as error:
                raise AssertionError(f"sequence {number} of LITEATTENTION_FUZZ_SEED={SEED}") from error
    record_property("counted", ("sequences fuzzed", COUNT, SEED))
