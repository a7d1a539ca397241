"""Models as safetensors files: weights, and as metadata the class and its configuration. Nothing is unpickled."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from dpdiff._files import atomic_write
from dpdiff._version import version_of

_KEY = "dpdiff"


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes a model's weights, backbone included, and configuration to one safetensors file, whole or not at all.

    A compiled model is saved as what was compiled. Raises TypeError for what `load` couldn't make again.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if type(model) not in _classes().values():
        raise TypeError(f"model is a {type(model).__name__}: expected one of {', '.join(_classes())}")
    header = {"model": type(model).__name__, "config": model.config, "version": version_of("dpdiff", "unknown")}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as tmp:
        tmp.write_bytes(to_bytes(tensors, metadata={_KEY: json.dumps(header)}))


def load(path: str | os.PathLike, device: torch.device | str = "cpu") -> nn.Module:
    """Reads a model that `save` wrote, in evaluation mode, on `device`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, damaged, or not a dpdiff model.
    """
    header = read_header(path)
    classes = _classes()
    if header["model"] not in classes:
        raise ValueError(f"weights file {path} holds a {header['model']!r}: expected one of {', '.join(classes)}")
    with safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    # The file has the backbone's weights too, so that none are loaded from elsewhere, whatever its header says.
    config = header["config"] | {"pretrained": False, "backbone_weights": None}
    try:
        model = classes[header["model"]](**config)
        _check_tensors(tensors, model.state_dict())
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"weights file {path}, written by dpdiff {header.get('version')}, does not fit this version: {reason}"
        ) from error
    return model.to(device).eval()


def read_header(path: str | os.PathLike) -> dict:
    """The class, configuration and version in a weights file, without reading its weights. Raises as `load` does."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: expected a weights file such as {path / 'model.safetensors'}")
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[_KEY])
        if isinstance(header["model"], str) and isinstance(header["config"], dict):
            return header
    except SafetensorError as error:
        raise ValueError(f"weights file {path} is damaged or no safetensors file: {error}") from error
    except (KeyError, TypeError, ValueError):  # no metadata, those of others, or no JSON
        pass
    raise ValueError(f"weights file {path} was not written by dpdiff.save")


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names one tensor that doesn't fit, where `load_state_dict` lists them all."""
    for name in expected | tensors:
        given, needed = (tuple(those[name].shape) if name in those else "none" for those in (tensors, expected))
        if given != needed:
            raise ValueError(f"the shape of tensor {name} is {given}: expected {needed}")


def _classes() -> dict[str, type[nn.Module]]:
    from dpdiff.dlsr import DLSR
    from dpdiff.dpdiff_ad import DPDiffAD

    return {"DPDiffAD": DPDiffAD, "DLSR": DLSR}
