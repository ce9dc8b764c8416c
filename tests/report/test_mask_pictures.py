"""Masks of a finished run as small pictures: which ones, of what, how large."""

import pytest
import torch

from liteattention.kernels import SkipMask
from liteattention.report import mask_pictures
from liteattention.report.mask_pictures import MAX_HEADS, MAX_LAYERS, MAX_SIDE
from liteattention.runtime import parse_blocks


def mask(seqlen=512, heads=3, skipped=0.25):
    """Head n skips n * `skipped` of its tiles."""
    side = -(-seqlen // 128)
    order = torch.rand(side * side, generator=torch.Generator().manual_seed(0)).argsort().view(side, side)
    bits = torch.stack([order >= head * skipped * side * side for head in range(heads)])[None]
    return SkipMask.from_bool(bits, seqlen, seqlen)


def chosen(layers="", heads="", count=6):
    masks = {f"double {n}": mask() for n in reversed(range(count))}
    return [(p.layer, p.head) for p in mask_pictures(masks, parse_blocks(layers).holds, parse_blocks(heads).holds)]


def test_without_a_choice_some_layers_are_drawn_and_their_mean_and_the_head_that_skips_most():
    assert chosen() == [(f"double {n}", head) for n in (0, 2, 3, 5) for head in (None, 2)]
    assert chosen(count=2) == [("double 0", None), ("double 0", 2), ("double 1", None), ("double 1", 2)]
    assert chosen(count=0) == []


def test_chosen_layers_and_heads_are_drawn_up_to_a_limit():
    assert chosen("1, -1", "0, -1") == [("double 1", 0), ("double 1", 2), ("double 5", 0), ("double 5", 2)]
    assert len(chosen("0-5", "0-2")) == MAX_LAYERS * MAX_HEADS
    assert chosen("99", "99") == chosen(), "none of them is there"
    assert chosen("10", "0", count=12) == [("double 10", 0)]


def test_layers_are_in_the_order_of_their_numbers():
    assert [layer for layer, head in chosen("2, 10", "0", count=12)] == ["double 2", "double 10"]


def test_a_picture_is_the_skipped_share_of_its_mask():
    mean, most = mask_pictures({"double 0": mask()}, parse_blocks("").holds, parse_blocks("").holds,
                               lambda seqlen: (0.0, seqlen / 128))
    assert (mean.share, most.share) == (0.25, 0.5) and (mean.name, most.name) == ("double 0, all 3 heads",
                                                                                  "double 0, head 2")
    assert mean.tiles == most.tiles == (4, 4) and mean.frame_edges == (0.0, 4.0)
    bits = mask().to_bool()[0]
    assert torch.equal(most.skipped, (~bits[2]).to(torch.uint8) * 255)
    assert mean.skipped.float().mean() / 255 == pytest.approx(0.25, abs=2e-3)


def test_tiles_of_a_long_video_share_cells():
    picture = mask_pictures({"double 0": mask(128 * (MAX_SIDE + 1), 1)}, parse_blocks("").holds,
                            parse_blocks("0").holds)[0]
    assert picture.tiles == (MAX_SIDE + 1,) * 2 and max(picture.skipped.shape) <= MAX_SIDE
