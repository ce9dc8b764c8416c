"""The tiny demo model and three nodes that let ComfyUI run it."""
