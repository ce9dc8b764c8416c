"""What a session must do with random calls, told by a second, simple model: dicts, sets and integers, no tensors.

A mask is a list of integers, one per query tile; bit t is key tile t. The attention is a stand-in (`keeps`) that drops
tiles by a rule that both sides can compute.
"""

import math
from types import SimpleNamespace

TILE = 128


def tiles(seqlen):
    return -(-seqlen // TILE)


def keeps(word, passes, query_tile):
    """The bits that a recording pass leaves of a query tile's word."""
    noise = (word * 2654435761 + passes * 40503 + query_tile * 9176 + 12345) * 1103515245 >> 7
    return word & (noise | noise >> 11 | 1 << query_tile)


class Row:
    def __init__(self, signature):
        self.signature, self.continued = signature, False
        self.reset()

    def reset(self):
        n = tiles(self.signature[1])
        self.words, self.passes = [(1 << n) - 1] * n, 0

    @property
    def active(self):
        return sum(word.bit_count() for word in self.words)

    @property
    def total(self):
        return len(self.words) ** 2

    @property
    def nbytes(self):
        return 4 * len(self.words)  # one head, at most 32 key tiles


class Run:
    """One run. `call` gives (reason or None, rows as they enter the attention)."""

    def __init__(self, settings, total, kept, break_even):
        self.settings, self.total, self.kept, self.break_even = settings, total, kept, break_even
        self.step, self.failed, self.pool_skipped = 0, False, settings["pool_skipped"]
        self.limit, self.free = math.inf, None
        self.asked, self.forecast = {}, {}
        self.layers, self.dropped, self.starved = {}, set(), set()
        self.continued_rows = self.taken = self.evaluations = self.refreshed = self.came_back = 0
        self.left, self.books, self.per_step, self.seen = {}, {}, {}, set()
        self.density, self.dense_steps, self.decided = {}, {}, {}
        self.grown = False

    def phase(self):
        warm, end = self.settings["warmup_steps"], self.settings["dense_end_steps"]
        dense = min(warm, 1 if self.total <= 8 else self.total // 4)
        end_from = max(0, self.total - end)
        if end and self.step >= end_from:
            return "dense end step"
        if self.step >= dense:
            return "sparse step"
        return "recording step" if self.step == dense - 1 and end_from > dense else "warm-up step"

    def call(self, evaluation, layer, rows, seqlen, dtype, device, plan):
        """plan: the faults that this call meets: "alloc" for a new mask, the others ("oom", "bug", "unsupported") for
        the tries of the attention, in order."""
        reason, video = self.why_not(evaluation, layer, rows, seqlen)
        entering, key = [], None
        site, ordinal = evaluation.count(layer) if video else (None, 0)
        if reason is None:
            key = (evaluation.model, device, site, ordinal, evaluation.window)
            reason, entering = self.take(key, layer, rows, (1, seqlen, 64, dtype), plan)
        if reason == "raised":
            return reason, entering
        if evaluation.number not in self.seen:
            self.seen.add(evaluation.number)
            self.evaluations += 1
        book = self.per_step.setdefault(self.step, [0, 0])
        all_tiles = evaluation.batch * tiles(seqlen) ** 2 if video else 0
        book[1] += all_tiles
        if reason is None:
            self.taken += 1
        else:
            self.left[reason] = self.left.get(reason, 0) + 1
            book[0] += all_tiles
        return reason, entering

    def why_not(self, evaluation, layer, rows, seqlen):
        if layer is None:
            return "the model does not say which layer calls", False
        if evaluation.latent is None:
            return "token layout unknown", False
        if seqlen < evaluation.latent:
            return "not the video tokens", False
        if seqlen > 2 * evaluation.latent:
            return "more extra tokens than video tokens", False
        if rows is None:
            return "batch rows without an identity", True
        if evaluation.leave:
            return evaluation.leave, True
        if self.failed:
            return "the kernel failed in this run", True
        if layer.index in self.settings["dense"]:
            return "dense_blocks", True
        phase = self.phase()
        if phase == "dense end step" or (phase == "warm-up step" and self.kept is None):
            return phase, True
        return None, True

    def prefers_dense(self, key):
        if self.break_even is None or self.density.get(key) is None:
            return False
        if key not in self.decided:
            self.decided[key] = self.density[key] > self.break_even and self.dense_steps.get(key, 0) < 3
        return self.decided[key]

    def fits(self, key, layer, names, seqlen):
        """Rows are asked for once per kind of block; those that did not fit stay out."""
        site = (*key[:2], layer.kind, *key[3:])
        admitted, declined = self.asked.setdefault(site, (set(), set()))
        if any(name in declined for name in names):
            return False
        new = set(names) - admitted
        layers = len(set(range(layer.total)) - self.settings["dense"]) if layer.total else 1
        forecast = self.forecast.get(key[1], 0) + len(new) * layers * 4 * tiles(seqlen)
        held = sum(row.nbytes for at, rows in self.layers.items() if at[1] == key[1] for row in rows.values())
        fitting = not new or self.free is None or min(forecast, self.limit) - held <= self.free
        if fitting:
            self.forecast[key[1]] = forecast
        (admitted if fitting else declined).update(new)
        return fitting

    def take(self, key, layer, names, signature, plan):
        if key in self.dropped:
            return "over max_state_mb", []
        if key in self.starved:
            return "no memory for the skip mask", []
        if not self.fits(key, layer, names, signature[1]):
            return "the skip masks would not fit", []
        if self.prefers_dense(key):
            return "dense attention is faster here", []
        held = self.layers.setdefault(key, {})
        for name in names:
            if name in held and held[name].signature != signature:
                del held[name]
            if name not in held:
                row = self.kept.take(key, name, signature) if self.kept is not None else None
                if row is None and "alloc" in plan:
                    self.starved.add(key)
                    del self.layers[key]
                    return "no memory for the skip mask", []
                held[name] = self.new(row, signature)
                self.grown = True
        rows = [held[name] for name in names]
        phase = self.phase()
        if phase != "sparse step":
            own = [row for row in rows if not row.continued]
            if len(own) == len(rows) and (phase == "warm-up step" or all(row.passes for row in own)):
                return "warm-up step", []
            for row in own:
                row.reset()
        return self.attend(key, rows, [fault for fault in plan if fault != "alloc"])

    def new(self, row, signature):
        if row is None:
            return Row(signature)
        self.continued_rows += 1
        fresh = Row(signature)
        fresh.words, fresh.passes, fresh.continued = row.words[:], row.passes, True
        return fresh

    def attend(self, key, rows, plan):
        every = self.settings["refresh_every"]
        before = [row.words[:] for row in rows]
        fresh = sum(not row.passes for row in rows)
        turned = [[qt for qt in range(len(row.words)) if every and row.passes and qt % every == row.passes % every]
                  for row in rows]
        for row, turn in zip(rows, turned, strict=True):
            for qt in turn:
                row.words[qt] = (1 << len(row.words)) - 1
        entering = [(tuple(row.words), row.passes) for row in rows]
        if plan[:1] == ["oom"] and self.pool_skipped:
            self.pool_skipped = False
            plan = plan[1:]
        fault = plan[0] if plan else "unsupported" if len(set(map(id, rows))) < len(rows) else None
        if fault == "unsupported":
            for row, words in zip(rows, before, strict=True):
                row.words = words
            return "mask row used twice", entering
        if fault is not None:
            del self.layers[key]
            if fault == "oom":
                return "raised", entering
            self.failed = True
            return "the kernel failed in this run", entering
        book = self.books.setdefault(key, [0, 0, 0])
        for row, turn, old in zip(rows, turned, before, strict=True):
            book[0] += row.active
            book[1] += row.total
            book[2] += 0 if row.passes else row.total
            row.words = [keeps(word, row.passes, qt) for qt, word in enumerate(row.words)]
            row.passes += 1
            self.refreshed += sum(len(row.words) - old[qt].bit_count() for qt in turn)
            self.came_back += sum((row.words[qt] & ~old[qt]).bit_count() for qt in turn)
        if fresh or self.grown:
            self.grown = False
            while self.nbytes > self.limit:
                judged = {at: sum(row.active for row in held.values()) / sum(row.total for row in held.values())
                          for at, held in self.layers.items() if held and all(row.passes for row in held.values())}
                if not judged:
                    break
                worst = max(judged, key=judged.get)
                del self.layers[worst]
                self.dropped.add(worst)
        return None, entering

    @property
    def nbytes(self):
        return sum(row.nbytes for held in self.layers.values() for row in held.values())

    def end_step(self):
        book = self.per_step.setdefault(self.step, [0, 0])
        for key, (computed, all_tiles, fresh) in self.books.items():
            book[0] += computed
            if all_tiles > fresh:
                self.density[key] = (computed - fresh) / (all_tiles - fresh)
        self.books = {}
        for key, left in self.decided.items():
            self.dense_steps[key] = self.dense_steps.get(key, 0) + 1 if left else 0
        self.decided = {}
        self.step += 1


class Kept:
    """Masks for the next run: {(block, ordinal, window, role): [(row name, model, row)]}."""

    def __init__(self, run):
        self.places = {}
        for (model, _, site, ordinal, window), rows in run.layers.items():
            for name, row in rows.items():
                if row.passes:
                    self.places.setdefault((site, ordinal, window, name[1:]), []).append((name, model, row))

    def take(self, key, name, signature):
        model, _, site, ordinal, window = key
        there = self.places.get((site, ordinal, window, name[1:]), [])
        found = [entry for entry in there if entry[2].signature[:3] == signature[:3]]
        for at, wanted in ((0, name), (1, model)):
            narrower = [entry for entry in found if entry[at] == wanted]
            found = narrower if narrower and len(found) > 1 else found
        if len(found) != 1:
            return None
        there.remove(found[0])
        return found[0][2]


def evaluation(number, model, latent, window, leave, batch):
    """One forward pass; counts the self-attentions over the video's tokens of each block."""
    counts = {}

    def count(layer):
        site = str(layer)
        counts[site] = counts.get(site, 0) + 1
        return site, counts[site] - 1

    return SimpleNamespace(number=number, model=model, latent=latent, window=window, leave=leave, batch=batch,
                           count=count)
