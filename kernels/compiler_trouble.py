"""What went wrong where Triton could not compile, in words for the user: no path, no command line, and a remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence

LONGEST = 300
"""Characters of an error that is not one of the known."""

_PORTABLE = ("on a portable ComfyUI copy the folders include and libs of a full Python of the same version into "
             "python_embeded")
_KNOWN = (
    (r"Python\.h",
     f"Triton's compiler does not find Python.h: on Linux install Python's headers (python3-dev); {_PORTABLE}"),
    (r"(?:cannot find|can't find|not found).*python3\d*|python3\d+\.(?:lib|dll|def).*not found",
     f"Triton's compiler does not find Python's library: {_PORTABLE}"),
    (r"\\\\\?\\",
     r"Triton's compiler cannot read paths that begin with \\?\: start ComfyUI from a short path, and set TEMP to a "
     "short folder"),
    (r"Failed to find C compiler",
     "Triton finds no C compiler: on Linux install gcc; on Windows triton-windows brings one, reinstall it"),
    (r"cannot find -lcuda|libcuda\.so cannot",
     "Triton does not find the NVIDIA driver's libcuda: install the driver, in a container its library"),
    (r"DLL load failed",
     "a library of Triton cannot be loaded: install the Microsoft Visual C++ Redistributable"),
    (r"CalledProcessError|returned non-zero exit status",
     "the C compiler that Triton calls has failed: update it, or reinstall Triton"),
)
"""(pattern in what the process said, what to tell), the most certain first."""

_QUOTED_PATH = re.compile(r"(['\"])[^'\"]*[\\/]([^'\"\\/]*)\1")
_PATH = re.compile(r"(?:[A-Za-z]:|\\\\\?)?[\\/](?:[^\s'\",;:\\/]+[\\/]+)+([^\s'\",;:\\/]*)")


def explained(said: Sequence[str]) -> str:
    """The trouble that a failed process has told of in these lines."""
    if not said:
        return "it said nothing"
    text = "\n".join(said)
    for pattern, meaning in _KNOWN:
        if re.search(pattern, text):
            return meaning
    return without_paths(said[-1])


def without_paths(line: str) -> str:
    """A line of an error in which files have no folders: those have the user's name."""
    line = _PATH.sub(r"\1", _QUOTED_PATH.sub(r"\1\2\1", line))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"
