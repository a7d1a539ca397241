"""The tokenizer against scikit-learn's StandardScaler and PCA, and its own inverse."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from dpdiff.backbones import Backbone
from dpdiff.tokens import Tokenizer


@pytest.fixture(scope="module")
def backbone():
    return Backbone("test_resnet", layers=[2, 3, 4], pretrained=False)  # strides 8, 16 and 32


def random_maps(backbone, n=12, size=64, seed=0):
    """Feature maps of the backbone's shapes: correlated channels of very different means and scales."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for channels, stride in zip(backbone.channels, backbone.strides):
        side = -(-size // stride)
        x = torch.randn(n, side, side, channels, generator=generator)
        x = x @ torch.randn(channels, channels, generator=generator)
        scale = torch.logspace(-1, 1, channels)
        maps.append((x * scale + 3 * scale).movedim(-1, 1))
    return maps


def vectors(features):
    """Maps (B, C, H, W) as rows (B H W, C), float64."""
    return features.movedim(1, -1).flatten(0, -2).double().numpy()


def test_statistics_are_those_of_the_training_maps(backbone):
    tokenizer = Tokenizer(backbone, 64, max_channels=10_000, neighbourhood=1)
    maps = random_maps(backbone)
    tokenizer.fit([[m[:5] for m in maps], [m[5:6] for m in maps], [m[6:] for m in maps]])  # batches of any size
    new = random_maps(backbone, n=3, seed=1)
    fine, middle, _ = tokenizer.split(tokenizer(new))
    for got, train, test in [(fine, maps[0], new[0]), (middle, maps[1], new[1])]:
        expected = StandardScaler().fit(vectors(train)).transform(vectors(test))
        np.testing.assert_allclose(vectors(got), expected, rtol=1e-4, atol=1e-4)


def test_wide_layers_are_projected_on_principal_components(backbone):
    width = 8
    tokenizer = Tokenizer(backbone, 64, max_channels=width, neighbourhood=1)
    assert tokenizer.widths == [width] * 3
    maps, new = random_maps(backbone), random_maps(backbone, n=3, seed=1)
    tokenizer.fit([maps])
    got = tokenizer.split(tokenizer(new))
    for layer, train, test in zip(got[:2], maps, new):
        scaler = StandardScaler().fit(vectors(train))
        pca = PCA(width, svd_solver="full").fit(scaler.transform(vectors(train)))
        expected = pca.transform(scaler.transform(vectors(test)))
        # A component's sign is arbitrary.
        np.testing.assert_allclose(np.abs(vectors(layer)), np.abs(expected), rtol=1e-3, atol=1e-3)


def test_split_gives_back_the_maps_on_their_own_grids(backbone):
    tokenizer = Tokenizer(backbone, 64, max_channels=10_000, neighbourhood=1)
    maps = random_maps(backbone)  # not fitted: the statistics are the identity
    tokens = tokenizer(maps)
    assert tokenizer.grid == (4, 4)  # of the stride closest to 16
    assert tokens.shape == (12, tokenizer.n_tokens, tokenizer.dim)
    assert tokenizer.dim == 4 * backbone.channels[0] + backbone.channels[1] + backbone.channels[2]
    fine, middle, coarse = tokenizer.split(tokens)
    torch.testing.assert_close(fine, maps[0])
    torch.testing.assert_close(middle, maps[1])
    torch.testing.assert_close(coarse, F.interpolate(maps[2], size=(4, 4), mode="bilinear"))


def test_a_token_holds_the_fine_vectors_that_it_covers(backbone):
    tokenizer = Tokenizer(backbone, 64, neighbourhood=1)
    maps = random_maps(backbone, n=1)
    before = tokenizer(maps)
    maps[0][0, :, 5, 2] += 1  # row 5, column 2 of the 8 x 8 grid lies in row 2, column 1 of the 4 x 4 grid
    changed = (tokenizer(maps) != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [2 * 4 + 1]


@pytest.mark.parametrize("size", [48, 72, 80])
def test_grids_that_do_not_divide_are_interpolated(backbone, size):
    tokenizer = Tokenizer(backbone, size)
    maps = backbone(torch.rand(2, 3, size, size))
    tokens = tokenizer(maps)
    assert tokens.shape == (2, tokenizer.n_tokens, tokenizer.dim)
    for layer, width in zip(tokenizer.split(tokens), tokenizer.widths):
        assert layer.shape[:2] == (2, width)
        assert layer.shape[2] % tokenizer.grid[0] == 0


@pytest.mark.parametrize(("stride", "grid"), [(8, (8, 8)), (16, (4, 4)), (32, (2, 2))])
def test_stride_chooses_the_grid(backbone, stride, grid):
    tokenizer = Tokenizer(backbone, 64, stride=stride)
    assert tokenizer.grid == grid
    assert tokenizer(random_maps(backbone)).shape == (12, grid[0] * grid[1], tokenizer.dim)


def test_stride_of_no_layer_is_refused(backbone):
    with pytest.raises(ValueError, match=r"stride is 4: expected one of .*\[8, 16, 32\]"):
        Tokenizer(backbone, 64, stride=4)


@pytest.mark.parametrize("side", [3, 5])
def test_neighbourhoods_are_averaged(backbone, side):
    """Within the map: at its border over the neighbours that there are."""
    tokenizer = Tokenizer(backbone, 64, max_channels=10_000, neighbourhood=side)
    maps = random_maps(backbone, n=2)
    fine = tokenizer.split(tokenizer(maps))[0]
    reach = side // 2
    for row, column in [(0, 0), (0, 4), (3, 3), (7, 1)]:
        window = maps[0][:, :, max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
        torch.testing.assert_close(fine[:, :, row, column], window.mean((2, 3)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("side", [0, 2, -3])
def test_neighbourhood_has_a_middle(backbone, side):
    with pytest.raises(ValueError, match=f"neighbourhood is {side}: expected a positive odd number"):
        Tokenizer(backbone, 64, neighbourhood=side)


def test_transformer_layers_are_averaged_in_an_early_and_a_late_group():
    backbone = Backbone("test_vit", pretrained=False)
    assert len(backbone.layers) > 2
    tokenizer = Tokenizer(backbone, 64, max_channels=10_000, neighbourhood=1)
    maps = backbone(torch.rand(2, 3, 64, 64))
    half = len(maps) // 2
    early, late = tokenizer.split(tokenizer(maps))
    torch.testing.assert_close(early, sum(maps[:half]) / half)
    torch.testing.assert_close(late, sum(maps[half:]) / (len(maps) - half))
    tokenizer.fit([maps])
    means = [vectors(m).mean(0) for m in tokenizer.split(tokenizer(maps))]
    np.testing.assert_allclose(means, np.zeros_like(means), atol=1e-5)


def test_constant_channels_give_zeros(backbone):
    tokenizer = Tokenizer(backbone, 64)
    maps = random_maps(backbone)
    maps[0][:, 3] = 7.0
    tokenizer.fit([maps])
    fine = tokenizer.split(tokenizer(maps))[0]
    torch.testing.assert_close(fine[:, 3], torch.zeros(12, 8, 8), atol=1e-4, rtol=0)
    maps[0].zero_()  # a layer without any variation
    tokenizer.fit([maps])
    assert tokenizer(maps).isfinite().all()


def test_fit_needs_a_batch(backbone):
    with pytest.raises(ValueError, match="batches is empty"):
        Tokenizer(backbone, 64).fit([])


def test_cosine_distances_per_layer(backbone):
    tokenizer = Tokenizer(backbone, 64)
    generator = torch.Generator().manual_seed(2)
    tokens, other = torch.randn(2, 3, tokenizer.n_tokens, tokenizer.dim, generator=generator)
    for distance, x, y in zip(
        tokenizer.cosine_distances(tokens, other), tokenizer.split(tokens), tokenizer.split(other), strict=True
    ):
        x, y = x.double().numpy(), y.double().numpy()
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        np.testing.assert_allclose(distance.numpy(), 1 - (x * y).sum(1) / norms, atol=1e-5)
    for distance in tokenizer.cosine_distances(tokens, -tokens):
        torch.testing.assert_close(distance, torch.full_like(distance, 2.0))
