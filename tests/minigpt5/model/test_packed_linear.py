"""Packed layers give what the layers gave, for any number of rows, and a row does not depend on the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minigpt5.model.packed_linear import PackedLinear, pack_linears
from tests.helpers.tiny import tiny_config, tiny_language


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_packed_layer_gives_the_same(has_bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 80, bias=has_bias).requires_grad_(False)
    packed = PackedLinear(linear.weight, linear.bias)
    for shape in ((1, 96), (2, 96), (5, 96), (33, 96), (1, 7, 96)):
        inputs = torch.randn(shape)
        torch.testing.assert_close(packed(inputs), linear(inputs), atol=1e-5, rtol=1e-5)


def test_every_linear_layer_is_packed_and_nothing_else_changes() -> None:
    language = tiny_language(tiny_config())
    ids_BS = torch.arange(24).view(2, 12)
    with torch.no_grad():
        before = language.logits(language.states(language.embed(ids_BS)))
        language.pack()
        after = language.logits(language.states(language.embed(ids_BS)))
    assert not any(type(module) is nn.Linear for module in language.body.modules())
    assert any(isinstance(module, PackedLinear) for module in language.body.modules())
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_packed_stays_as_it_is() -> None:
    module = nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 4, device="meta"), nn.LayerNorm(4))
    pack_linears(module)
    assert [type(child) for child in module] == [nn.Linear, nn.Linear, nn.LayerNorm]
