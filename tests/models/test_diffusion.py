"""The diffusion against diffusers' own stepping and against closed forms."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from dpdiff.diffusion import Diffusion


def wavy(x, t):
    """Any function of the noisy x and of time, in place of a network."""
    return torch.tanh(x) * (1 + t[:, None] / 1000)


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "scaled_linear"])
def test_noise_follows_the_schedule(schedule):
    diffusion = Diffusion(100, schedule)
    if schedule == "scaled_linear":
        betas = torch.linspace(1e-4**0.5, 0.02**0.5, 100, dtype=torch.float64) ** 2
    else:  # Nichol and Dhariwal, 2021, eq. 17

        def f(t):
            return math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = torch.tensor([min(1 - f(t + 1) / f(t), 0.999) for t in range(100)], dtype=torch.float64)
    abar = (1 - betas).cumprod(0)
    t = torch.tensor([0, 17, 60, 99])
    x, noise = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    expected = abar[t].sqrt().view(4, 1, 1) * x + (1 - abar[t]).sqrt().view(4, 1, 1) * noise
    torch.testing.assert_close(diffusion.add_noise(x, noise, t), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("timestep", "n_steps"), [(300, 1), (300, 3), (500, 5), (900, 9), (999, 27)])
def test_steps_are_those_of_diffusers(timestep, n_steps):
    x, noise = torch.randn(2, 4, 6)
    got = Diffusion().reconstruct(wavy, x, noise, timestep, n_steps)

    theirs = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False)
    spacing = timestep // n_steps
    theirs.set_timesteps(1000 // spacing)  # a step of theirs goes from t to t - spacing
    sample = theirs.add_noise(x, noise, torch.tensor([timestep]))
    for t in range(timestep, 0, -spacing):
        step = theirs.step(wavy(sample, torch.full((4,), t)), t, sample)
        sample = step.prev_sample
    torch.testing.assert_close(got, step.pred_original_sample, rtol=1e-4, atol=1e-5)


def test_the_network_is_not_asked_below_the_least_timestep():
    times = []

    def predict(noisy, timesteps):
        times.append(int(timesteps[0]))
        return noisy

    Diffusion().reconstruct(predict, torch.randn(2, 3), torch.randn(2, 3), 600, 4, min_timestep=300)
    assert times == [600, 525, 450, 375]


def test_what_is_not_kept_is_hidden_from_the_first_step():
    keep = torch.tensor([1.0, 0.0, 1.0])
    x, noise = torch.randn(2, 4, 3)
    seen = []

    def predict(noisy, timesteps):
        seen.append(noisy)
        return x

    diffusion = Diffusion()
    diffusion.reconstruct(predict, x, noise, 600, 2, keep=keep)
    torch.testing.assert_close(seen[0], diffusion.add_noise(x, noise, torch.full((4,), 600)) * keep)
    assert (seen[1] != 0).all()


@pytest.mark.parametrize("n_steps", [1, 2, 7, 31])
def test_a_perfect_network_sees_the_same_noise_at_every_step(n_steps):
    diffusion = Diffusion()
    x, noise = torch.randn(2, 4, 6)
    seen = []

    def perfect(noisy, timesteps):
        seen.append((noisy, timesteps))
        return x

    torch.testing.assert_close(diffusion.reconstruct(perfect, x, noise, 400, n_steps), x)
    times = [int(t[0]) for _, t in seen]
    assert len(times) == n_steps and times[0] == 400 and times == sorted(set(times), reverse=True)
    for noisy, timesteps in seen:
        torch.testing.assert_close(noisy, diffusion.add_noise(x, noise, timesteps), rtol=1e-3, atol=1e-4)


def test_many_steps_carry_a_gaussian_to_its_own_spread():
    """For x0 ~ N(0, s^2) the best network is linear, and the ODE behind DDIM is solved in closed form."""
    diffusion, s2 = Diffusion(), 0.25
    abar = diffusion.scheduler.alphas_cumprod.double()

    def best(noisy, timesteps):
        a = abar[timesteps][:, None]
        return a.sqrt() * s2 / (a * s2 + 1 - a) * noisy

    x, noise = torch.randn(2, 64, 8, dtype=torch.float64)
    noisy = diffusion.add_noise(x, noise, torch.full((64,), 600))
    expected = noisy * (s2 / (abar[600] * s2 + 1 - abar[600])).sqrt()
    errors = [(diffusion.reconstruct(best, x, noise, 600, n) - expected).abs().max() for n in (6, 60, 600)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]  # of first order in the step
    assert errors[2] < 5e-3
