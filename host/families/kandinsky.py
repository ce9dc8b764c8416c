"""Kandinsky 5: blocks of the text alone run first, without a number."""

from .family import Family, nothing

FAMILIES = (
    Family("Kandinsky 5", ("Kandinsky5",), "cross-attention", front=nothing, left=("text blocks",)),
)
