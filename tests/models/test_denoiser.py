"""The denoiser's structure: what starts as the identity, what each input reaches, what can be computed once."""

import pytest
import torch
import torch.nn.functional as F

from dpdiff.denoiser import Denoiser, DenoiserBlock, TimestepEmbedding

B, N, D_TOKEN, DIM = 2, 9, 10, 24


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    return dict(
        noisy=randn(B, N, D_TOKEN),
        timesteps=torch.tensor([3, 700]),
        condition=randn(B, N, D_TOKEN),
        local_bank=randn(12, D_TOKEN),
        local_places=randn(12, 16),
        global_bank=randn(5, D_TOKEN),
    )


def make(**options):
    torch.manual_seed(0)
    return Denoiser(D_TOKEN, (3, 3), **dict(patch_size=1, dim=DIM, depth=2, num_heads=3) | options)


def trained(denoiser):
    """Away from its start, where the blocks are the identity and the output is zero."""
    with torch.no_grad():
        denoiser.out.weight.normal_(std=0.2)
        for block in denoiser.blocks:
            block.modulation.weight.normal_(std=0.2)
            block.modulation.bias.normal_(std=0.2)
    return denoiser


def run(denoiser, noisy, timesteps, condition, local_bank, local_places, global_bank):
    return denoiser(noisy, timesteps, condition, denoiser.project_banks(local_bank, local_places, global_bank))


def test_blocks_start_with_prototype_attention_alone():
    torch.manual_seed(0)
    block = DenoiserBlock(DIM, 3, True)
    x, t = torch.randn(B, N, DIM), torch.randn(B, 1, DIM)
    banks = block.prototype_attention.project_banks(torch.randn(12, DIM), torch.randn(5, DIM))
    attended = block.prototype_attention(F.layer_norm(x, (DIM,)), cache=banks)
    torch.testing.assert_close(block(x, t, banks), x + attended, rtol=0, atol=0)
    torch.testing.assert_close(block(x, t, None), x, rtol=0, atol=0)


def test_the_reconstruction_starts_as_the_condition(inputs):
    torch.testing.assert_close(run(make(), **inputs), inputs["condition"], rtol=0, atol=0)
    assert not run(make(condition=False), **inputs).any()


def test_every_input_matters_once_trained(inputs):
    denoiser = trained(make())
    before = run(denoiser, **inputs)
    assert before.shape == (B, N, D_TOKEN)
    for name in inputs:
        changed = inputs[name].flip(-1)
        assert not torch.allclose(run(denoiser, **inputs | {name: changed}), before, atol=1e-4), name


def test_gradients_reach_every_parameter_and_input(inputs):
    denoiser = trained(make())
    tensors = {name: x.requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    run(denoiser, **inputs).square().sum().backward()
    for name, tensor in [*denoiser.named_parameters(), *tensors.items()]:
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, name


def test_banks_of_each_image_are_its_own(inputs):
    """One bank for all, or the same one given to each image, or each image alone with its own."""
    denoiser = trained(make())
    before = run(denoiser, **inputs)
    own = {name: torch.stack([inputs[name], inputs[name].flip(-1)]) for name in ("local_bank", "local_places")}
    together = run(denoiser, **inputs | own)
    torch.testing.assert_close(together[0], before[0], rtol=1e-4, atol=1e-5)
    alone = {name: inputs[name][1:] for name in ("noisy", "timesteps", "condition")}
    own = {name: banks[1] for name, banks in own.items()}
    torch.testing.assert_close(together[1:], run(denoiser, **inputs | alone | own))


@pytest.mark.parametrize("patch_size", [2, 3, 4])
def test_patches_of_any_size_give_back_the_grid(inputs, patch_size):
    denoiser = make(patch_size=patch_size)
    assert run(denoiser, **inputs).shape == (B, N, D_TOKEN)
    torch.testing.assert_close(denoiser._tokens(denoiser._patches(inputs["noisy"])), inputs["noisy"], rtol=0, atol=0)


def test_order_of_prototypes_and_batch_does_not_matter(inputs):
    denoiser = trained(make())
    before = run(denoiser, **inputs)
    shuffled = inputs | {name: inputs[name].roll(2, 0) for name in ("local_bank", "local_places", "global_bank")}
    torch.testing.assert_close(run(denoiser, **shuffled), before, rtol=1e-4, atol=1e-5)
    swapped = inputs | {name: inputs[name].flip(0) for name in ("noisy", "timesteps", "condition")}
    torch.testing.assert_close(run(denoiser, **swapped).flip(0), before, rtol=1e-4, atol=1e-5)


def test_tokens_know_their_place_and_each_other(inputs):
    denoiser = trained(make())
    before = run(denoiser, **inputs)
    noisy = inputs["noisy"].clone()
    noisy[:, 0] += 1
    assert not torch.allclose(run(denoiser, **inputs | {"noisy": noisy})[:, 1:], before[:, 1:], atol=1e-4)
    rolled = inputs | {name: inputs[name].roll(1, 1) for name in ("noisy", "condition")}
    assert not torch.allclose(run(denoiser, **rolled).roll(-1, 1), before, atol=1e-4)


def test_without_banks_and_condition(inputs):
    denoiser = trained(make(condition=False, prototype_attention=False))
    before = run(denoiser, **inputs)
    for name in ("condition", "local_bank", "local_places", "global_bank"):
        torch.testing.assert_close(run(denoiser, **inputs | {name: inputs[name].cos()}), before, rtol=0, atol=0)
    before.sum().backward()
    assert all(parameter.grad is not None for parameter in denoiser.parameters())


def test_timesteps_are_told_apart():
    torch.manual_seed(0)
    embed = TimestepEmbedding(16)
    embedded = embed(torch.arange(1000))
    assert embedded.shape == (1000, 16)
    neighbours = (embedded[1:] - embedded[:-1]).norm(dim=-1)
    assert neighbours.min() > 0
    torch.testing.assert_close(embed(torch.tensor([7, 400])), embedded[[7, 400]])
