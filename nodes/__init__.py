"""Node schemas: the only folder that imports comfy_api. No algorithm lives here."""

from comfy_api.latest import ComfyExtension, io

from .apply import LiteAttention


class LiteAttentionExtension(ComfyExtension):
    """The nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LiteAttention]
