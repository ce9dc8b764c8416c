"""Which language the user of a prompt reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..runtime.words import ENGLISH
from .compat import core, server

_SETTINGS = "comfy.settings.json"
_LOCALE = "Comfy.Locale"


def language() -> str:
    """The frontend's locale for whoever has queued the present prompt, e.g. "zh"; "en" where nothing is known.

    The frontend stores its setting only once somebody has changed it, and goes by the browser's languages before. So
    does this: they are in the request that has opened the connection of the prompt's client. Never raises.
    """
    try:
        return _stored() or _of_browser() or ENGLISH
    except Exception:
        return ENGLISH


def _stored() -> str:
    """The setting of the only user; with several ones a prompt does not say whose it is."""
    if core("comfy.cli_args:args.multi_user"):
        return ""
    folder = core("folder_paths:get_user_directory")
    path = Path(folder()) / "default" / _SETTINGS
    return str(json.loads(path.read_text(encoding="utf-8")).get(_LOCALE) or "") if path.is_file() else ""


def _of_browser() -> str:
    running = server()
    connection = getattr(running, "sockets", {}).get(getattr(running, "client_id", None))
    request = getattr(connection, "_req", None)  # aiohttp keeps it, without a public name
    return frontend_locale(getattr(request, "headers", {}).get("Accept-Language", ""))


def frontend_locale(accepted: str) -> str:
    """The locale that the frontend takes for a browser with this header: "zh" for "zh-CN,zh;q=0.9", but "zh-TW"."""
    first = re.match(r"\s*([A-Za-z]+)(?:-([A-Za-z]+))?", accepted)
    if first is None:
        return ""
    base, region = first[1].lower(), (first[2] or "").upper()
    return f"{base}-{region}" if (base, region) in (("zh", "TW"), ("pt", "BR")) else base
