"""The LiteAttention node."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import ProfiledRuns, attach, continues, wanted_masks
from ..runtime import LiteAttentionConfig, ProfileHandle, RunHandle, parse_blocks
from ..runtime.config import (
    BUDGET_MAX,
    PRECISIONS,
    REFRESH_MAX,
    STATE_MB_DEFAULT,
    STATE_MB_MAX,
    STATE_MB_MIN,
    STEPS_MAX,
    THRESHOLD_DEFAULT,
    THRESHOLD_MAX,
    THRESHOLD_MIN,
    TOKENS_MAX,
    threshold_problem,
)

LiteAttentionProfile = io.Custom("LITE_ATTENTION_PROFILE")
LiteAttentionRun = io.Custom("LITEATTENTION_RUN")


class LiteAttention(io.ComfyNode):
    """Patches a model so that its sampling runs skip attention tiles that no longer matter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttention",
            display_name="LiteAttention",
            category="model/patch",
            search_aliases=["sparse attention", "speed up", "wan", "video", "skip", "faster", "attention"],
            description="Makes video sampling faster: parts of self-attention that do not matter at one step are "
                        "skipped in all later ones. Put it last before the sampler. The node tells how much it "
                        "skipped.",
            inputs=[
                io.Model.Input("model", tooltip="A diffusion transformer. Patches applied before stay in place and "
                                                "serve the calls that LiteAttention leaves."),
                io.Float.Input(
                    "threshold", default=THRESHOLD_DEFAULT, min=THRESHOLD_MIN, max=THRESHOLD_MAX, step=0.5,
                    tooltip="When to skip a tile of attention for the rest of the run, as a power of two: -10 skips "
                            "what weighs under 1/1024 of the strongest match. -14: very careful (1/16384). -10: the "
                            "default. -6: bold (1/64), check the video. -3: drafts and small models (1/8). Towards 0 "
                            "is faster and further from the dense video. Details flicker or vanish? Lower it by 2. "
                            "To skip more, error_budget does better than a threshold above -6."),
                io.Int.Input(
                    "warmup_steps", default=2, min=0, max=STEPS_MAX,
                    tooltip="Steps at the start of this run that compute everything. More is safer and slower. Never "
                            "more than a quarter of the run, and 1 in runs of up to 8 steps. 0 starts to skip in the "
                            "second step with what the first has seen."),
                io.Int.Input(
                    "dense_end_steps", default=0, min=0, max=STEPS_MAX, advanced=True,
                    tooltip="Steps at the end of this run that compute everything again. Raise it to 1 or 2 if fine "
                            "texture suffers; each costs a full step."),
                io.String.Input(
                    "dense_blocks", default="", advanced=True,
                    tooltip='Transformer blocks that never skip: numbers and ranges from 0, as in "0-1, 38, -1". '
                            "Negative numbers count from the end. The first and last blocks are the most sensitive."),
                io.Int.Input(
                    "min_tokens", default=0, min=0, max=TOKENS_MAX, advanced=True,
                    tooltip="Attention over fewer tokens than this stays as it was. 0 chooses by device: 1024 on a "
                            "CPU, 4096 on a GPU. Lower it only to try the node on small videos."),
                io.Int.Input(
                    "max_state_mb", default=STATE_MB_DEFAULT, min=STATE_MB_MIN, max=STATE_MB_MAX, advanced=True,
                    tooltip="Most memory in MB that the skip masks may take. Wan 14B at 720p and 81 frames needs 69 "
                            "per prompt. Above it the layers that skip least stay dense, and are named."),
                io.Boolean.Input(
                    "log_details", default=False, advanced=True,
                    tooltip="Also writes the run's account to the log as JSON and times attention, which slows a GPU "
                            "a little. For reports and comparisons."),
                io.Combo.Input(
                    "precision", options=list(PRECISIONS), default="auto", advanced=True,
                    tooltip="How q and k are multiplied. full: as the model gives them. int8: from INT8 copies, a "
                            "little less exact, on NVIDIA GPUs where that can be faster. auto: int8 on GeForce RTX "
                            "cards from 12288 tokens on, full elsewhere."),
                io.Boolean.Input(
                    "never_slower", default=True, advanced=True,
                    tooltip="On a GPU, layers that skip too little to be faster go to the attention that was there "
                            "before; every 4th step is tried again. Off: every layer stays with LiteAttention."),
                io.Float.Input(
                    "error_budget", default=0.0, min=0.0, max=BUDGET_MAX, step=0.01, optional=True, advanced=True,
                    tooltip="Above 0 it takes the place of threshold: the largest share of its attention that a token "
                            "may lose when tiles are chosen; what pool_skipped is estimated to carry is not lost. 0.02: "
                            "skips what nobody can see. 0.1: careful. 0.3: a good start. 1: bold. It means the same "
                            "for short and long videos, and where much is skipped it stays closer to the dense video "
                            "than a high threshold does. 0: threshold decides."),
                io.Int.Input(
                    "refresh_every", default=0, min=0, max=REFRESH_MAX, optional=True, advanced=True,
                    tooltip="At each sparse step one of so many parts of the video is looked at in full again, so that "
                            "what matters after all comes back; the receipt tells how much did. 10 costs about a "
                            "tenth of what is saved. 0: never."),
                io.Boolean.Input(
                    "pool_skipped", default=True, optional=True, advanced=True,
                    tooltip="A skipped tile is represented by the mean of its keys and values and does not vanish; "
                            "more tiles can be skipped then at the same threshold. Off: skipped tiles count for "
                            "nothing."),
                LiteAttentionRun.Input(
                    "continue_from", optional=True, advanced=True,
                    tooltip="The run output of the LiteAttention node before the sampler whose latent this one goes on "
                            "with (steps 0-10, then 10-20; Wan 2.2's high, then low noise model). This run skips from "
                            "its first step what that one has found. Leave unconnected for runs of their own."),
                LiteAttentionProfile.Input(
                    "profile", optional=True, advanced=True,
                    tooltip="From LiteAttention Load Profile: thresholds that were measured for each layer and part of "
                            "the run. Replaces threshold, error_budget, pool_skipped and refresh_every. Layers that are "
                            "not in it stay as they were."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The patched model; the input model stays as it was."),
                LiteAttentionRun.Output(display_name="run",
                                        tooltip="Handle to the account of the last run, for other LiteAttention "
                                                "nodes. May stay unconnected."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            # Nodes with equal inputs would otherwise share one output: text on the wrong node, one handle for two runs.
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(cls, threshold: float | None = None, dense_blocks: str | None = None) -> bool | str:
        """Errors that belong on the node before anything runs; linked values are not known yet and arrive as None."""
        problem = None if threshold is None else threshold_problem(threshold)
        if problem is None and dense_blocks is not None:
            try:
                parse_blocks(dense_blocks)
            except ValueError as error:
                problem = str(error)
        return problem or True

    @classmethod
    def execute(cls, model, threshold: float, warmup_steps: int, dense_end_steps: int = 0, dense_blocks: str = "",
                min_tokens: int = 0, max_state_mb: int = STATE_MB_DEFAULT, log_details: bool = False,
                precision: str = "auto", never_slower: bool = True, error_budget: float = 0.0, refresh_every: int = 0,
                pool_skipped: bool = True, continue_from: RunHandle | None = None,
                profile: ProfileHandle | None = None) -> io.NodeOutput:
        config = LiteAttentionConfig(threshold, warmup_steps, dense_end_steps, dense_blocks, min_tokens, max_state_mb,
                                     log_details, precision, never_slower, error_budget, refresh_every, pool_skipped)
        node_id = cls.hidden.unique_id
        handle = RunHandle()
        handle.wanted = bool(continues(cls.hidden.prompt, node_id))
        handle.wanted_pictures = wanted_masks(cls.hidden.prompt, node_id)
        patched = attach(model, config, node_id=node_id, handle=handle, continue_from=continue_from,
                         profiled=None if profile is None else ProfiledRuns(profile))
        return io.NodeOutput(patched, handle)
