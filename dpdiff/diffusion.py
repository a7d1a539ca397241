"""Noising and few-step reconstruction of vectors, on diffusers' schedulers."""

from collections.abc import Callable
from itertools import pairwise

import torch
from diffusers import DDIMScheduler
from torch import Tensor


class Diffusion:
    """A Gaussian diffusion whose network predicts the clean x0.

    Args:
        n_timesteps: T; timesteps run from 0 (almost clean) to T - 1 (almost noise).
        schedule: diffusers' `beta_schedule`; betas: the first and the last beta, where the schedule has such.
    """

    def __init__(
        self,
        n_timesteps: int = 1000,
        schedule: str = "squaredcos_cap_v2",
        betas: tuple[float, float] = (0.0001, 0.02),
    ) -> None:
        self.scheduler = DDIMScheduler(
            num_train_timesteps=n_timesteps,
            beta_schedule=schedule,
            beta_start=betas[0],
            beta_end=betas[1],
            prediction_type="sample",
            clip_sample=False,
            set_alpha_to_one=True,
        )

    @property
    def n_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def add_noise(self, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x (B, ...) at timesteps (B,): sqrt(abar_t) x + sqrt(1 - abar_t) noise (Ho et al., 2020, eq. 4)."""
        return self.scheduler.add_noise(x, noise, timesteps)

    def reconstruct(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        noise: Tensor,
        timestep: int,
        n_steps: int,
        min_timestep: int = 0,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Noises x (B, ...) to `timestep` and denoises it in `n_steps` steps of DDIM (Song et al., 2021, eta = 0).

        The steps are evenly spread from `timestep` down to `min_timestep`, below which the network isn't asked.

        Args:
            predict: (noisy x, timesteps (B,)) -> x0.
            noise: (B, ...), standard normal.
            keep: 1 for what of the noisy x the first step sees, 0 for what it doesn't; all when None.
        """
        timesteps = [round(timestep - (timestep - min_timestep) * i / n_steps) for i in range(n_steps)]
        abar = self.scheduler.alphas_cumprod.to(x.device)
        of_all = lambda t: torch.full((x.shape[0],), t, device=x.device)
        x = self.add_noise(x, noise, of_all(timestep))
        if keep is not None:
            x = x * keep
        for t, t_previous in pairwise(timesteps):
            x0 = predict(x, of_all(t))
            eps = (x - abar[t].sqrt() * x0) / (1 - abar[t]).sqrt()
            x = abar[t_previous].sqrt() * x0 + (1 - abar[t_previous]).sqrt() * eps
        return predict(x, of_all(timesteps[-1]))
