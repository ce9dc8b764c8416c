"""Profiles in ComfyUI: which model they are for, runs that make or use one, and the folder that keeps their files."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from ..runtime import (
    CalibrationSession,
    CalibrationTarget,
    LiteAttentionConfig,
    Profile,
    ProfileError,
    ProfileHandle,
    Session,
)
from ..runtime.profile import SUFFIX

FOLDER = "lite_attention"
"""Of `models`, and its name in `folder_paths`."""
_NAME = re.compile(r"\w[\w .()+-]{0,99}")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that Windows takes for devices."""


def architecture(patcher: Any) -> str:
    """What tells models of one architecture from others: ComfyUI's class of the model, e.g. "WAN21"."""
    return type(patcher.model).__name__


@dataclass(frozen=True)
class ProfiledRuns:
    """Runs of a patched model that use a profile, or make one.

    Attributes:
        handle: holds the profile that they use, or receives the one that they make.
        target: given, each run calibrates to it.
    """

    handle: ProfileHandle
    target: CalibrationTarget | None = None

    def check(self, patcher: Any) -> None:
        """Raises:
            ProfileError: the profile is there already, and of another architecture.
        """
        if self.target is None and self.handle.profile is not None:
            self.handle.profile.check_architecture(architecture(patcher))

    def open(self, patcher: Any, plain: Callable[..., Session], config: LiteAttentionConfig, steps: int,
             **keywords: Any) -> Session:
        """The session of a run that starts.

        Raises:
            ValueError: there is no profile yet, or it is of another architecture.
        """
        if self.target is None:
            profile = self.handle.get()
            self.check(patcher)
            return plain(config, steps, profile=profile, **keywords)
        self.handle.set(None, "the last calibrating run did not finish")
        return CalibrationSession(config, steps, target=self.target, **keywords)

    def finish(self, patcher: Any, session: Session) -> None:
        """After the last step. Never raises: the latent is there."""
        if not isinstance(session, CalibrationSession):
            return
        try:
            self.handle.set(*session.calibrated(architecture(patcher)))
        except Exception as error:
            self.handle.set(None, f"{type(error).__name__}: {str(error)[:200]}")
        session.note(f"calibrated: {self.handle.profile.describe()}" if self.handle.profile is not None
                     else f"no profile: {self.handle.problem}")


def register_folder() -> None:
    """Make `models/lite_attention` known."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    folder_paths.folder_names_and_paths[FOLDER][1].add(SUFFIX)


def profile_names() -> list[str]:
    """Files in the folder."""
    return folder_paths.get_filename_list(FOLDER)


def profile_path(name: str) -> Path:
    """The file of a name from `profile_names`.

    Raises:
        ValueError: there is none in the folder.
    """
    found = folder_paths.get_full_path(FOLDER, name) if name in profile_names() else None
    if found is None:
        raise ValueError(f"profile_name is {name!r}; allowed: the files in models/{FOLDER}: "
                         f"{', '.join(profile_names()) or 'there is none yet'}.")
    return Path(found)


def name_problem(filename: str) -> str | None:
    """None, or the sentence that says why a file cannot be saved under this name."""
    stem = filename.removesuffix(SUFFIX)
    if _NAME.fullmatch(stem) and not _RESERVED.fullmatch(stem) and not stem.endswith((" ", ".")) and ".." not in stem:
        return None
    return (f"filename is {filename!r}; it is a name of 1 to 100 letters, digits, spaces and _ - + . ( ), without a "
            f"folder. The file goes to models/{FOLDER}.")


def save_profile(handle: ProfileHandle, filename: str, overwrite: bool) -> tuple[Profile, str]:
    """(the profile, the name of the file it went to).

    Raises:
        ValueError: a name that is not allowed or is taken, or no profile to save.
    """
    problem = name_problem(filename)
    if problem:
        raise ValueError(problem)
    profile = handle.get()
    path = Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{filename.removesuffix(SUFFIX)}{SUFFIX}"
    try:
        profile.save(path, overwrite)
    except FileExistsError as error:
        raise ValueError(f"filename is {filename!r}: {error}") from None
    return profile, path.name


def load_profile(name: str) -> ProfileHandle:
    """A handle that holds the profile of a file.

    Raises:
        ValueError: no such file, or not a profile (`ProfileError`).
    """
    try:
        return ProfileHandle(Profile.load(profile_path(name)))
    except OSError as error:
        raise ProfileError(f"{name}: cannot be read. {type(error).__name__}: {error.strerror}") from None
