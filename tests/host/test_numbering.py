"""Block numbers from the pack: with other nodes' block replacements, and under torch.compile."""

import pytest
import torch
from family_cases import case as case_of
from family_kit import NO_LAYER, STEPS, close, load, run, sample, sites
from host_kit import dense_calls

from liteattention.host import attach, families
from liteattention.runtime import LiteAttentionConfig, RunHandle, Threshold

LTXV, SD3 = case_of("LTXV"), case_of("SD3.5 medium")


@pytest.mark.parametrize("numbered", [True, False], ids=["calls the block", "skips the block"])
def test_block_replacements_of_other_nodes_go_on(runs, numbered):
    case, seen = LTXV, []
    model = load(case)

    def replacement(args, extra):
        seen.append(args["transformer_options"].get("block_index"))
        return extra["original_block"](args) if numbered else {"img": args["img"]}

    model.set_model_patch_replace(replacement, "dit", "double_block", 1)
    handle = RunHandle()
    out = run(case, model, -30.0, handle)
    assert seen == [1] * STEPS
    assert (out - sample(case, model)).abs().max() < 1e-3
    assert {key.block for key, _ in runs[0].passes} == ({"double 0", "double 1"} if numbered else {"double 0"})


@pytest.mark.parametrize("blocks", [True, False], ids=["block by block", "whole"])
@pytest.mark.parametrize("case", [LTXV, SD3], ids=["block replacement", "hooks"])
def test_compiled_models_have_one_mask_per_layer_or_none(case, blocks, runs):
    """Hooks are traced once for all blocks: without numbers the calls stay dense and touch no other block's mask."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    model = load(case)
    plain = sample(case, model)
    handle = RunHandle()
    config = LiteAttentionConfig(rule=Threshold(-30.0), min_tokens=128, warmup_steps=1)
    patched = attach(model, config, handle=handle)
    attribute = "transformer_blocks" if case is LTXV else "joint_blocks"
    keys = [f"diffusion_model.{attribute}.{i}" for i in range(2)] if blocks else ["diffusion_model"]
    set_torch_compile_wrapper(model=patched, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict},
                              keys=keys)
    try:
        out = sample(case, patched)
    finally:
        torch._dynamo.reset()
    assert close(out, plain)
    if case is LTXV:
        assert sites(runs[0]) == case.layers and handle.summary.sparse_calls == STEPS * len(case.layers)
    else:
        assert sites(runs[0]) <= case.layers
        dense = dense_calls(handle.summary).get(NO_LAYER, 0)
        assert handle.summary.sparse_calls + dense == STEPS * len(case.layers)


def test_a_network_that_has_lost_its_list_of_blocks_is_called_all_the_same():
    for name in families.FAMILIES:
        network = type(name, (torch.nn.Module,), {})()
        options = {"patches_replace": {}}
        with families.numbered(network, options) as numbered:
            assert not numbered["patches_replace"].get("dit")
