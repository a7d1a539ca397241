"""The network that predicts clean tokens from noisy ones, conditioned on both prototype banks and the timestep."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdiff.tokens import places
from dpdiff_kernels import ProjectedBanks, PrototypeAttention

_FREQUENCIES = 128  # of the timestep's embedding


class Denoiser(nn.Module):
    """A transformer over a grid of tokens: tokens (B, N, D_token) at timesteps (B,) -> tokens of the same shape.

    It works on patches of `patch_size` x `patch_size` tokens (Peebles and Xie, "Scalable diffusion models with
    transformers", 2023); a grid that they don't divide is padded with copies of its border. What it learns is the
    difference from the condition, with which it starts: already a fair guess of a normal token.
    """

    def __init__(
        self,
        token_dim: int,
        grid: tuple[int, int],
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        condition: bool = True,
        prototype_attention: bool = True,
    ) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.patch_size = patch_size
        patch_dim = token_dim * patch_size**2
        patch_places = places([-(-side // patch_size) for side in grid])
        n_patches, n_places = patch_places.shape
        self.register_buffer("patch_places", patch_places, persistent=False)
        self.embed_place = nn.Linear(n_places, dim)
        self.embed = nn.Linear(patch_dim, dim)
        # Only what takes part: a parameter without a gradient stops distributed training.
        self.embed_condition = nn.Linear(patch_dim, dim) if condition else None
        bank_dim = token_dim + n_places
        self.embed_bank = nn.Sequential(nn.Linear(bank_dim, dim), nn.LayerNorm(dim)) if prototype_attention else None
        self.position = nn.Parameter(0.02 * torch.randn(1, n_patches, dim))
        self.embed_timestep = TimestepEmbedding(dim)
        self.blocks = nn.ModuleList(DenoiserBlock(dim, num_heads, prototype_attention) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, patch_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def project_banks(
        self, local_bank: Tensor, local_places: Tensor, global_bank: Tensor
    ) -> list[ProjectedBanks | None]:
        """Each block's keys and values of the banks, constant over the denoising steps.

        local_bank: (K, D_token), shared by all images, or (B, K, D_token). local_places: where on the grid these
        prototypes are normal (K, n_places) or (B, K, n_places). global_bank: (K, D_token), of whole images.
        """
        if self.embed_bank is None:
            return [None] * len(self.blocks)
        local_bank = self.embed_bank(torch.cat([local_bank, local_places], -1))
        global_bank = self.embed_bank(F.pad(global_bank, (0, local_places.shape[-1])))
        return [block.prototype_attention.project_banks(local_bank, global_bank) for block in self.blocks]

    def forward(
        self, noisy: Tensor, timesteps: Tensor, condition: Tensor, banks: list[ProjectedBanks | None]
    ) -> Tensor:
        """noisy (B, N, D), timesteps (B,), condition (B, N, D), banks of `project_banks` -> x0 (B, N, D)."""
        x = self.embed(self._patches(noisy)) + self.position + self.embed_place(self.patch_places)
        if self.embed_condition is not None:
            x = x + self.embed_condition(self._patches(condition))
        t = self.embed_timestep(timesteps).unsqueeze(1)
        for block, bank in zip(self.blocks, banks):
            x = block(x, t, bank)
        x0 = self._tokens(self.out(self.norm(x)))
        return x0 if self.embed_condition is None else condition + x0

    def _patches(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, patches, patch_size^2 D)."""
        (height, width), size = self.grid, self.patch_size
        maps = tokens.mT.unflatten(-1, self.grid)
        if height % size or width % size:
            maps = F.pad(maps, (0, -width % size, 0, -height % size), mode="replicate")
        # F.pixel_unshuffle, but of an empty batch too, which that gives back as it was.
        cells = maps.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _tokens(self, patches: Tensor) -> Tensor:
        height, width = (-(-side // self.patch_size) for side in self.grid)
        maps = F.pixel_shuffle(patches.mT.unflatten(-1, (height, width)), self.patch_size)
        return maps[..., : self.grid[0], : self.grid[1]].flatten(2).mT


class DenoiserBlock(nn.Module):
    """Self-attention, prototype attention and an MLP; the timestep shifts, scales and gates each (adaLN-zero).

    The gates of self-attention and MLP start at zero, that of prototype attention at one.
    """

    def __init__(self, dim: int, num_heads: int, prototype_attention: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.prototype_attention = PrototypeAttention(dim, num_heads) if prototype_attention else None
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 9 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        # A prototype attention that starts closed hardly opens: the condition shows the nearest prototypes already.
        nn.init.ones_(self.modulation.bias.view(9, dim)[5])

    def forward(self, x: Tensor, t: Tensor, banks: ProjectedBanks | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = self.modulation(t).chunk(9, -1)
        x = x + gate1 * self._self_attention(_modulate(x, shift1, scale1))
        if banks is not None:
            x = x + gate2 * self.prototype_attention(_modulate(x, shift2, scale2), cache=banks)
        return x + gate3 * self.mlp(_modulate(x, shift3, scale3))

    def _self_attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.attention_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TimestepEmbedding(nn.Module):
    """Timesteps (B,) -> (B, dim): sines and cosines of geometric frequencies, then a small MLP and SiLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        frequencies = torch.exp(-math.log(10_000) * torch.arange(_FREQUENCIES) / _FREQUENCIES)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None].float() * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], -1))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
