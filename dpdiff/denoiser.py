"""The network that predicts clean tokens from noisy ones, conditioned on both prototype banks and the timestep."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdiff_kernels import PrototypeAttention


class Denoiser(nn.Module):
    """A transformer over a grid of tokens: tokens (B, N, D_token) at timesteps (B,) -> tokens of the same shape.

    Its width is `dim`; both banks come in that width (project the local one with `embed_bank`).
    """

    def __init__(
        self,
        token_dim: int,
        n_tokens: int,
        dim: int = 256,
        depth: int = 3,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        condition: bool = True,
        prototype_attention: bool = True,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(token_dim, dim)
        # Only what takes part: a parameter without a gradient stops distributed training.
        self.embed_condition = nn.Linear(token_dim, dim) if condition else None
        self.embed_bank = nn.Sequential(nn.Linear(token_dim, dim), nn.LayerNorm(dim)) if prototype_attention else None
        self.position = nn.Parameter(0.02 * torch.randn(1, n_tokens, dim))
        self.embed_timestep = TimestepEmbedding(dim)
        self.blocks = nn.ModuleList(DenoiserBlock(dim, num_heads, mlp_ratio, prototype_attention) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, token_dim)

    def project_banks(self, local_bank: Tensor, global_bank: Tensor) -> list:
        """Each block's keys and values of the banks, constant at inference: computed once for all denoising steps."""
        if self.embed_bank is None:
            return [None] * len(self.blocks)
        local_bank = self.embed_bank(local_bank)
        global_bank = F.layer_norm(global_bank, global_bank.shape[-1:])
        return [block.project_banks(local_bank, global_bank) for block in self.blocks]

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Tensor, banks: list) -> Tensor:
        """noisy (B, N, D), timesteps (B,), condition (B, N, D), banks of `project_banks` -> x0 (B, N, D)."""
        x = self.embed(noisy) + self.position
        if self.embed_condition is not None:
            x = x + self.embed_condition(condition)
        t = self.embed_timestep(timesteps).unsqueeze(1)
        for block, bank in zip(self.blocks, banks):
            x = block(x, t, bank)
        return self.out(self.norm(x))


class DenoiserBlock(nn.Module):
    """Self-attention, prototype attention and an MLP; the timestep shifts, scales and gates each (adaLN-zero, Peebles
    and Xie, "Scalable diffusion models with transformers", 2023)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, prototype_attention: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.prototype_attention = PrototypeAttention(dim, num_heads) if prototype_attention else None
        hidden = int(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.modulation = nn.Linear(dim, 9 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def project_banks(self, local_bank: Tensor, global_bank: Tensor) -> tuple:
        return self.prototype_attention.project_banks(local_bank, global_bank)

    def forward(self, x: Tensor, t: Tensor, banks: tuple | None) -> Tensor:
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

    def __init__(self, dim: int, n_frequencies: int = 128) -> None:
        super().__init__()
        frequencies = torch.exp(-math.log(10_000) * torch.arange(n_frequencies) / n_frequencies)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * n_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None].float() * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], -1))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
