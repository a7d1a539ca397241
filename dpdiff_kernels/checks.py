"""Argument checks that the operators share: one line naming the argument, what was given and what is expected."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def present(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Those that aren't None: `check_floats(x=x, **present(a=a))` where a is optional."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def check_floats(**tensors: Tensor) -> None:
    """All are tensors, floating point, of one dtype and on one device, the first one's."""
    first_name, first = None, None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: expected a torch.Tensor")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {tensor.dtype}: expected float32, float16, bfloat16 or float64")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}: expected a dense tensor")
        if first is None:
            first_name, first = name, tensor
        elif tensor.dtype != first.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}: expected {first.dtype}, as {first_name} has")
        elif tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}: expected {first.device}, where {first_name} is")


def check_shape(name: str, tensor: Tensor, *expected: tuple[int, ...]) -> None:
    """The tensor has one of the expected shapes."""
    # Shapes of another length are not compared, lest torch.export learns that a batch is not as large as a head count.
    if not any(tensor.dim() == len(shape) and tuple(tensor.shape) == shape for shape in expected):
        shapes = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(expected))
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {shapes}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: expected {', '.join(map(repr, choices))}")


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: expected a bool")


def check_int(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}: expected an int")
    if value < least:
        raise ValueError(f"{name} is {value}: expected at least {least}")


def check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}: expected a number")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}: expected a positive finite number")


def check_groups(
    groups: Tensor | None,
    active_groups: Tensor | None,
    n_prototypes: int,
    batch_shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """groups (K,) and active_groups (*batch_shape, G) come together, both int64 and on the operands' device."""
    if (groups is None) != (active_groups is None):
        given, missing = ("groups", "active_groups") if active_groups is None else ("active_groups", "groups")
        raise ValueError(f"{given} is given without {missing}: expected both or neither")
    if groups is None:
        return
    for name, tensor in (("groups", groups), ("active_groups", active_groups)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: expected a torch.Tensor")
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {tensor.dtype}: expected int64")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}: expected {device}")
    check_shape("groups", groups, (n_prototypes,))
    if tuple(active_groups.shape[:-1]) != tuple(batch_shape) or active_groups.dim() != len(batch_shape) + 1:
        raise ValueError(
            f"active_groups has shape {tuple(active_groups.shape)}: expected {(*batch_shape, 'G')}, "
            "the batch dimensions and then the active groups"
        )


def under_autocast(tensor: Tensor) -> bool:
    device = tensor.device.type  # torch.compile of 2.11 can't trace torch.amp.is_autocast_available
    return device != "meta" and torch.is_autocast_enabled(device)


def widest_under_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, the tensors in the widest of their dtypes, as torch.cdist takes them; as they are otherwise."""
    floats = [t for t in tensors if isinstance(t, Tensor) and t.dtype in FLOATS]
    if not floats or not under_autocast(floats[0]):
        return tensors
    dtype = floats[0].dtype
    for t in floats[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOATS else t for t in tensors)
