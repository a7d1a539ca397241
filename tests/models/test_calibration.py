"""Normal errors: the means of each prototype's tokens, sane where it has few, and what is far from them."""

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


def test_means_are_those_of_each_prototype_and_the_deviation_that_from_them():
    errors, nearest, mean, deviation = drawn()
    normal = NormalErrors(2, 4)
    normal.fit((errors[:, i : i + 1], nearest[i : i + 1]) for i in range(4))
    torch.testing.assert_close(normal.mean[:, :3], mean, rtol=0.02, atol=0.02)
    pooled = deviation.square().mean(1, keepdim=True).sqrt()  # prototypes are equally frequent
    torch.testing.assert_close(normal.deviation, pooled, rtol=0.02, atol=0)
    standard = normal(errors, nearest)
    torch.testing.assert_close(standard.square().mean((1, 2)), torch.ones(2), rtol=0.01, atol=0)
    for prototype in range(3):
        assert standard[:, nearest == prototype].mean(1).abs().max() < 0.03


def test_a_prototype_without_tokens_has_the_average_of_all():
    errors, nearest, _, _ = drawn()
    normal = NormalErrors(2, 4)
    normal.fit([(errors, nearest)])
    torch.testing.assert_close(normal.mean[:, 3], errors.mean((1, 2)))


def test_few_tokens_move_the_mean_little():
    errors, nearest = torch.zeros(1, 1, 1004), torch.zeros(1, 1004, dtype=torch.int64)
    errors[..., 1000:], nearest[:, 1000:] = 1.0, 1
    normal = NormalErrors(1, 2)
    normal.fit([(errors, nearest)])
    average = 4 / 1004
    torch.testing.assert_close(normal.mean[0], torch.tensor([16 * average / 1016, (4 + 16 * average) / 20]))


def test_the_same_error_counts_more_where_errors_are_usually_small():
    errors, nearest, _, _ = drawn()
    normal = NormalErrors(2, 4)
    normal.fit([(errors, nearest)])
    smooth, grainy = normal(torch.full((2, 1, 2), 3.0), torch.tensor([[2, 1]]))[0, 0]
    assert smooth > 5 and abs(grainy) < 0.1  # 3.0 where 0.1 and 3.0 are normal


def test_errors_without_spread_stay_finite():
    normal = NormalErrors(1, 2)
    normal.fit([(torch.full((1, 1, 9), 0.25), torch.zeros(1, 9, dtype=torch.int64))])
    assert normal(torch.full((1, 1, 2), 0.25), torch.tensor([[0, 1]])).isfinite().all()
