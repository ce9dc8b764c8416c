"""Node schemas: the only folder that imports comfy_api. No algorithm lives here."""

from pathlib import Path

from comfy_api.latest import ComfyExtension, io

from ..host import profiles
from .apply import LiteAttention
from .profile import LiteAttentionCalibrate, LiteAttentionLoadProfile, LiteAttentionSaveProfile
from .report import LiteAttentionCompare, LiteAttentionReport


class LiteAttentionExtension(ComfyExtension):
    """The nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        profiles.register_folder()
        nodes: list[type[io.ComfyNode]] = [LiteAttention, LiteAttentionCalibrate, LiteAttentionSaveProfile,
                                           LiteAttentionLoadProfile, LiteAttentionReport, LiteAttentionCompare]
        # The demo is part of the repository, not of what the registry ships.
        if (Path(__file__).parent.parent / "demo" / "model").is_dir():
            from ..demo.comfy_nodes import register

            nodes += register()
        return nodes
