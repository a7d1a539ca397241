"""PrototypeAttention: its cache, its balance at the start, and torch.nn.MultiheadAttention's answers."""

import pytest
import torch
from attention_problems import close

import dpdiff_kernels as dk


def test_module_cache_and_balance():
    torch.manual_seed(0)
    module = dk.PrototypeAttention(24, 3, bank_dim=10)
    tokens, local, general = torch.randn(2, 7, 24), torch.randn(9, 10), torch.randn(4, 10)
    out = module(tokens, local, general)
    assert out.shape == tokens.shape
    assert torch.equal(module(tokens, cache=module.project_banks(local, general)), out)

    # Balanced at the start: the mean of the two banks' answers, which the output projection (affine) keeps.
    local_only = module(tokens, local)
    keys = module.project_banks(local, general)
    global_only = module(tokens, cache=dk.ProjectedBanks(keys.global_key, keys.global_value, None, None))
    close(out, (local_only + global_only) / 2, torch.float32)


@pytest.mark.parametrize("gated", [False, True])
def test_module_against_multi_head_attention(gated):
    """Same weights, local bank only: torch.nn.MultiheadAttention's answer."""
    torch.manual_seed(0)
    module = dk.PrototypeAttention(16, 4, gated=gated)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([module.query.weight, module.local_bank.weight]))
        theirs.in_proj_bias.copy_(torch.cat([module.query.bias, module.local_bank.bias]))
        theirs.out_proj.load_state_dict(module.out.state_dict())
    tokens, local = torch.randn(2, 7, 16), torch.randn(9, 16)
    bank = local.expand(2, -1, -1)
    close(module(tokens, local), theirs(tokens, bank, bank)[0], torch.float32)


@pytest.mark.parametrize("batched", [False, True])
def test_module_routes_and_learns(batched):
    torch.manual_seed(0)
    module = dk.PrototypeAttention(16, 2)
    local = torch.randn(*((3,) if batched else ()), 6, 16, requires_grad=True)
    general, tokens = torch.randn(4, 16, requires_grad=True), torch.randn(3, 5, 16, requires_grad=True)
    groups, active = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([[0], [1], [1]])
    module(tokens, local, general, groups, active).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert tokens.grad.abs().sum() > 0 and general.grad.abs().sum() > 0
    assert (local.grad[..., 4:, :] == 0).all() and local.grad[..., :2, :].abs().sum() > 0


def test_module_errors():
    with pytest.raises(TypeError, match=r"bank_dim is 3\.5: expected an int"):
        dk.PrototypeAttention(8, 2, bank_dim=3.5)
    with pytest.raises(ValueError, match="bank_dim is 0: expected at least 1"):
        dk.PrototypeAttention(8, 2, bank_dim=0)
    with pytest.raises(ValueError, match="dim is 10: expected a multiple of num_heads"):
        dk.PrototypeAttention(10, 4)
    module = dk.PrototypeAttention(8, 2)
    with pytest.raises(ValueError, match="either local_prototypes"):
        module(torch.ones(1, 2, 8))
