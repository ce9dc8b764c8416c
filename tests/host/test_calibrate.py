"""Calibrate, save, load, use: the profile nodes in a real ComfyUI with the tiny model."""

import asyncio
import types
from dataclasses import replace
from pathlib import Path

import folder_paths
import pytest
import torch
from host_kit import LAYERS

from liteattention.host import profiles
from liteattention.nodes import LiteAttentionExtension
from liteattention.nodes.apply import LiteAttention
from liteattention.nodes.profile import LiteAttentionCalibrate, LiteAttentionLoadProfile, LiteAttentionSaveProfile
from liteattention.runtime import ProfileError, ProfileHandle

STEPS, TARGET = 6, 0.1


@pytest.fixture(autouse=True)
def nodes(monkeypatch):
    for node in (LiteAttention, LiteAttentionCalibrate):
        monkeypatch.setattr(node, "hidden", types.SimpleNamespace(unique_id="1", prompt=None))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/lite_attention."""
    profiles.register_folder()
    place = tmp_path / "models" / "lite_attention"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "lite_attention", ([str(place)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("lite_attention", None)
    yield place
    folder_paths.filename_list_cache.pop("lite_attention", None)


@pytest.fixture(scope="module")
def calibrated(kit):
    """(handle with a profile of the tiny model, its latent)."""
    LiteAttentionCalibrate.hidden = types.SimpleNamespace(unique_id="1", prompt=None)
    model, handle = LiteAttentionCalibrate.execute(kit.model, TARGET, "relative L2", min_tokens=128).args
    return handle, kit.sample(model, steps=STEPS)


def lite(kit, profile, **settings):
    """(the model with a profile, its run handle)."""
    return LiteAttention.execute(kit.model, -10.0, 1, **{"min_tokens": 128, "profile": profile, **settings}).args


def test_calibrate_save_load_use(kit, calibrated, folder):
    handle, latent = calibrated
    samples = {"samples": latent}
    saved = LiteAttentionSaveProfile.execute(handle, "tiny", samples=samples)
    assert saved.args[0] is samples and "tiny.safetensors" in saved.ui.as_dict()["text"][0]
    assert [path.name for path in folder.iterdir()] == ["tiny.safetensors"]
    assert LiteAttentionLoadProfile.define_schema().inputs[0].options == ["tiny.safetensors"]
    loaded = LiteAttentionLoadProfile.execute("tiny.safetensors").args[0]
    assert loaded.profile == handle.profile and loaded.profile.architecture == "WAN21"
    assert len(loaded.profile.layers) == LAYERS and loaded.profile.steps == STEPS

    model, run = lite(kit, loaded)
    out = kit.sample(model, steps=STEPS)
    receipt = run.receipt
    assert receipt.taken == STEPS * LAYERS and receipt.skipped > 0.02 and "profile of WAN21" in receipt.rule
    assert torch.isfinite(out).all()
    # The calibrating run has gone where the run with its profile goes.
    assert torch.linalg.norm(out - latent) < 0.05 * torch.linalg.norm(latent)
    kit.sample(model, steps=12)
    assert run.receipt.skipped > 0.02


def test_the_handle_keeps_its_profile_for_nodes_that_run_later(kit, calibrated, folder):
    """The sampler comes from ComfyUI's cache, the saving node has another name: nothing is calibrated anew."""
    handle, _ = calibrated
    for name in ("one", "two.safetensors"):
        LiteAttentionSaveProfile.execute(handle, name)
    assert sorted(profiles.profile_names()) == ["one.safetensors", "two.safetensors"]
    before = LiteAttentionLoadProfile.fingerprint_inputs("one.safetensors")
    other = ProfileHandle(replace(handle.profile, target_error=0.2))
    with pytest.raises(ValueError, match="one.*overwrite"):
        LiteAttentionSaveProfile.execute(other, "one")
    LiteAttentionSaveProfile.execute(other, "one", overwrite=True)
    assert LiteAttentionLoadProfile.fingerprint_inputs("one.safetensors") != before


def test_without_a_finished_run_there_is_no_profile(kit, folder):
    model, handle = LiteAttentionCalibrate.execute(kit.model, TARGET, "relative L2", min_tokens=128).args
    with pytest.raises(ValueError, match="no sampling run.*samples"):
        LiteAttentionSaveProfile.execute(handle, "tiny")

    def stop(step, *_):
        if step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        kit.sample(model, callback=stop)
    with pytest.raises(ValueError, match="did not finish"):
        LiteAttentionSaveProfile.execute(handle, "tiny")
    with pytest.raises(ValueError, match="did not finish"):
        kit.sample(lite(kit, handle)[0])
    assert not folder.exists()


def test_another_architecture_is_refused_and_another_size_is_left(kit, calibrated):
    profile = calibrated[0].profile
    with pytest.raises(ValueError, match="made for LTXV, this model is WAN21"):
        lite(kit, ProfileHandle(replace(profile, architecture="LTXV")))
    late = ProfileHandle()
    model, _ = lite(kit, late)
    late.set(replace(profile, architecture="LTXV"))
    with pytest.raises(ValueError, match="made for LTXV, this model is WAN21"):
        kit.sample(model)

    layers = tuple(replace(layer, heads=40) for layer in profile.layers)
    model, run = lite(kit, ProfileHandle(replace(profile, layers=layers)))
    kit.sample(model)
    assert not run.receipt.taken and run.receipt.left["profile made for another size of the model"] == 4 * LAYERS
    assert any("40 of 128" in note for note in run.receipt.notes)

    model, run = lite(kit, ProfileHandle(replace(profile, seqlen=75_600)))
    kit.sample(model)
    assert run.receipt.taken == 4 * LAYERS and any("75600 tokens" in note for note in run.receipt.notes)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\\b", "/x", "C:x", "..", ".x", "x.", "x ", "con", "LPT1.old",
                                  "x" * 101, "a\0b", "a\nb", "a..b"])
def test_names_stay_in_the_folder(calibrated, folder, name):
    assert "filename is" in LiteAttentionSaveProfile.validate_inputs(name)
    with pytest.raises(ValueError, match="filename is"):
        LiteAttentionSaveProfile.execute(calibrated[0], name)
    with pytest.raises(ValueError, match="profile_name is"):
        LiteAttentionLoadProfile.execute(name + ".safetensors")
    assert not folder.exists()
    assert LiteAttentionSaveProfile.validate_inputs("Wan 2.1 (720p)_v2") is True


def test_a_damaged_file_says_so(folder):
    folder.mkdir(parents=True)
    (folder / "bad.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ProfileError, match="bad.safetensors: header length"):
        LiteAttentionLoadProfile.execute("bad.safetensors")


def test_the_nodes_are_registered_with_their_folder():
    listed = asyncio.run(LiteAttentionExtension().get_node_list())
    for node in (LiteAttentionCalibrate, LiteAttentionSaveProfile, LiteAttentionLoadProfile):
        assert node in listed
        schema = node.define_schema()
        page = Path(__file__).resolve().parents[2] / "web" / "docs" / f"{schema.node_id}.md"
        text = page.read_text(encoding="utf-8")
        assert all(f"**{one.id}**" in text for one in schema.inputs if one.id != "model")
        assert all(one.tooltip for one in [*schema.inputs, *schema.outputs])
    assert Path(folder_paths.get_folder_paths("lite_attention")[0]).name == "lite_attention"
    assert LiteAttention.define_schema().inputs[-1].id == "profile" and issubclass(ProfileError, ValueError)
