"""Node schemas: the only folder that imports comfy_api. No algorithm lives here."""

from comfy_api.latest import ComfyExtension, io

from ..demo.comfy_nodes import LiteAttentionDemoDecode, LiteAttentionDemoModel, LiteAttentionDemoPrompt
from ..host import warn_of_second_copy, watch_prompts
from .apply import LiteAttention
from .raylight import LiteAttentionRaylight, LiteAttentionRaylightReport
from .report import LiteAttentionCompare, LiteAttentionReport


class LiteAttentionExtension(ComfyExtension):
    """The nodes of this pack."""

    async def on_load(self) -> None:
        warn_of_second_copy()
        watch_prompts()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LiteAttention, LiteAttentionReport, LiteAttentionCompare,
                LiteAttentionRaylight, LiteAttentionRaylightReport,
                LiteAttentionDemoModel, LiteAttentionDemoPrompt, LiteAttentionDemoDecode]
