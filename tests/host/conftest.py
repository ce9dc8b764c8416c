"""A real ComfyUI in this process, on the CPU."""

import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def comfyui(comfy_path):
    """ComfyUI first on sys.path and told to use the CPU before anything of it is imported."""
    sys.path.insert(0, str(comfy_path))
    argv, sys.argv = sys.argv, [str(comfy_path / "main.py"), "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  parses sys.argv now

    sys.argv = argv
    return comfy_path
