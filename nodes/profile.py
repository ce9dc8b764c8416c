"""Nodes that make, save and load calibrated profiles."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host import ProfiledRuns, attach, profiles
from ..runtime import CalibrationTarget, LiteAttentionConfig, ProfileHandle, parse_blocks
from ..runtime.calibration import STARTS, TARGET_MAX, TARGET_MIN
from ..runtime.config import (
    PRECISIONS,
    STATE_MB_DEFAULT,
    STATE_MB_MAX,
    STATE_MB_MIN,
    STEPS_MAX,
    TOKENS_MAX,
)
from ..runtime.profile import METRICS
from .apply import LiteAttentionProfile


class LiteAttentionCalibrate(io.ComfyNode):
    """Patches a model so that a sampling run finds thresholds for each layer and part of a run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttentionCalibrate",
            display_name="LiteAttention Calibrate",
            category="model/patch",
            search_aliases=["sparse attention", "calibration", "profile", "tune"],
            description="One sampling run with this model measures how much attention each layer can do without, and "
                        "leaves a profile for LiteAttention. That run takes up to three times the attention of a usual "
                        "one. Put it last before the sampler, in the place of LiteAttention.",
            inputs=[
                io.Model.Input("model", tooltip="The model to calibrate, patched as it will be used."),
                io.Float.Input(
                    "target_error", default=0.02, min=TARGET_MIN, max=TARGET_MAX, step=0.001, round=TARGET_MIN,
                    tooltip="The error against dense attention that no attention call of the run may exceed. 0.02 is "
                            "2 %. With other prompts single calls can exceed it, by half or more. Half of it "
                            "skips a good deal less."),
                io.Combo.Input(
                    "metric", options=list(METRICS), default=METRICS[0],
                    tooltip="How the error of a call is measured, over all its tokens. cosine is 1 - cosine "
                            "similarity: a relative L2 of 0.02 is about 0.0002 there."),
                io.Combo.Input(
                    "criterion", options=list(STARTS), default="mass", advanced=True,
                    tooltip="What a threshold is compared with. max: a tile's strongest match, as threshold of "
                            "LiteAttention. mass: its share of a token's attention, as error_budget."),
                io.Boolean.Input(
                    "pool_skipped", default=True, advanced=True,
                    tooltip="Represent skipped tiles by their means, as in LiteAttention. Part of the profile."),
                io.Int.Input(
                    "warmup_steps", default=1, min=0, max=STEPS_MAX, advanced=True,
                    tooltip="Steps at the start that compute everything. A profile made with 1 can be used with more."),
                io.String.Input(
                    "dense_blocks", default="", advanced=True,
                    tooltip='Transformer blocks that are left out of the profile, as in "0-1, 38, -1".'),
                io.Int.Input(
                    "min_tokens", default=0, min=0, max=TOKENS_MAX, advanced=True,
                    tooltip="Attention over fewer tokens than this stays as it was. 0 chooses by device."),
                io.Int.Input(
                    "max_state_mb", default=STATE_MB_DEFAULT, min=STATE_MB_MIN, max=STATE_MB_MAX, advanced=True,
                    tooltip="Most memory in MB that the run's skip masks may take. The search takes up to five times "
                            "as much beside them."),
                io.Combo.Input(
                    "precision", options=list(PRECISIONS), default="auto", advanced=True,
                    tooltip="As in LiteAttention: the error of INT8 counts."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler of the calibrating run."),
                LiteAttentionProfile.Output(
                    display_name="profile",
                    tooltip="For LiteAttention Save Profile. The profile is there when a sampler has run."),
            ],
            hidden=[io.Hidden.unique_id],
            # Nodes with equal inputs would otherwise share one handle.
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(cls, dense_blocks: str | None = None) -> bool | str:
        """Errors that belong on the node before anything runs; linked values arrive as None."""
        try:
            parse_blocks(dense_blocks or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, target_error: float, metric: str, criterion: str = "mass", pool_skipped: bool = True,
                warmup_steps: int = 1, dense_blocks: str = "", min_tokens: int = 0,
                max_state_mb: int = STATE_MB_DEFAULT, precision: str = "auto") -> io.NodeOutput:
        config = LiteAttentionConfig(warmup_steps=warmup_steps, dense_blocks=dense_blocks, min_tokens=min_tokens,
                                     max_state_mb=max_state_mb, precision=precision, pool_skipped=pool_skipped)
        handle = ProfileHandle()
        runs = ProfiledRuns(handle, CalibrationTarget(target_error, metric, criterion))
        return io.NodeOutput(attach(model, config, node_id=cls.hidden.unique_id, profiled=runs), handle)


class LiteAttentionSaveProfile(io.ComfyNode):
    """Writes the profile of a finished calibrating run to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttentionSaveProfile",
            display_name="LiteAttention Save Profile",
            category="model/patch",
            search_aliases=["calibration", "profile"],
            description=f"Saves a calibrated profile to models/{profiles.FOLDER}. Connect the calibrating sampler's "
                        "latent to samples, so that this node runs after it.",
            inputs=[
                LiteAttentionProfile.Input("profile", tooltip="From LiteAttention Calibrate."),
                io.String.Input("filename", default="profile",
                                tooltip=f"Name of the file in models/{profiles.FOLDER}, without a folder."),
                io.Boolean.Input("overwrite", default=False, advanced=True,
                                 tooltip="Replace a file of this name. Off: a name that is taken is an error; the "
                                         "profile is not lost, choose another name and queue again."),
                io.Latent.Input("samples", optional=True,
                                tooltip="The latent of the sampler that ran the calibrating model; passed through. "
                                        "It makes this node wait for the sampler."),
            ],
            outputs=[io.Latent.Output(display_name="samples", tooltip="The latent as it came.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename: str | None = None) -> bool | str:
        """A name that is not allowed, before the sampler has run for nothing."""
        return (None if filename is None else profiles.name_problem(filename)) or True

    @classmethod
    def execute(cls, profile: ProfileHandle, filename: str, overwrite: bool = False,
                samples: dict | None = None) -> io.NodeOutput:
        saved, name = profiles.save_profile(profile, filename, overwrite)
        return io.NodeOutput(samples, ui=ui.PreviewText(f"{name}: {saved.describe()}"))


class LiteAttentionLoadProfile(io.ComfyNode):
    """Reads a profile from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttentionLoadProfile",
            display_name="LiteAttention Load Profile",
            category="model/patch",
            search_aliases=["calibration", "profile"],
            description=f"Loads a calibrated profile from models/{profiles.FOLDER}, for the profile input of "
                        "LiteAttention.",
            inputs=[io.Combo.Input("profile_name", options=profiles.profile_names(),
                                   tooltip=f"A file in models/{profiles.FOLDER}.")],
            outputs=[LiteAttentionProfile.Output(display_name="profile", tooltip="For LiteAttention.")],
        )

    @classmethod
    def fingerprint_inputs(cls, profile_name: str) -> tuple[int, int]:
        """A file that has been saved anew is read anew."""
        status = profiles.profile_path(profile_name).stat()
        return status.st_mtime_ns, status.st_size

    @classmethod
    def execute(cls, profile_name: str) -> io.NodeOutput:
        return io.NodeOutput(profiles.load_profile(profile_name))
