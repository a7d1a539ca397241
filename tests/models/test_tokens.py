"""The tokenizer against scikit-learn's StandardScaler and PCA, and its own inverse."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from dpdiff.backbones import Backbone
from dpdiff.tokens import Tokenizer, places


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


def split(tokenizer, tokens):
    """Tokens (B, N, D) as one map per layer (B, width, h, w)."""
    return [t.mT.unflatten(-1, tokenizer.grid) for t in tokens.split(tokenizer.widths, -1)]


def directions(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_statistics_are_those_of_the_training_maps(backbone):
    tokenizer = Tokenizer(backbone, 64, max_channels=10_000, neighbourhood=1)
    maps = random_maps(backbone)
    tokenizer.fit([[m[:5] for m in maps], [m[5:6] for m in maps], [m[6:] for m in maps]])  # batches of any size
    new = random_maps(backbone, n=3, seed=1)
    fine = split(tokenizer, tokenizer(new))[0]
    expected = StandardScaler().fit(vectors(maps[0])).transform(vectors(new[0]))
    np.testing.assert_allclose(directions(vectors(fine)), directions(expected), rtol=1e-4, atol=1e-4)


def test_wide_layers_are_projected_on_principal_components(backbone):
    width = 8
    tokenizer = Tokenizer(backbone, 64, max_channels=width, neighbourhood=1)
    assert tokenizer.widths == [width] * 3
    maps, new = random_maps(backbone), random_maps(backbone, n=3, seed=1)
    tokenizer.fit([maps])
    got = split(tokenizer, tokenizer(new))
    scaler = StandardScaler().fit(vectors(maps[0]))
    pca = PCA(width, svd_solver="full").fit(scaler.transform(vectors(maps[0])))
    expected = directions(pca.transform(scaler.transform(vectors(new[0]))))
    # A component's sign is arbitrary.
    np.testing.assert_allclose(np.abs(directions(vectors(got[0]))), np.abs(expected), rtol=1e-3, atol=1e-3)


def test_tokens_are_the_layers_vectors_on_the_finest_grid_in_one_length(backbone):
    tokenizer = Tokenizer(backbone, 64, max_channels=10_000)
    maps = random_maps(backbone)  # not fitted: the statistics are the identity
    tokens = tokenizer(maps)
    assert tokenizer.grid == (8, 8) and tokenizer.stride == 8
    assert tokens.shape == (12, tokenizer.n_tokens, tokenizer.dim) and tokenizer.dim == sum(backbone.channels)
    layers = split(tokenizer, tokens)
    for layer, features in zip(layers, maps):
        expected = F.interpolate(features, size=(8, 8), mode="bilinear")
        np.testing.assert_allclose(directions(vectors(layer)), directions(vectors(expected)), atol=1e-5)
        torch.testing.assert_close(layer.square().sum(1), torch.full((12, 8, 8), tokenizer.dim / 3))


def test_half_the_mean_square_of_a_difference_is_the_mean_cosine_distance(backbone):
    tokenizer = Tokenizer(backbone, 64)
    x, y = tokenizer(random_maps(backbone)), tokenizer(random_maps(backbone, seed=1))
    torch.testing.assert_close((x - y).square().mean(-1) / 2, tokenizer.cosine_distances(x, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [48, 72, 80])
def test_grids_that_do_not_divide(backbone, size):
    tokenizer = Tokenizer(backbone, size)
    tokens = tokenizer(backbone(torch.rand(2, 3, size, size)))
    assert tokens.shape == (2, tokenizer.n_tokens, tokenizer.dim) and tokens.isfinite().all()


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
    fine = split(tokenizer, tokenizer(maps))[0]
    reach = side // 2
    for row, column in [(0, 0), (0, 4), (3, 3), (7, 1)]:
        window = maps[0][:, :, max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
        expected = F.normalize(window.mean((2, 3)), dim=1)
        torch.testing.assert_close(F.normalize(fine[:, :, row, column], dim=1), expected, rtol=1e-4, atol=1e-4)


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
    early, late = split(tokenizer, tokenizer(maps))
    for group, expected in [(early, sum(maps[:half])), (late, sum(maps[half:]))]:
        torch.testing.assert_close(F.normalize(group, dim=1), F.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_constant_channels_give_zeros(backbone):
    tokenizer = Tokenizer(backbone, 64)
    maps = random_maps(backbone)
    maps[0][:, 3] = 7.0
    tokenizer.fit([maps])
    fine = split(tokenizer, tokenizer(maps))[0]
    torch.testing.assert_close(fine[:, 3], torch.zeros(12, 8, 8), atol=1e-4, rtol=0)
    maps[0].zero_()  # a layer without any variation
    tokenizer.fit([maps])
    assert tokenizer(maps).isfinite().all()


def test_fit_needs_a_batch(backbone):
    with pytest.raises(ValueError, match="batches is empty"):
        Tokenizer(backbone, 64).fit([])


def test_cosine_distances_are_those_of_the_layers_averaged(backbone):
    tokenizer = Tokenizer(backbone, 64)
    generator = torch.Generator().manual_seed(2)
    tokens, other = torch.randn(2, 3, tokenizer.n_tokens, tokenizer.dim, generator=generator)
    expected = 0
    for x, y in zip(tokens.split(tokenizer.widths, -1), other.split(tokenizer.widths, -1)):
        x, y = directions(x.double().numpy()), directions(y.double().numpy())
        expected = expected + (1 - (x * y).sum(-1)) / 3
    np.testing.assert_allclose(tokenizer.cosine_distances(tokens, other).numpy(), expected, atol=1e-5)
    torch.testing.assert_close(tokenizer.cosine_distances(tokens, -tokens), torch.full((3, tokenizer.n_tokens), 2.0))


def test_places_of_tokens_are_the_cosine_transform_of_where_they_lie():
    counts = np.random.default_rng(0).integers(0, 5, (6, 9))
    found = (torch.tensor(counts).flatten()[:, None] * places((6, 9), 3)).sum(0)
    np.testing.assert_allclose(found.view(3, 3).numpy(), dctn(counts, type=2)[:3, :3] / 4, atol=1e-4)
