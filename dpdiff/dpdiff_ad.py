"""DPDiff-AD: dual-prototype-conditioned diffusion for multi-class anomaly detection."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from dpdiff.backbones import DEFAULT_BACKBONE, Backbone
from dpdiff.denoiser import Denoiser
from dpdiff.detector import Detector, Prediction, check_images
from dpdiff.diffusion import Diffusion
from dpdiff.draws import Draws
from dpdiff.prototypes import GlobalPrototypes, LocalPrototypes
from dpdiff.tokens import Tokenizer

_REVIVAL_INTERVAL = 200  # steps
_INITIAL_TOKENS = 50_000  # on which k-means runs
_TRANSPORTED = 8  # tokens of an image in the transport losses


class DPDiffAD(Detector):
    """One detector for many product categories, trained on normal images only and without category labels.

    A frozen backbone turns an image into tokens; local prototypes (nearest-prototype aggregation) say what normal
    structure each token is closest to, global prototypes (regularised by optimal transport) shape the space in which a
    diffusion model, conditioned on both by prototype attention, reconstructs the tokens. What it can't reconstruct, and
    what is far from every local prototype, is anomalous. The abstract of "DPDiff-AD" fixes these parts; what it leaves
    open is chosen here.

    Train with `dpdiff.training.train` or the command `dpdiff train`, which call `initialise`, `losses` and `calibrate`.

    Args:
        backbone, layers, backbone_weights, pretrained: see `Backbone`.
        image_size: side in pixels to which images are resized.
        stride: of the layer whose grid the tokens lie on; the one closest to 16 when None. See `Tokenizer`.
        max_channels: channels per layer; what has more is projected on its principal components.
        neighbourhood: side of the window in which features are averaged.
        n_local, n_global: prototypes in the banks.
        k: nearest local prototypes blended into a token's condition; temperature: of their softmax, on squared
            distances per channel.
        dim, depth, num_heads: of the denoiser. dim is a multiple of num_heads.
        n_timesteps: of the diffusion. min_timestep: the least that training draws: at lower ones, noisy tokens show
            nearly everything, and copying them, defects included, is all that there is to learn.
        timestep: to which inference noises the tokens; n_steps: DDIM steps back from there; n_samples: noise samples
            over which the map is averaged.
        local_weight: share of the distance to the local prototypes in the anomaly map, from 0 to 1.
        ot_weight, local_loss_weight: of these losses beside the reconstruction's.
        condition, prototype_attention: False leaves out the local condition, or the attention to both banks.

    Raises:
        ValueError: an argument out of its range; unknown backbone or weights that don't fit it.
        OSError: pretrained weights can't be had.
    """

    TRAINING: ClassVar = {"max_steps": 1_200, "batch_size": 16, "lr": 1e-3, "weight_decay": 1e-4}

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        layers: Sequence[int] | None = None,
        backbone_weights: str | None = None,
        pretrained: bool = True,
        image_size: int = 256,
        stride: int | None = None,
        max_channels: int = 128,
        neighbourhood: int = 3,
        n_local: int = 512,
        n_global: int = 64,
        k: int = 3,
        temperature: float = 0.1,
        dim: int = 192,
        depth: int = 2,
        num_heads: int = 3,
        n_timesteps: int = 1000,
        min_timestep: int = 300,
        timestep: int = 600,
        n_steps: int = 1,
        n_samples: int = 1,
        local_weight: float = 0.05,
        ot_weight: float = 0.1,
        local_loss_weight: float = 1.0,
        condition: bool = True,
        prototype_attention: bool = True,
    ) -> None:
        super().__init__()
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        _check_arguments(arguments)
        # What `load` needs to build the model again; the backbone's weights then come from the file.
        self.config: dict[str, Any] = arguments | {"layers": None, "backbone_weights": None, "pretrained": False}
        self.backbone = Backbone(backbone, layers, pretrained, backbone_weights)
        self.config["layers"] = list(self.backbone.layers)
        self.tokenizer = Tokenizer(self.backbone, image_size, stride, max_channels, neighbourhood)
        token_dim, n_tokens = self.tokenizer.dim, self.tokenizer.n_tokens
        self.local_prototypes = LocalPrototypes(n_local, token_dim, k, temperature)
        self.global_prototypes = GlobalPrototypes(n_global, dim)
        self.denoiser = Denoiser(
            token_dim, n_tokens, dim, depth, num_heads, condition=condition, prototype_attention=prototype_attention
        )
        self.diffusion = Diffusion(n_timesteps)
        # The same noise for every image: a score depends on the image alone, not on its batch or on a seed.
        noise = torch.randn(n_samples, n_tokens, token_dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", noise, persistent=False)
        # Means of the reconstruction's and of the local prototypes' map on normal images, which make them comparable.
        self.register_buffer("map_means", torch.ones(2))

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) float in [0, 1], of any size -> tokens (B, N, D)."""
        return self.tokenizer(self.backbone(self._resize(images)))

    @torch.no_grad()
    def encode(self, reduced: Sequence[Tensor]) -> Tensor:
        """The backbone's maps -> tokens (B, N, D)."""
        return self.tokenizer(reduced)

    @torch.no_grad()
    def initialise(
        self, batches: Callable[[], Iterable[list[Tensor]]], n_images: int, generator: torch.Generator
    ) -> None:
        """Sets the tokenizer's statistics, and the local bank by k-means over some tokens of each image."""
        self.tokenizer.fit(batches())
        per_image = -(-_INITIAL_TOKENS // n_images)
        some = []
        for maps in batches():
            tokens = self.encode(maps)
            some.append(tokens[:, torch.randperm(tokens.shape[1], generator=generator)[:per_image]].flatten(0, 1))
        self.local_prototypes.initialise(torch.cat(some), n_iters=10, generator=generator)

    def losses(self, tokens: Tensor, draws: Draws | None = None) -> dict[str, Tensor]:
        """Training losses of clean tokens (B, N, D): "loss", what to minimise, and its parts, all scalars.

        draws: random numbers for B samples; from torch's global ones when None.
        """
        config = self.config
        draws = Draws.unseeded(len(tokens), tokens.device) if draws is None else draws
        timesteps = draws.integers(config["min_timestep"], self.diffusion.n_timesteps)
        noisy = self.diffusion.add_noise(tokens, draws.normal(*tokens.shape[1:]), timesteps)
        condition, distances = self.local_prototypes(tokens)
        reconstruction = self.denoiser(noisy, timesteps, condition, self._banks()).float()
        cosine = torch.stack([m.mean() for m in self.tokenizer.cosine_distances(tokens, reconstruction)]).mean()
        mse = F.mse_loss(reconstruction, tokens)
        transport, swapped = self._transport(tokens, noisy, draws.integers(0, tokens.shape[1], _TRANSPORTED))
        local = distances.mean()
        loss = mse + cosine + config["ot_weight"] * (transport + swapped) + config["local_loss_weight"] * local
        return {
            "loss": loss,
            "cosine": cosine,
            "mse": mse,
            "local": local,
            "transport": transport,
            "swapped": swapped,
        }

    @torch.no_grad()
    def between_steps(self, step: int, features: Tensor, epoch_steps: int, average: nn.Module) -> None:
        """Every so often, gives local prototypes that no token was nearest to a new place among tokens (B, N, D)."""
        # Not within a step: the backward pass needs the bank as the losses saw it.
        if step and step % _REVIVAL_INTERVAL == 0:
            self.local_prototypes.revive(features, self.local_prototypes(features)[1])

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Sets the scale of both maps from tokens (B, N, D) of normal images, one pass, after training."""
        totals, n = torch.zeros(2, dtype=torch.float64), 0
        for tokens in batches:
            totals += torch.stack([m.double().mean().cpu() for m in self._maps(tokens)]) * len(tokens)
            n += len(tokens)
        if n:
            self.map_means.copy_(totals / n)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """images (B, 3, H, W) float in [0, 1] -> `Prediction` with scores (B,) and maps (B, H, W).

        Deterministic, and independent of what else is in the batch.

        Raises:
            TypeError, ValueError: images of another type, shape or range.
        """
        check_images(images)
        tokens = self.tokenize(images.to(self.map_means.dtype)).float()
        reconstruction, local = (m / mean.clamp_min(1e-12) for m, mean in zip(self._maps(tokens), self.map_means))
        share = self.config["local_weight"]
        maps = (1 - share) * reconstruction + share * local
        maps = _blur(maps, sigma=maps.shape[-1] / 32)  # 8 pixels of a 256-pixel image
        flat = maps.flatten(1)
        scores = flat.topk(max(1, flat.shape[1] // 100), dim=1).values.mean(1)
        maps = F.interpolate(maps.unsqueeze(1), size=images.shape[-2:], mode="bilinear", align_corners=False)
        return Prediction(scores.float(), maps.squeeze(1).float())

    def _maps(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction error and distance to the local prototypes, (B, h, w) on the finest layer's grid."""
        config = self.config
        condition, distances = self.local_prototypes(tokens)
        banks = self._banks()

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.denoiser(noisy, timesteps, condition, banks).float()

        errors = []
        for noise in self.noise:
            noise = noise.expand_as(tokens)
            steps = (config["timestep"], config["n_steps"], config["min_timestep"])
            reconstruction = self.diffusion.reconstruct(predict, tokens, noise, *steps)
            errors.append(self.tokenizer.cosine_distances(tokens, reconstruction))
        layers = [torch.stack(samples).mean(0) for samples in zip(*errors)]
        finest = max((layer.shape[-2:] for layer in layers), key=lambda size: size[0])
        reconstruction = torch.stack([_upsample(layer, finest) for layer in layers]).mean(0)
        local = _upsample(distances.unflatten(-1, self.tokenizer.grid), finest)
        return reconstruction, local

    def _banks(self) -> list:
        return self.denoiser.project_banks(self.local_prototypes.bank, self.global_prototypes.bank)

    def _transport(self, tokens: Tensor, noisy: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Optimal-transport losses of images (pooled tokens) and of each image's `chosen` (B, n) tokens, clean and
        noisy."""
        views = [self.denoiser.embed(x) for x in (tokens, noisy)]
        images = [view.mean(1) for view in views]
        some = [view.gather(1, chosen[..., None].expand(-1, -1, view.shape[-1])).flatten(0, 1) for view in views]
        pairs = zip(self.global_prototypes(*images), self.global_prototypes(*some))
        return tuple((a + b) / 2 for a, b in pairs)


def _check_arguments(arguments: dict[str, Any]) -> None:
    def expect(name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise ValueError(f"{name} is {arguments[name]!r}: expected {expected}")

    sizes = ("image_size", "max_channels", "n_local", "n_global", "k", "dim", "depth", "num_heads", "n_steps")
    for name in (*sizes, "n_samples", "n_timesteps"):
        expect(name, isinstance(arguments[name], int) and arguments[name] >= 1, "a positive int")
    n_local, num_heads = arguments["n_local"], arguments["num_heads"]
    expect("dim", arguments["dim"] % num_heads == 0, f"a multiple of num_heads ({num_heads})")
    expect("k", arguments["k"] <= n_local, f"at most n_local ({n_local})")
    expect("temperature", arguments["temperature"] > 0, "a positive number")
    last, timestep, least = arguments["n_timesteps"] - 1, arguments["timestep"], arguments["min_timestep"]
    expect("timestep", 0 <= timestep <= last, f"0 to n_timesteps - 1 ({last})")
    expect("min_timestep", 0 <= least <= timestep, f"0 to timestep ({timestep})")
    most = timestep - least + 1
    expect("n_steps", arguments["n_steps"] <= most, f"at most timestep - min_timestep + 1 ({most})")
    expect("local_weight", 0 <= arguments["local_weight"] <= 1, "0 to 1")


def _upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps.unsqueeze(1), size=size, mode="bilinear", align_corners=False).squeeze(1)


def _blur(maps: Tensor, sigma: float) -> Tensor:
    size = 2 * round(3 * sigma) + 1
    return TF.gaussian_blur(maps, [size, size], [sigma, sigma])
