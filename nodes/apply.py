"""The LiteAttention node."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import attach, is_continued
from ..runtime import ErrorBudget, LiteAttentionConfig, Rule, RunHandle, Threshold, parse_blocks
from ..runtime.config import PRECISIONS, STEPS_MAX, TOKENS_MAX
from ..runtime.rules import (
    BUDGET_DEFAULT,
    BUDGET_MAX,
    BUDGET_MIN,
    THRESHOLD_DEFAULT,
    THRESHOLD_MAX,
    THRESHOLD_MIN,
)

LiteAttentionRun = io.Custom("LITEATTENTION_RUN")
BUDGET_RULE, THRESHOLD_RULE = "error budget", "threshold"


def rule_input() -> io.DynamicCombo.Input:
    """The rule, and the one number that it goes by: the other one is not on the node."""
    return io.DynamicCombo.Input(
        "rule",
        tooltip="How tiles of attention are chosen. error budget: by the attention that a token may lose. "
                "threshold: the rule of the paper, by a tile's strongest match.",
        options=[
            io.DynamicCombo.Option(BUDGET_RULE, [io.Float.Input(
                "error_budget", default=BUDGET_DEFAULT, min=BUDGET_MIN, max=BUDGET_MAX, step=0.01,
                tooltip="The largest share of its attention that a token may lose when tiles are chosen. 0.1: careful. "
                        "0.3: the default. Above, the change can be visible, and fewer steps can be closer to the "
                        "dense video. Details flicker or vanish? Halve it.")]),
            io.DynamicCombo.Option(THRESHOLD_RULE, [io.Float.Input(
                "threshold", default=THRESHOLD_DEFAULT, min=THRESHOLD_MIN, max=THRESHOLD_MAX, step=0.5,
                tooltip="Skip a tile once all its scores stay below the strongest so far by this power of two: -10 is "
                        "1/1024. -14: very careful. -10: the paper's. -6: bold, look at the video. -3: drafts and "
                        "small models. Towards 0 is faster and further from the dense video.")]),
        ])


def shared_inputs() -> list[io.Input]:
    """The settings of a run."""
    return [
        rule_input(),
        io.Int.Input(
            "warmup_steps", default=2, min=0, max=STEPS_MAX,
            tooltip="Steps at the start of this run that compute everything. More is safer and slower. Never "
                    "more than a quarter of the run, and 1 in runs of up to 8 steps. 0 starts to skip in the "
                    "second step."),
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
            tooltip="Attention over fewer tokens than this stays dense. 0 chooses by device: 1024 on a CPU, "
                    "4096 on a GPU. Lower it only to try the node on small videos."),
        io.Combo.Input(
            "precision", options=list(PRECISIONS), default="auto", advanced=True,
            tooltip="How q and k are multiplied. full: as the model gives them. int8: from INT8 copies, a "
                    "little less exact, on NVIDIA GPUs where that can be faster. auto: int8 on GeForce RTX "
                    "cards from 12288 tokens on, full elsewhere."),
        io.Boolean.Input(
            "pool_skipped", default=True, advanced=True,
            tooltip="Skipped tiles still count, by the mean of their keys and values, so that more tiles can "
                    "be skipped with the same loss. Off: skipped tiles count for nothing."),
    ]


def chosen_rule(value: dict) -> Rule:
    """The rule of what the server hands over for `rule_input`, e.g. {"rule": "threshold", "threshold": -10.0}."""
    if value["rule"] == THRESHOLD_RULE:
        return Threshold(value["threshold"])
    return ErrorBudget(value["error_budget"])


class LiteAttention(io.ComfyNode):
    """Patches a model so that its sampling runs skip attention tiles that no longer matter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttention",
            display_name="LiteAttention",
            category="model/patch",
            search_aliases=["sparse attention", "skip attention", "accelerate", "optimize", "speed up", "faster",
                            "video speed", "wan speed", "attention"],
            description="Makes video sampling faster: parts of self-attention that are negligible at one step are "
                        "skipped in all later ones. Put it last before the sampler. The node shows how much was "
                        "skipped.",
            inputs=[
                io.Model.Input("model", tooltip="A diffusion transformer. Patches applied before stay in place; an "
                                                "attention set before computes the dense calls."),
                *shared_inputs(),
                LiteAttentionRun.Input(
                    "continue_from", optional=True,
                    tooltip="The run output of the LiteAttention node before the sampler whose latent this sampler "
                            "goes on with (steps 0-10, then 10-20; Wan 2.2's high, then low noise model). This run "
                            "then skips from its first step on. Leave it unconnected for a run of its own."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The patched model; the input model stays as it was."),
                LiteAttentionRun.Output(display_name="run",
                                        tooltip="Handle to the last run, for continue_from of the next LiteAttention "
                                                "node. May stay unconnected."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            # Nodes with equal inputs would otherwise share one output: text on the wrong node, one handle for two runs.
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(cls, dense_blocks: str | None = None, *, rule: dict | None = None) -> bool | str:
        """Errors that belong on the node before anything runs; linked values are not known yet and arrive as None.

        Args:
            rule: None where its name is unknown; the server has checked the number in it. By keyword alone, because the
                server shows what this function says at each of its positional arguments.
        """
        if rule is None:
            return f"rule: choose {BUDGET_RULE} or {THRESHOLD_RULE}."
        try:
            parse_blocks(dense_blocks or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, rule: dict, warmup_steps: int = 2, dense_end_steps: int = 0, dense_blocks: str = "",
                min_tokens: int = 0, precision: str = "auto", pool_skipped: bool = True,
                continue_from: RunHandle | None = None) -> io.NodeOutput:
        config = LiteAttentionConfig(rule=chosen_rule(rule), warmup_steps=warmup_steps, dense_end_steps=dense_end_steps,
                                     dense_blocks=dense_blocks, min_tokens=min_tokens, precision=precision,
                                     pool_skipped=pool_skipped)
        handle = RunHandle(is_continued(cls.hidden.dynprompt, cls.hidden.unique_id))
        return io.NodeOutput(attach(model, config, node_id=cls.hidden.unique_id, handle=handle,
                                    continue_from=continue_from), handle)
