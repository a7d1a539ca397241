"""DLSR: out-of-distribution detection by diffusion-based layer-wise semantic reconstruction."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdiff.backbones import DEFAULT_BACKBONE, Backbone
from dpdiff.denoiser import TimestepEmbedding
from dpdiff.detector import BatchesOf, Detector, Prediction, check_arguments, expect, is_int, spread
from dpdiff.diffusion import Diffusion
from dpdiff.draws import Draws

SCORES = ("mse", "mfsim", "lr", "ratio")
INFERENCES = ("direct", "paper")
_PAPER_STEPS = 3  # through the first timesteps
_PAPER_MASK = 15  # every such number is masked
_EPS = 1e-6  # of variances
_LEAST_SCALE = 1e-3  # of what hardly varies over the training images; a stage's part has variance 1
_TIMESTEP_DIM = 128


class DLSR(Detector):
    """Tells images that are unlike the training images as a whole, learning from these alone, without labels.

    The stages of a frozen backbone, averaged over the image, are one vector: what the image looks like from texture to
    content. A diffusion model learns to denoise such vectors of training images; those of other images it reconstructs
    worse. After "Diffusion-based layer-wise semantic reconstruction for unsupervised out-of-distribution detection"
    (Yang et al., NeurIPS 2024).

    Train with `dpdiff.training.train` or the command `dpdiff train --model dlsr`.

    Args:
        backbone, layers, backbone_weights, pretrained: see `Backbone`; layers None is every stage of a CNN.
        image_size: side in pixels to which images are resized.
        score: "mse", the squared error of the reconstruction; "mfsim", minus the cosine similarity of each stage's part
            of the vector and its reconstruction, averaged over stages; "lr", the paper's likelihood regret, the error
            of the model as it was after the first pass over the training images minus that of the final one, which
            tells images that are far out, but of near ones is smaller than of those in distribution, which gain most
            from training; "ratio", the final error over the first one, which is free of their scale. The last two keep
            both sets of weights.
        hidden: width of the denoiser; the vector's length when None. depth: its residual blocks. The paper's code has
            twice that width and 16 blocks.
        n_timesteps: of the diffusion, whose noise levels are those of the paper's code for 100.
        inference: "direct", from the noise of `timestep` in `n_steps` of DDIM; "paper", from hardly any, that of
            timestep 3, through timesteps 2 and 1, where every 15th number is hidden from the first step.
        timestep, n_steps: of direct inference. n_samples: noise samples over which the score is averaged.

    Raises:
        ValueError: an argument out of its range; unknown backbone or weights that don't fit it.
        OSError: pretrained weights can't be had.
    """

    TRAINING: ClassVar = {"max_steps": 1200, "batch_size": 64, "lr": 2e-3, "weight_decay": 0.05}
    ema_decay = 0.99

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        layers: Sequence[int] | None = None,
        backbone_weights: str | None = None,
        pretrained: bool = True,
        image_size: int = 224,
        score: str = "mse",
        hidden: int | None = None,
        depth: int = 2,
        n_timesteps: int = 100,
        inference: str = "direct",
        timestep: int = 60,
        n_steps: int = 1,
        n_samples: int = 1,
    ) -> None:
        super().__init__()
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        _check_arguments(arguments)
        self.config: dict[str, Any] = arguments | {"backbone_weights": None, "pretrained": False}
        self.backbone = Backbone(backbone, "all" if layers is None else layers, pretrained, backbone_weights)
        self.config["layers"] = list(self.backbone.layers)
        dim = sum(self.backbone.channels)
        self.denoiser = VectorDenoiser(dim, dim if hidden is None else hidden, depth)
        compares = score in ("lr", "ratio")
        self.first_denoiser = copy.deepcopy(self.denoiser).requires_grad_(False) if compares else None
        self.register_buffer("mean", torch.zeros(dim))  # of the training images
        self.register_buffer("scale", torch.ones(dim))
        self.diffusion = Diffusion(n_timesteps, "scaled_linear", (0.0015, 0.0195))
        # The same noise for every image: a score depends on the image alone, not on its batch or on a seed.
        noise = torch.randn(n_samples, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", noise, persistent=False)
        keep = (torch.arange(dim) % _PAPER_MASK != 0).float()
        self.register_buffer("keep", keep, persistent=False)

    def reduce(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The backbone's maps (B, C_l, H_l, W_l) -> their averages, [(B, D)]."""
        return [torch.cat([m.mean((-2, -1)) for m in maps], 1)]

    def encode(self, reduced: Sequence[Tensor]) -> Tensor:
        """Averages [(B, D)] -> features (B, D) float32: each stage's part with mean 0 and variance 1, as in the paper,
        and of that each number with mean 0 and variance 1 over the training images."""
        return (self._normalise(reduced) - self.mean) / self.scale

    def _normalise(self, reduced: Sequence[Tensor]) -> Tensor:
        parts = reduced[0].float().split(self.backbone.channels, 1)
        return torch.cat([F.layer_norm(part, part.shape[1:], eps=_EPS) for part in parts], 1)

    @torch.no_grad()
    def initialise(self, batches: BatchesOf, n_images: int, generator: torch.Generator) -> None:
        """Sets mean and scale over the training images."""
        x = torch.cat([self._normalise(reduced) for reduced in batches(spread(n_images))]).to(self.mean.device)
        self.mean.copy_(x.mean(0))
        self.scale.copy_(x.std(0, correction=0).clamp_min(_LEAST_SCALE))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) float in [0, 1], of any size -> features (B, D) float32."""
        return self.encode(self.reduce(self.backbone(self._resize(images))))

    def losses(self, features: Tensor, draws: Draws | None = None) -> dict[str, Tensor]:
        """{"loss"}: the mean squared error of features (B, D) reconstructed from any timestep.

        draws: random numbers for B samples; from torch's global ones when None.
        """
        draws = Draws.unseeded(len(features), features.device) if draws is None else draws
        timesteps = draws.integers(0, self.diffusion.n_timesteps)
        noisy = self.diffusion.add_noise(features, draws.normal(features.shape[1]), timesteps)
        return {"loss": F.mse_loss(self.denoiser(noisy, timesteps).float(), features)}

    @torch.no_grad()
    def between_steps(self, step: int, features: Tensor, epoch_steps: int, average: nn.Module) -> None:
        """Keeps the weights after the first epoch, for the scores that compare with them."""
        if step == epoch_steps and self.first_denoiser is not None:
            self.first_denoiser.load_state_dict(average.state_dict())

    @torch.no_grad()
    def score(self, features: Tensor) -> Tensor:
        """Features (B, D) -> scores (B,) float32, larger is more out of distribution."""
        kind = self.config["score"]
        if kind in ("mse", "mfsim"):
            return self._error(self.denoiser, features, kind)
        final, first = (self._error(denoiser, features) for denoiser in (self.denoiser, self.first_denoiser))
        return first - final if kind == "lr" else final / first.clamp_min(_EPS)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """images (B, 3, H, W) float in [0, 1] -> `Prediction` with scores (B,), without maps.

        Deterministic, and independent of what else is in the batch. The model stays float32; `torch.autocast` is for
        less precision.

        Raises:
            TypeError, ValueError: images of another type, shape or range; a model turned into another type.
        """
        return Prediction(self.score(self.features(self._checked(images))), None)

    def _error(self, denoiser: nn.Module, features: Tensor, kind: str = "mse") -> Tensor:
        config = self.config
        direct = config["inference"] == "direct"
        x = features[None]  # behind the noise samples, of which there are some even where there is no image
        reconstruction = self.diffusion.reconstruct(
            lambda noisy, timesteps: denoiser(noisy, timesteps[:1]).float(),  # one embedding for all
            x,
            self.noise[:, None],
            timestep=config["timestep"] if direct else _PAPER_STEPS,
            n_steps=config["n_steps"] if direct else _PAPER_STEPS,
            keep=None if direct else self.keep,
        )
        if kind == "mse":
            return (reconstruction - x).square().mean((0, 2))
        pairs = zip(*(t.split(self.backbone.channels, 2) for t in (reconstruction, x)))
        return -torch.stack([F.cosine_similarity(a, b, 2).mean(0) for a, b in pairs]).mean(0)


class VectorDenoiser(nn.Module):
    """Residual blocks over vectors: noisy (..., B, D) at timesteps (B,), or (1,) for all, -> clean (..., B, D)."""

    def __init__(self, dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, hidden)
        self.embed_timestep = TimestepEmbedding(_TIMESTEP_DIM)
        self.blocks = nn.ModuleList(VectorBlock(hidden, _TIMESTEP_DIM) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        x, t = self.embed(noisy), self.embed_timestep(timesteps)
        for block in self.blocks:
            x = block(x, t)
        return self.out(F.silu(self.norm(x)))


class VectorBlock(nn.Module):
    """x + two linear layers, each after normalisation and SiLU, with the timestep added in between."""

    def __init__(self, dim: int, timestep_dim: int) -> None:
        super().__init__()
        self.norm1, self.linear1 = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.timestep = nn.Linear(timestep_dim, dim)
        self.norm2, self.linear2 = nn.LayerNorm(dim), nn.Linear(dim, dim)
        nn.init.zeros_(self.linear2.weight)  # the block begins as the identity
        nn.init.zeros_(self.linear2.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.linear1(F.silu(self.norm1(x))) + self.timestep(t)
        return x + self.linear2(F.silu(self.norm2(y)))


def _check_arguments(arguments: dict[str, Any]) -> None:
    check = partial(expect, arguments)
    fits = is_int(arguments["n_timesteps"]) and arguments["n_timesteps"] > _PAPER_STEPS
    check("n_timesteps", fits, f"an int above {_PAPER_STEPS}")
    check_arguments(arguments, ("image_size", "depth", "n_steps", "n_samples"), ("pretrained",))
    hidden = 1 if arguments["hidden"] is None else arguments["hidden"]
    check("hidden", is_int(hidden) and hidden >= 1, "a positive int or None")
    check("score", arguments["score"] in SCORES, f"one of {', '.join(SCORES)}")
    check("inference", arguments["inference"] in INFERENCES, f"one of {', '.join(INFERENCES)}")
    most = arguments["timestep"] + 1
    check("n_steps", arguments["n_steps"] <= most, f"at most timestep + 1 ({most})")
