"""The demo model without ComfyUI: its transformer, a sampler, and the command that compares dense and lite."""
