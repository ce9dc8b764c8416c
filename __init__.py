"""ComfyUI-LiteAttention: skip-mask attention for video diffusion transformers."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's entry point (V3). Nothing is imported before it is called, so the kernels work without ComfyUI."""
    from .nodes import LiteAttentionExtension

    return LiteAttentionExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
