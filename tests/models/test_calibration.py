"""Normal errors: those of each prototype's tokens, and sane where a prototype has few."""

import torch

from dpdiff.calibration import NormalErrors


def drawn(n=20_000, seed=0):
    """Errors of two maps whose mean and deviation differ between three prototypes; a fourth has no token."""
    generator = torch.Generator().manual_seed(seed)
    nearest = torch.randint(3, (4, n // 4), generator=generator)
    mean = torch.tensor([[1.0, 3.0, 0.1], [5.0, 2.0, 0.3]])
    deviation = torch.tensor([[0.2, 0.5, 0.01], [1.0, 0.2, 0.1]])
    errors = mean[:, nearest] + deviation[:, nearest] * torch.randn(2, 4, n // 4, generator=generator)
    return errors, nearest, mean, deviation


def test_mean_and_deviation_are_those_of_each_prototype():
    errors, nearest, mean, deviation = drawn(50_000)
    normal = NormalErrors(2, 4)
    normal.fit((errors[:, i : i + 1], nearest[i : i + 1]) for i in range(4))
    torch.testing.assert_close(normal.mean[:, :3], mean, rtol=0.02, atol=0.02)
    # Half the mean deviation is added, which thus is 1.5 times what it was. Sixteen average tokens count too.
    floor = (normal.deviation / 1.5).mean(1, keepdim=True) / 2
    torch.testing.assert_close(normal.deviation[:, :3] - floor, deviation, rtol=0.1, atol=0.07)
    standard = normal(errors, nearest)
    for prototype in range(3):
        assert standard[:, nearest == prototype].mean(1).abs().max() < 0.02


def test_a_prototype_without_tokens_has_the_average_of_all():
    errors, nearest, _, _ = drawn()
    normal = NormalErrors(2, 4)
    normal.fit([(errors, nearest)])
    torch.testing.assert_close(normal.mean[:, 3], errors.mean((1, 2)))
    spread = normal.deviation[:, 3] - 0.5 * (normal.deviation / 1.5).mean(1)
    torch.testing.assert_close(spread, errors.std((1, 2), correction=0), rtol=1e-3, atol=1e-3)


def test_the_same_error_counts_more_where_errors_are_usually_small():
    errors, nearest, _, _ = drawn()
    normal = NormalErrors(2, 4)
    normal.fit([(errors, nearest)])
    smooth, grainy = normal(torch.full((2, 1, 2), 3.0), torch.tensor([[2, 1]]))[0, 0]
    assert smooth > 5 and abs(grainy) < 0.1


def test_errors_without_spread_stay_finite():
    normal = NormalErrors(1, 2)
    normal.fit([(torch.full((1, 1, 9), 0.25), torch.zeros(1, 9, dtype=torch.int64))])
    assert normal(torch.full((1, 1, 2), 0.25), torch.tensor([[0, 1]])).isfinite().all()
