"""Node schemas: the only folder that imports comfy_api. No algorithm lives here."""

from pathlib import Path

from comfy_api.latest import ComfyExtension, io

from .apply import LiteAttention


class LiteAttentionExtension(ComfyExtension):
    """The nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes: list[type[io.ComfyNode]] = [LiteAttention]
        # The demo is part of the repository, not of what the registry ships.
        if (Path(__file__).parent.parent / "demo" / "model").is_dir():
            from ..demo.comfy_nodes import register

            nodes += register()
        return nodes
