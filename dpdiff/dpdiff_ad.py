"""DPDiff-AD: dual-prototype-conditioned diffusion for multi-class anomaly detection."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from dpdiff.backbones import DEFAULT_BACKBONE, Backbone
from dpdiff.calibration import NormalErrors
from dpdiff.denoiser import Denoiser
from dpdiff.detector import BatchesOf, Detector, Prediction, check_arguments, expect, is_int, spread
from dpdiff.diffusion import Diffusion
from dpdiff.draws import Draws
from dpdiff.prototypes import GlobalPrototypes, LocalPrototypes
from dpdiff.tokens import Tokenizer, places

_TOKENS_PER_PROTOTYPE = 256  # on which k-means of local prototypes runs, at most
_IMAGES_PER_PROTOTYPE = 16
_EPOCHS = 5  # of training, where there are many images
_MAP_REDUCTION = 2  # anomaly maps are blurred and scored at half the image's side


class DPDiffAD(Detector):
    """One detector for many product categories, trained on normal images only and without category labels.

    A frozen backbone turns an image into tokens; local prototypes (nearest-prototype aggregation) say what normal
    structure each token is closest to; global prototypes choose the few groups of local ones that an image needs,
    share the training images out by optimal transport, and by it hold reconstructions to the geometry of normal
    images; a diffusion model, conditioned on both by prototype attention, reconstructs the tokens. What it can't
    reconstruct, and what is far from every local prototype, is anomalous. The abstract of "DPDiff-AD" fixes these
    parts; what it leaves open is chosen here.

    Accuracy needs prototypes for every kind of image, so the bank grows with the categories; the cost of an image
    doesn't, for it searches and attends to `route` groups of local prototypes only.

    Train with `dpdiff.training.train` or the command `dpdiff train`, which call `initialise` and `losses`.

    Args:
        backbone, layers, backbone_weights, pretrained: see `Backbone`.
        image_size: side in pixels to which images are resized.
        stride: of the layer whose grid the tokens lie on; the finest when None. See `Tokenizer`.
        max_channels: channels per layer; what has more is projected on its principal components.
        neighbourhood: side of the window in which features are averaged.
        patch_size: side of the square of tokens that the denoiser takes as one; what comes closest to a stride of 16
            when None.
        n_global: prototypes of whole images. `suggest` tells how many a data set needs.
        n_local: prototypes of tokens in the group of each global one.
        route: groups of local prototypes that an image searches and attends to, or "all".
        k: nearest local prototypes blended into a token's condition; temperature: of their softmax, on squared
            distances per channel.
        dim, depth, num_heads: of the denoiser. dim is a multiple of num_heads.
        n_timesteps: of the diffusion. min_timestep: the least that training draws: at lower ones, noisy tokens show
            nearly everything, and copying them, defects included, is all that there is to learn.
        timestep: to which inference noises the tokens; n_steps: DDIM steps back from there; n_samples: noise samples
            over which the map is averaged.
        local_weight: share of the distance to the local prototypes in the anomaly map, from 0 to 1; the rest is the
            reconstruction's. Both are in deviations of normal images (`NormalErrors`), and so are maps and scores.
        ot_weight: of the transport losses beside the reconstruction's. At 0, transport plays no part in clustering the
            training images either.
        condition, prototype_attention, diffusion: False leaves out the local condition, the attention to both banks, or
            the noise, and tokens are reconstructed from themselves.

    Raises:
        ValueError: an argument out of its range; unknown backbone or weights that don't fit it.
        OSError: pretrained weights can't be had.
    """

    TRAINING: ClassVar = {"max_steps": 300, "batch_size": 16, "lr": 2e-3, "weight_decay": 1e-4}

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        layers: Sequence[int] | None = None,
        backbone_weights: str | None = None,
        pretrained: bool = True,
        image_size: int = 256,
        stride: int | None = None,
        max_channels: int = 128,
        neighbourhood: int = 1,
        patch_size: int | None = None,
        n_global: int = 64,
        n_local: int = 256,
        route: int | str = 4,
        k: int = 8,
        temperature: float = 0.5,
        dim: int = 192,
        depth: int = 2,
        num_heads: int = 3,
        n_timesteps: int = 1000,
        min_timestep: int = 300,
        timestep: int = 600,
        n_steps: int = 1,
        n_samples: int = 1,
        local_weight: float = 0.25,
        ot_weight: float = 0.1,
        condition: bool = True,
        prototype_attention: bool = True,
        diffusion: bool = True,
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
        if patch_size is None:
            self.config["patch_size"] = patch_size = max(1, round(16 / self.tokenizer.stride))
        self.global_prototypes = GlobalPrototypes(n_global, token_dim)
        self.register_buffer("places", places(self.tokenizer.grid), persistent=False)
        n_places = self.places.shape[1]
        self.local_prototypes = LocalPrototypes(n_global, n_local, token_dim, n_places, k, temperature)
        options = {"condition": condition, "prototype_attention": prototype_attention}
        self.denoiser = Denoiser(token_dim, self.tokenizer.grid, patch_size, dim, depth, num_heads, **options)
        self.diffusion = Diffusion(n_timesteps) if diffusion else Diffusion(n_timesteps, "linear", betas=(0.0, 0.0))
        # The same noise for every image: a score depends on the image alone, not on its batch or on a seed.
        noise = torch.randn(n_samples, n_tokens, token_dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", noise, persistent=False)
        self.normal_errors = NormalErrors(2, n_global * n_local)

    @classmethod
    def suggest(cls, n_images: int) -> dict[str, Any]:
        """Options for a training set of `n_images`: a global prototype for every 16 of them, from 16 to 2,048."""
        return {"n_global": min(max(16, n_images // _IMAGES_PER_PROTOTYPE), 2_048)}

    @classmethod
    def training_options(cls, n_images: int) -> dict[str, Any]:
        """Of many images each is seen five times, as long as that takes at most 2,000 steps."""
        steps = _EPOCHS * n_images // cls.TRAINING["batch_size"]
        return cls.TRAINING | {"max_steps": min(max(steps, cls.TRAINING["max_steps"]), 2_000)}

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) float in [0, 1], of any size -> tokens (B, N, D)."""
        return self.tokenizer(self.backbone(self._resize(images)))

    @torch.no_grad()
    def encode(self, reduced: Sequence[Tensor]) -> Tensor:
        """The backbone's maps -> tokens (B, N, D)."""
        return self.tokenizer(reduced)

    @torch.no_grad()
    def initialise(self, batches: BatchesOf, n_images: int, generator: torch.Generator) -> None:
        """Sets the tokenizer's statistics, the global prototypes, and the local ones of each by k-means."""
        self.tokenizer.fit(batches(spread(n_images)))
        # Filled in place: kept one by one, small results among large ones would tear up the heap, by gigabytes.
        descriptors = self.global_prototypes.bank.new_empty(n_images, self.tokenizer.dim)
        done = 0
        for maps in batches(range(n_images)):
            means = self.encode(maps).mean(1)
            descriptors[done : done + len(means)] = means
            done += len(means)
        group = self.global_prototypes.initialise(descriptors, self.config["ot_weight"] > 0, generator)
        members = [(group == g).nonzero().flatten().tolist() for g in range(self.config["n_global"])]
        for own, prototype in zip(members, self.global_prototypes.bank):
            if not own:  # a group that got no image learns from the one that is nearest to it
                own.append(F.cosine_similarity(descriptors, prototype[None]).argmax().item())
        # Group after group, so that the tokens of one alone are in memory.
        images = (image for maps in batches(list(chain(*members))) for image in self.encode(maps))
        for g, own in enumerate(members):
            quota = max(1, _TOKENS_PER_PROTOTYPE * self.config["n_local"] // len(own))  # tokens of an image
            tokens, where = [], []
            for image in islice(images, len(own)):
                chosen = torch.randperm(len(image), generator=generator)[:quota]
                tokens.append(image[chosen])
                where.append(self.places[chosen])
            self.local_prototypes.initialise(g, torch.cat(tokens), torch.cat(where), generator)

    def losses(self, tokens: Tensor, draws: Draws | None = None) -> dict[str, Tensor]:
        """Training losses of clean tokens (B, N, D): "loss", what to minimise, and its parts, all scalars.

        draws: random numbers for B samples; from torch's global ones when None.
        """
        config = self.config
        draws = Draws.unseeded(len(tokens), tokens.device) if draws is None else draws
        timesteps = draws.integers(config["min_timestep"], self.diffusion.n_timesteps)
        noisy = self.diffusion.add_noise(tokens, draws.normal(*tokens.shape[1:]), timesteps)
        active_groups = self._route(tokens)
        condition, _, _ = self.local_prototypes(tokens, active_groups)
        reconstruction = self.denoiser(noisy, timesteps, condition, self._banks(active_groups)).float()
        cosine = self.tokenizer.cosine_distances(tokens, reconstruction).mean()
        mse = F.mse_loss(reconstruction, tokens)
        transport, swapped = self.global_prototypes(tokens.mean(1), reconstruction.mean(1))
        loss = mse + cosine + config["ot_weight"] * (transport + swapped)
        return {"loss": loss, "cosine": cosine, "mse": mse, "transport": transport, "swapped": swapped}

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Learns from tokens (B, N, D) of normal images which errors are normal: the unit of maps and scores."""
        self.normal_errors.fit(self._errors(tokens) for tokens in batches)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """images (B, 3, H, W) float in [0, 1] -> `Prediction` with scores (B,) and maps (B, H, W).

        Deterministic, and independent of what else is in the batch. The model stays float32; `torch.autocast` is for
        less precision.

        Raises:
            TypeError, ValueError: images of another type, shape or range; a model turned into another type.
        """
        tokens = self.tokenize(self._checked(images)).float()
        maps = self._map(tokens).unflatten(-1, self.tokenizer.grid).unsqueeze(1)
        size = [max(1, self.image_size // _MAP_REDUCTION)] * 2
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        # 2 pixels of a 256-pixel image for scores, that small defects count; 8 for maps.
        flat = _blur(maps, sigma=size[0] / 128).flatten(1)
        scores = flat.topk(max(1, flat.shape[1] // 100), dim=1).values.mean(1)
        maps = _blur(maps, sigma=size[0] / 32)
        maps = F.interpolate(maps, size=images.shape[-2:], mode="bilinear", align_corners=False)
        return Prediction(scores.float(), maps.squeeze(1).float())

    def _map(self, tokens: Tensor) -> Tensor:
        """The anomaly map (B, N)."""
        reconstruction, local = self.normal_errors(*self._errors(tokens))
        share = self.config["local_weight"]
        return (1 - share) * reconstruction + share * local

    def _errors(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """1 - cosine similarity of tokens to their reconstructions and to the nearest local prototypes (2, B, N), and
        which prototypes these are (B, N)."""
        config = self.config
        active_groups = self._route(tokens)
        condition, distances, nearest = self.local_prototypes(tokens, active_groups)
        banks = self._banks(active_groups)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.denoiser(noisy, timesteps, condition, banks).float()

        errors = []
        for noise in self.noise:
            steps = (config["timestep"], config["n_steps"], config["min_timestep"])
            reconstruction = self.diffusion.reconstruct(predict, tokens, noise.expand_as(tokens), *steps)
            errors.append(self.tokenizer.cosine_distances(tokens, reconstruction))
        # Of unit vectors, |x - p|^2 / 2 = 1 - cosine.
        return torch.stack([torch.stack(errors).mean(0), distances / 2]), nearest

    def _route(self, tokens: Tensor) -> Tensor | None:
        """The groups (B, G) of local prototypes that images of these tokens (B, N, D) use; None for all."""
        route, n_global = self.config["route"], self.config["n_global"]
        if route == "all" or route >= n_global:
            return None
        return self.global_prototypes.route(tokens.mean(1), route)

    def _banks(self, active_groups: Tensor | None) -> list:
        local_bank, local_places = self.local_prototypes.active(active_groups)
        return self.denoiser.project_banks(local_bank, local_places, self.global_prototypes.bank)


def _check_arguments(arguments: dict[str, Any]) -> None:
    check = partial(expect, arguments)
    sizes = ["image_size", "max_channels", "n_local", "n_global", "k", "dim", "depth", "num_heads", "n_steps"]
    sizes += ["n_samples", "n_timesteps", *(["patch_size"] if arguments["patch_size"] is not None else [])]
    check_arguments(arguments, sizes, ("pretrained", "condition", "prototype_attention", "diffusion"))
    n_local, num_heads = arguments["n_local"], arguments["num_heads"]
    check("dim", arguments["dim"] % num_heads == 0, f"a multiple of num_heads ({num_heads})")
    check("k", arguments["k"] <= n_local, f"at most n_local ({n_local})")
    route = arguments["route"]
    check("route", route == "all" or (is_int(route) and route >= 1), 'a positive int or "all"')
    temperature, ot_weight, local_weight = (arguments[name] for name in ("temperature", "ot_weight", "local_weight"))
    check("temperature", _is_finite(temperature) and temperature > 0, "a positive finite number")
    check("ot_weight", _is_finite(ot_weight) and ot_weight >= 0, "a finite number, 0 or more")
    check("local_weight", _is_finite(local_weight) and 0 <= local_weight <= 1, "0 to 1")
    timestep, least = arguments["timestep"], arguments["min_timestep"]
    check("min_timestep", is_int(least) and 0 <= least <= timestep, f"0 to timestep ({timestep})")
    most = timestep - least + 1
    check("n_steps", arguments["n_steps"] <= most, f"at most timestep - min_timestep + 1 ({most})")
    check("n_steps", arguments["diffusion"] or arguments["n_steps"] == 1, "1 without diffusion")


def _is_finite(value: Any) -> bool:
    return (is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _blur(maps: Tensor, sigma: float) -> Tensor:
    size = 2 * round(3 * sigma) + 1
    return TF.gaussian_blur(maps, [size, size], [sigma, sigma])
