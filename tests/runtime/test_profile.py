"""Profiles: what they hold, how they are read at another number of steps, and files that are not what they say."""

import json
import struct
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import torch as safetensors_torch

from liteattention.runtime.config import THRESHOLD_MIN
from liteattention.runtime.profile import FILE_LIMIT, HEADER_LIMIT, Profile, ProfiledLayer, ProfileError

GOOD = Profile("WAN21", (ProfiledLayer("block 0", 12, 128), ProfiledLayer("block 1 #2", 12, 128)),
               (0.0, 0.25, 0.5, 0.75), ((-8.0, -30.0, -6.5, -5.0), (-9.0, -7.0, -30.0, -30.0)),
               ((False, False, False, True), (False,) * 4),
               ((0.0, 0.01, 0.012, 0.018), (0.0, 0.0, 0.002, 0.019)), "mass", True, 0.02, "relative L2", 4, 2304)
KEY = "lite_attention_profile"


def file_of(header=None, tensors=None, metadata=None):
    """A safetensors file as `save` writes it, with other contents."""
    content = {name: torch.tensor(getattr(GOOD, name), dtype=torch.float64)
               for name in ("progress", "thresholds", "restarts", "achieved_error")}
    fields_ = {"version": 1, "architecture": "WAN21", "criterion": "mass", "pool_skipped": True, "target_error": 0.02,
               "metric": "relative L2", "steps": 4, "seqlen": 2304,
               "layers": [["block 0", 12, 128], ["block 1 #2", 12, 128]]}
    fields_.update(header or {})
    fields_ = {name: value for name, value in fields_.items() if value is not ...}
    return safetensors_torch.save({**content, **(tensors or {})},
                                  metadata if metadata is not None else {KEY: json.dumps(fields_)})


def load(tmp_path, content, name="p.safetensors"):
    path = tmp_path / name
    path.write_bytes(content)
    return Profile.load(path)


def test_round_trip(tmp_path):
    path = tmp_path / "models" / "lite_attention" / "wan.safetensors"
    GOOD.save(path)
    assert Profile.load(path) == GOOD == load(tmp_path, file_of())
    assert [p.name for p in path.parent.iterdir()] == ["wan.safetensors"], "no partial file is left"


def test_a_file_is_replaced_only_if_asked_and_never_by_half(tmp_path, monkeypatch):
    path = tmp_path / "wan.safetensors"
    GOOD.save(path)
    GOOD.save(path)  # the same profile: nothing to lose
    other = replace(GOOD, target_error=0.05)
    with pytest.raises(FileExistsError, match="wan.safetensors"):
        other.save(path)
    assert Profile.load(path) == GOOD

    import os
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        other.save(path, overwrite=True)
    assert Profile.load(path) == GOOD and [p.name for p in tmp_path.iterdir()] == ["wan.safetensors"]
    monkeypatch.undo()
    other.save(path, overwrite=True)
    assert Profile.load(path) == other


WRONG = [
    ("architecture", ""), ("architecture", "a\nb"), ("architecture", "x" * 101), ("layers", ()),
    ("layers", (ProfiledLayer("block 0", 12, 128),) * 2), ("layers", (ProfiledLayer("", 1, 1), GOOD.layers[1])),
    ("layers", (ProfiledLayer("a", 0, 128), GOOD.layers[1])),
    ("layers", (ProfiledLayer("a", 12, 4096), GOOD.layers[1])),
    ("progress", (0.0, 0.5, 0.25, 0.75)), ("progress", (0.0, 0.25, 0.5, 1.5)),
    ("progress", ()), ("progress", (float("nan"), 0.25, 0.5, 0.75)),
    ("thresholds", ((-8.0, -30.0, -6.5, 0.5), GOOD.thresholds[1])),
    ("thresholds", ((-8.0, -31.0, -6.5, -5.0), GOOD.thresholds[1])),
    ("thresholds", ((-8.0, float("nan"), -6.5, -5.0), GOOD.thresholds[1])), ("thresholds", GOOD.thresholds[:1]),
    ("restarts", ((False, 0.5, False, True), (False,) * 4)), ("restarts", ((False,) * 4,)),
    ("achieved_error", ((0.0, -0.1, 0.0, 0.0), GOOD.achieved_error[1])), ("achieved_error", ((0.0,), (0.0,))),
    ("achieved_error", ((0.0, float("inf"), 0.0, 0.0), GOOD.achieved_error[1])), ("criterion", "min"),
    ("pool_skipped", 1), ("target_error", 0.0), ("target_error", 1.5), ("target_error", float("nan")), ("metric", "L3"),
    ("steps", 0), ("steps", True), ("steps", 2.0), ("seqlen", 0), ("seqlen", 2**40),
]


@pytest.mark.parametrize("field, value", WRONG)
def test_every_field_is_checked_by_name(field, value):
    with pytest.raises(ProfileError, match=field):
        replace(GOOD, **{field: value})
    assert {name for name, _ in WRONG} == {f.name for f in fields(Profile)}


@pytest.mark.parametrize("content, said", [
    (file_of({"version": 2}), "version"), (file_of({"version": True}), "version"),
    (file_of({"steps": "4"}), "steps"), (file_of({"seqlen": ...}), "fields"), (file_of({"more": 1}), "fields"),
    (file_of({"layers": [["block 0", 12]]}), "layers"), (file_of({"layers": [["block 0", 12, "128"]]}), "layers"),
    (file_of({"layers": [[["x"], 12, 128]] * 2}), "layers"), (file_of({"target_error": "nan"}), "target_error"),
    (file_of({"layers": [["b", 1, 1]] * 3000}), "number of layers"),
    (file_of(tensors={"progress": torch.zeros(4)}), "progress"),
    (file_of(tensors={"thresholds": torch.zeros(2, 4, 1, dtype=torch.float64)}), "thresholds"),
    (file_of(tensors={"thresholds": torch.full((2, 4), torch.nan, dtype=torch.float64)}), "thresholds"),
    (file_of(tensors={"progress": torch.zeros(0, dtype=torch.float64)}), "progress"),
    (file_of(tensors={"restarts": torch.full((2, 4), 0.5, dtype=torch.float64)}), "restarts"),
    (file_of(tensors={"more": torch.zeros(1)}), "tensors"), (file_of(metadata={}), KEY),
    (file_of(metadata={KEY: "[1]"}), KEY), (file_of(metadata={KEY: "{"}), "safetensors"),
    (file_of(metadata={KEY: "[" * 10**5}), "safetensors"),
    (b"", "size"), (b"PK\x03\x04" + bytes(100), "header length"),
    (struct.pack("<Q", 2**63) + bytes(20), "header length"),
    (struct.pack("<Q", HEADER_LIMIT + 1) + bytes(HEADER_LIMIT + 9), "header length"),
    (struct.pack("<Q", 2) + b"{}", KEY), (struct.pack("<Q", 4) + b"null", "safetensors"),
    (file_of()[:-8], "safetensors"), (file_of() + bytes(FILE_LIMIT), "size"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_a_file_that_is_not_a_profile_says_what_is_wrong(tmp_path, content, said):
    with pytest.raises(ProfileError, match=f"^evil.safetensors: .*{said}"):
        load(tmp_path, content, "evil.safetensors")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_a_profile_error_or_a_valid_profile(tmp_path, data):
    """Bytes changed, cut out and put in; whatever loads is within the limits, and whatever does not has one error."""
    content = bytearray(file_of())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        cut = data.draw(st.integers(0, 16))
        content[at:at + cut] = data.draw(st.binary(max_size=16))
    try:
        loaded = load(tmp_path, bytes(content))
    except ProfileError as error:
        assert str(error).startswith("p.safetensors: ") and len(str(error)) < 700
        return
    assert replace(loaded) == loaded and [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def played(steps, first=0, name="block 0"):
    """(thresholds, steps that restart) of a run of so many steps that first records at step `first`."""
    since, thresholds, restarts = -1.0, [], []
    for step in range(first, steps):
        threshold, restart = GOOD.at(name, step / steps, since)
        thresholds.append(threshold)
        restarts += [step] * restart
        since = step / steps
    return thresholds, restarts


def test_each_knot_acts_once_whatever_the_number_of_steps():
    assert played(4) == (list(GOOD.thresholds[0]), [3])
    low = THRESHOLD_MIN
    assert played(8) == ([-8.0, low, low, low, -6.5, low, -5.0, low], [6])
    assert played(2) == ([-8.0, -6.5], []), "the highest of the knots that were passed"
    assert played(3) == ([-8.0, low, -6.5], [])
    for steps in (7, 20, 50):
        thresholds, restarts = played(steps)
        assert [t for t in thresholds if t > low] == [-8.0, -6.5, -5.0]
        assert [steps_ / steps >= 0.75 > (steps_ - 1) / steps for steps_ in restarts] == [True]
    assert played(8, 2)[0][0] == -8.0, "a warm-up of more steps loses none"
    assert played(8, 6) == ([-5.0, low], [6]), "what was before a restart does not act after it"
    assert played(4, name="block 1 #2") == (list(GOOD.thresholds[1]), [])


def test_a_mass_threshold_is_divided_among_the_tiles():
    assert GOOD.at("block 0", 0.0, -1.0, 2304)[0] == -8.0
    assert GOOD.at("block 0", 0.0, -1.0, 2 * 2304)[0] == -9.0
    assert replace(GOOD, criterion="max").at("block 0", 0.0, -1.0, 2 * 2304)[0] == -8.0


def test_what_does_not_fit_is_said():
    with pytest.raises(ProfileError, match="made for WAN21, this model is LTXV"):
        GOOD.check_architecture("LTXV")
    GOOD.check_architecture("WAN21")
    assert GOOD.layer_problem("block 0", 12, 128) is None
    assert "40 heads" in GOOD.layer_problem("block 0", 40, 128) and "not in" in GOOD.layer_problem("block 9", 12, 128)
    assert GOOD.size_warning(2304) is None and "75600" in GOOD.size_warning(75600)
