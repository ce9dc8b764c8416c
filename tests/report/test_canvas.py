"""The canvas: text that fits, colours that can be told apart."""

import torch

from liteattention.report.canvas import Canvas, viridis


def test_texts_are_clipped_and_never_fail():
    canvas = Canvas(300, 40)
    assert canvas.text_size(canvas.clipped("word " * 99, 20, 120), 20)[0] <= 120
    canvas.text(0, 20, "\u4e2d\u6587 \u2192 \U0001f600 " * 20, 20, width=280)
    assert canvas.tensor().shape == (1, 40, 300, 3)


def test_colours_run_from_dark_to_light():
    light = viridis(torch.linspace(0, 1, 64).numpy()) @ [0.2126, 0.7152, 0.0722]
    assert (light[1:] > light[:-1] - 2).all() and light[-1] - light[0] > 120
