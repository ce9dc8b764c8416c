"""The tables of docs/multi-gpu.md are those that its command prints, by its formulas."""

import pytest
import traffic


def test_the_page_has_the_tables():
    """python tools/traffic.py --write"""
    assert traffic.page() == traffic.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("machine", traffic.MACHINES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("gpus", traffic.GPUS)
@pytest.mark.parametrize("tokens", traffic.TOKENS.values(), ids=traffic.TOKENS)
def test_what_is_left_takes_as_long_as_the_exchange_by_the_formula_of_the_page(machine, gpus, tokens):
    share = machine.even(tokens, gpus)
    assert 1 - share == pytest.approx(2 * (gpus - 1) / gpus * machine.flops / (tokens * machine.bandwidth))
    assert machine.attention_s(tokens, gpus) * (1 - share) == pytest.approx(machine.exchange_s(tokens, gpus))
    assert 1 == machine.gain(tokens, gpus, 0) < machine.gain(tokens, gpus, 0.5) < 2


def test_two_gpus_send_half_of_half_of_four_tensors():
    assert traffic.exchanged_bytes(1000, 2) == 1000 * traffic.WIDTH * 2
