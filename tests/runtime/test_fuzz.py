"""Random sequences of model calls against a simple model of what each row's mask must be (`fuzz_model.py`).

LITEATTENTION_FUZZ_SEED repeats a run, LITEATTENTION_FUZZ_COUNT sets how many sequences.
"""

import os
import random

import fuzz_model
import pytest
import torch

from liteattention.kernels import SkipMask, UnsupportedAttention
from liteattention.runtime import (
    AttentionCall,
    BreakEvens,
    LayerId,
    LiteAttentionConfig,
    RowName,
    RunHandle,
    Session,
    evaluation,
)

COUNT = int(os.environ.get("LITEATTENTION_FUZZ_COUNT", 3000))
SEED = int(os.environ.get("LITEATTENTION_FUZZ_SEED", random.SystemRandom().randrange(10**6)))
LAYERS = [LayerId("double", 0, 3), LayerId("double", 1, 3), LayerId("single", 0)]
DEVICES = [torch.device("cpu"), torch.device("cpu", 0)]
"""One device under two names: the masks are in main memory, the session sees two."""
ROWS = [RowName("p", 0, 0), RowName("n", 1, 0), RowName("p", 0, 1), RowName("q", 0, 0), RowName("p", 2, 0)]
DENSE_BLOCKS = {"": set(), "1": {1}, "0": {0}, "-1": {2}}


class Shape:
    """What is asked of q, k and v before the attention: no data."""

    requires_grad = False

    def __init__(self, batch, seqlen, dtype, device):
        self.shape, self.dtype, self.device = torch.Size((batch, seqlen, 64)), dtype, device

    def dim(self):
        return 3

    def stride(self, axis):
        return 1


class Player:
    """Plays one sequence on both sides and compares after every call."""

    def __init__(self, seed, patch):
        self.random = random.Random(seed)
        self.handle, self.before, self.prompt, self.several = RunHandle(), None, None, False
        self.plan, self.seen = [], None
        self.full = SkipMask.full
        patch.setattr(evaluation, "lite_attention", self.attention)
        patch.setattr(SkipMask, "full", self.allocate)

    def allocate(self, *args, **kwargs):
        if "alloc" in self.plan:
            raise torch.OutOfMemoryError("mask")
        return self.full(*args, **kwargs)

    def attention(self, q, k, v, masks, *, threshold, must_keep, pool_skipped, computed, skip_now, backend, **kwargs):
        self.seen = [(tuple(mask.words.flatten().tolist()), mask.passes[0]) for mask in masks]
        assert backend == "torch" and threshold == -4.0 and kwargs["criterion"] == "max"
        assert (must_keep is None) == (q.shape[1] == self.latent)
        assert not skip_now or any(passes == 0 for _, passes in self.seen), "only a first recording may skip at once"
        self.tried_with = pool_skipped
        faults = [fault for fault in self.plan if fault != "alloc"]
        if faults:
            self.plan.remove(faults[0])
            raise {"oom": torch.OutOfMemoryError("out"), "bug": RuntimeError("no kernel image"),
                   "unsupported": UnsupportedAttention("mask", 1, "2", "mask row used twice")}[faults[0]]
        if len(set(map(id, masks))) < len(masks):
            raise UnsupportedAttention("mask", "twice", "once", "mask row used twice")
        for mask, (words, passes) in zip(masks, self.seen, strict=True):
            computed.view(-1)[0] += sum(word.bit_count() for word in words)
            left = [fuzz_model.keeps(word, passes, qt) for qt, word in enumerate(words)]
            mask.words.copy_(torch.tensor(left, dtype=torch.int32).view_as(mask.words))
            mask.passes[0] += 1
        return "ours"

    def open(self):
        """A run on both sides, one that continues the last where both agree that it can."""
        pick = self.random
        settings = {"warmup_steps": pick.choice([0, 1, 1, 2, 3]), "dense_end_steps": pick.choice([0, 0, 0, 1, 2]),
                    "refresh_every": pick.choice([0, 0, 1, 2, 3]), "pool_skipped": pick.random() < 0.8}
        blocks = pick.choice(["", "", *DENSE_BLOCKS])
        total = pick.choice([1, 2, 3, 4, 5, 8, 9, 12, 13])
        break_even = pick.choice([None, 0.4, 0.6, 0.8])
        prompt = pick.choice([None, "a", "a", "b"])
        masks, expected = None, None
        if pick.random() < 0.7:
            masks, why = self.handle.take(prompt)
            expected, self.before = self.before if prompt == self.prompt else None, None
            assert (masks is None) == (expected is None) == (why != ""), why
        # One of several runs in the same prompt is not to be continued, unless the one before it has been.
        self.several = prompt is not None and prompt == self.prompt and (self.several or self.before is not None)
        self.before, self.prompt = None, prompt
        self.handle.start(prompt)
        config = LiteAttentionConfig(threshold=-4.0, min_tokens=100, dense_blocks=blocks, **settings)
        table = BreakEvens(lambda *args: break_even, lambda device: None) if break_even else None
        free = pick.choice([None, None, None, 10**9, 60, 150])
        self.run = Session(config, total, break_evens=table, kept=masks, free_memory=lambda device: free)
        model = fuzz_model.Run({**settings, "dense": DENSE_BLOCKS[blocks]}, total, expected, break_even)
        model.free = free
        if pick.random() < 0.3:
            model.limit = self.run.masks.limit_bytes = pick.choice([20, 60, 100])
        self.model = model
        return total

    def call(self, context, mirror, layer, rows, seqlen, dtype, device):
        pick, batch = self.random, mirror.batch
        plan = pick.choice([["alloc"], ["oom"], ["oom", "oom"], ["unsupported"], ["bug"], ["oom", "bug"]]) \
            if pick.random() < 0.03 else []
        self.plan, self.seen = list(plan), None
        reason, entering = self.model.call(mirror, layer, rows if rows and len(rows) == batch else None, seqlen, dtype,
                                           device, plan)
        left = dict(self.run.statistics.left)
        q, k, v = (Shape(batch, seqlen, dtype, device) for _ in range(3))
        try:
            out = context.attend(AttentionCall(q, k, v, 1), layer, lambda: "theirs")
        except torch.OutOfMemoryError:
            out = "raised"
        now = {name: n - left.get(name, 0) for name, n in self.run.statistics.left.items() if n != left.get(name, 0)}
        assert (out, now) == {"raised": ("raised", {}), None: ("ours", {})}.get(reason, ("theirs", {reason: 1}))
        assert (self.seen or []) == entering and (not entering or self.tried_with == self.model.pool_skipped)
        assert self.run.failed == self.model.failed and self.run.pool_skipped == self.model.pool_skipped
        return out != "raised"

    def forward(self, latent, shapes):
        """One evaluation; False if it was cut short."""
        pick = self.random
        seqlen, dtype = pick.choice(shapes)
        self.latent = pick.choice([latent(seqlen)] * 12 + [None, seqlen + 1, 100])
        batch = pick.randint(1, 3)
        rows = pick.sample(ROWS[:pick.choice([2, 5])], min(batch, 2)) if batch < 3 else pick.sample(ROWS, 3)
        batch = len(rows)
        odd = pick.random()
        rows = None if odd < 0.01 else rows[1:] if odd < 0.02 else [rows[0]] * batch if odd < 0.05 else rows
        given = {"model": pick.choice("mmmn"), "window": pick.choice([None, None, None, (0, 1), (1, 2)]),
                 "leave": pick.choice([None] * 15 + ["extra guidance pass"])}
        context = self.run.evaluation(rows=rows, latent_tokens=self.latent, **given)
        mirror = fuzz_model.evaluation(context.number, latent=self.latent, batch=batch, **given)
        device = pick.choice([DEVICES[0], DEVICES[0], DEVICES[1]])
        for layer in pick.choice([LAYERS, LAYERS, [*LAYERS, LAYERS[0]], [LAYERS[0], None, *LAYERS]]):
            if not self.call(context, mirror, layer, rows, seqlen, dtype, device) or pick.random() < 0.01:
                return False
        return True

    def compare(self):
        run, model = self.run, self.model
        held = {(key.model, key.device, key.name, key.ordinal, key.window, row):
                (mask.words.flatten().tolist(), mask.passes)
                for key, rows in run.masks.all_masks().items() for row, mask in rows.items()}
        assert held == {(*at, name): (row.words, [row.passes]) for at, rows in model.layers.items()
                        for name, row in rows.items()}
        assert run.masks.nbytes == model.nbytes and run.masks.continued_rows == model.continued_rows

    def play(self):
        for _ in range(self.random.randint(1, 3)):
            total = self.open()
            shapes = self.random.choice([[(300, torch.float16)]] * 4 + [
                [(640, torch.float16)], [(300, torch.float16), (300, torch.float32)],
                [(300, torch.float16), (130, torch.float16)]])
            extra = self.random.choice([0, 0, 10])
            finished = True
            for step in range(min(total, 7)):
                for _ in range(self.random.choice([1, 1, 1, 2, 2, 3, 0])):
                    finished = self.forward(lambda seqlen, extra=extra: seqlen - extra, shapes)
                    if not finished and self.random.random() < 0.5:
                        break
                    finished = True
                if not finished:
                    break
                self.compare()
                report = self.run.end_step(step)
                assert report.step == step + 1
                self.model.end_step()
            self.compare()
            self.close(finished)

    def close(self, finished):
        wanted = self.random.random() < 0.8
        if finished:
            self.handle.keep(self.run, wanted)
            if wanted and not self.model.failed and not self.several:
                kept_masks = fuzz_model.Kept(self.model)
                self.before = kept_masks if kept_masks.places else None
        receipt = self.run.close()
        model = self.model
        model.end_step()
        assert (receipt.taken, receipt.left, receipt.evaluations) == (model.taken, model.left, model.evaluations)
        assert (receipt.refreshed, receipt.came_back) == (model.refreshed, model.came_back)
        computed, total = (sum(book[i] for book in model.per_step.values()) for i in (0, 1))
        assert (receipt.tiles_computed, receipt.tiles_total) == (computed, total)
        assert not self.run.masks.all_masks() and not self.run.masks.nbytes
        assert (self.handle.kept_bytes > 0) == (self.before is not None)
        assert set(receipt.dense_layers) == {at[2] for at in model.dropped}


def test_random_sequences_of_calls_use_the_masks_they_must(record_property):
    for number in range(COUNT):
        seed = f"{SEED}-{number}"
        with pytest.MonkeyPatch.context() as patch:
            player = Player(seed, patch)
            try:
                player.play()
            except Exception as error:
                raise AssertionError(
                    f"sequence {number} of LITEATTENTION_FUZZ_SEED={SEED} differs from the model") from error
    record_property("counted", ("sequences fuzzed", COUNT, SEED))
