"""Block numbers that we give: with other nodes' block replacements, and under torch.compile."""

import pytest
import torch
from family_kit import STEPS, load, run, sample
from test_family_ltx import CASES as LTX
from test_family_sd3 import CASES as SD3

from liteattention.host import attach, families
from liteattention.runtime import LiteAttentionConfig, RunHandle, policy


@pytest.mark.parametrize("numbered", [True, False], ids=["calls the block", "skips the block"])
def test_block_replacements_of_others_go_on(sessions, numbered):
    case, seen = LTX[0], []
    model = load(case)

    def replacement(args, extra):
        seen.append(args["transformer_options"].get("block_index"))
        return extra["original_block"](args) if numbered else {"img": args["img"]}

    model.set_model_patch_replace(replacement, "dit", "double_block", 1)
    handle = RunHandle()
    out = run(case, model, -30.0, handle)
    assert seen == [1] * STEPS
    assert (out - sample(case, model)).abs().max() < 1e-3
    assert {key.name for key, _ in sessions[0].passes} == ({"double 0", "double 1"} if numbered else {"double 0"})


@pytest.mark.parametrize("blocks", [True, False], ids=["block by block", "whole"])
@pytest.mark.parametrize("case", [LTX[0], SD3[1]], ids=["block replacement", "hooks"])
def test_compiled_models_have_one_mask_per_layer_or_none(case, blocks, sessions):
    """Hooks are traced once for all blocks: without numbers those calls are left, never taken for another block's."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    model = load(case)
    plain = sample(case, model)
    handle = RunHandle()
    config = LiteAttentionConfig(threshold=-30.0, min_tokens=128, warmup_steps=1)
    patched = attach(model, config, handle=handle)
    attribute = "transformer_blocks" if case is LTX[0] else "joint_blocks"
    keys = [f"diffusion_model.{attribute}.{i}" for i in range(2)] if blocks else ["diffusion_model"]
    set_torch_compile_wrapper(model=patched, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict},
                              keys=keys)
    try:
        out = sample(case, patched)
    finally:
        torch._dynamo.reset()
    assert (out - plain).abs().max() < 1e-3 * max(1.0, plain.abs().max().item())
    sites = {(key.name, key.ordinal) for key, _ in sessions[0].passes}
    if case is LTX[0]:
        assert sites == case.layers and handle.receipt.taken == STEPS * len(case.layers)
    else:
        assert sites <= case.layers
        assert handle.receipt.taken + handle.receipt.left.get(policy.NO_LAYER, 0) == STEPS * len(case.layers)


def test_a_network_that_has_lost_its_list_of_blocks_is_called_all_the_same():
    for family in families.known():
        network = type(family.models[0], (torch.nn.Module,), {})()
        options = {"patches_replace": {}}
        with families.numbered(network, options) as numbered:
            assert not numbered["patches_replace"].get("dit")
