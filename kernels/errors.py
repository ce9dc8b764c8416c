"""The one typed error for a call that the kernels cannot serve."""

from __future__ import annotations


class UnsupportedAttention(ValueError):
    """A call outside what skip-mask attention serves. Nothing was computed and no mask was changed.

    Attributes:
        argument: name of the argument that is to blame.
        value: what it was (already formatted).
        allowed: what would have been served.
        reason: short text for counting, the same for every call that fails in the same way.
    """

    def __init__(self, argument: str, value: object, allowed: str, reason: str):
        super().__init__(f"{argument} is {value}; allowed: {allowed}")
        self.argument = argument
        self.value = value
        self.allowed = allowed
        self.reason = reason
