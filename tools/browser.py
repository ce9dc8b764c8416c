"""ComfyUI's own frontend in a Chromium without a window."""

from __future__ import annotations

import shutil
import time
from typing import Any

READY = ("return Boolean(window.app?.graph && window.LiteGraph?.registered_node_types.LiteAttention "
         "&& app.extensionManager?.setting)")


def missing() -> str | None:
    """What is not installed that `open_frontend` needs, or None."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium"
    return next((name for name in ("chromium", "chromedriver") if shutil.which(name) is None), None)


def open_frontend(port: int, width: int = 1600, height: int = 1100, timeout_s: float = 90) -> Any:
    """A selenium WebDriver at the frontend of the server on `port`, which knows this pack's nodes; to be `quit`.

    Raises:
        TimeoutError: the frontend did not come up.
    """
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-proxy-server",
                     "--hide-scrollbars", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    browser.set_script_timeout(60)
    try:
        browser.get(f"http://127.0.0.1:{port}/")
        deadline = time.monotonic() + timeout_s
        while not browser.execute_script(READY):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the frontend did not come up in {timeout_s} s")
            time.sleep(0.2)
    except BaseException:
        browser.quit()
        raise
    return browser
