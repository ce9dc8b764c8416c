"""The nodes for Raylight, which runs one model on several GPUs, in workers that hold the model themselves."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import raylight
from ..runtime import LiteAttentionConfig
from .apply import LiteAttention, chosen_rule, shared_inputs
from .report import report_outputs, reported

RayActors = io.Custom("RAY_ACTORS")


class LiteAttentionRaylight(io.ComfyNode):
    """LiteAttention on the model in every worker of Raylight."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttentionRaylight",
            display_name="LiteAttention (Raylight)",
            category="Raylight",
            search_aliases=["sparse attention", "multi gpu", "several GPUs", "ulysses", "sequence parallel"],
            description="LiteAttention for one video on several GPUs: acts on the model in Raylight's workers. Put it "
                        "between Raylight's loader, or its patch nodes, and the sampler. Needs Raylight (Linux); "
                        "tested with processes on a CPU, not yet on several GPUs.",
            inputs=[
                RayActors.Input("ray_actors", tooltip="Raylight's workers with a model loaded: from its model loader, "
                                                      "or from one of its nodes after that."),
                io.Boolean.Input(
                    "enabled", default=True,
                    tooltip="Off takes LiteAttention off the model. Bypassing or removing this node does not: what it "
                            "has done stays in the workers until they load another model or start anew."),
                *shared_inputs(),
            ],
            outputs=[RayActors.Output(display_name="ray_actors",
                                      tooltip="The same workers, for Raylight's sampler.")],
            # Of two nodes with the same inputs the second one acts as well: the workers keep what came last.
            not_idempotent=True,
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, dense_blocks: str | None = None, *, rule: dict | None = None) -> bool | str:
        """As on LiteAttention."""
        return LiteAttention.validate_inputs(dense_blocks, rule=rule)

    @classmethod
    def execute(cls, ray_actors, enabled: bool, rule: dict, warmup_steps: int = 2, dense_end_steps: int = 0,
                dense_blocks: str = "", min_tokens: int = 0, precision: str = "auto",
                pool_skipped: bool = True) -> io.NodeOutput:
        config = LiteAttentionConfig(rule=chosen_rule(rule), warmup_steps=warmup_steps, dense_end_steps=dense_end_steps,
                                     dense_blocks=dense_blocks, min_tokens=min_tokens, precision=precision,
                                     pool_skipped=pool_skipped)
        raylight.apply(ray_actors, config if enabled else None)
        return io.NodeOutput(ray_actors)


class LiteAttentionRaylightReport(io.ComfyNode):
    """The last sampling run of Raylight's workers, as a picture, as text and as JSON."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttentionRaylightReport",
            display_name="LiteAttention Report (Raylight)",
            category="Raylight",
            search_aliases=["statistics", "multi gpu", "several GPUs", "benchmark"],
            description="What LiteAttention did in the last sampling run of Raylight's workers, all GPUs together: "
                        "skipped share per step and layer and of every GPU, which calls stayed dense and why, time "
                        "saved, what to try.",
            inputs=[
                RayActors.Input("ray_actors", tooltip="The ray_actors output of Raylight's sampler, so that this node "
                                                      "waits for it."),
                io.Latent.Input("samples", tooltip="The sampler's latent; passed through."),
            ],
            outputs=report_outputs(),
            is_output_node=True,
            is_experimental=True,
        )

    @classmethod
    def execute(cls, ray_actors, samples: dict) -> io.NodeOutput:
        return reported(cls, samples, raylight.last_run(ray_actors))
