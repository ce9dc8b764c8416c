"""The tiny demo model, an embedded pipeline for it, and two nodes that let ComfyUI run it."""
