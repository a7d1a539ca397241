"""Fused operators for prototype-based vision models: nearest-prototype aggregation, prototype-conditioned attention
and batched Sinkhorn, on CPUs and GPUs, differentiable."""

from dpdiff_kernels.attention import ProjectedBanks, PrototypeAttention, prototype_attention
from dpdiff_kernels.backends import backends, show_config, use_backend

__all__ = [
    "ProjectedBanks",
    "PrototypeAttention",
    "backends",
    "prototype_attention",
    "show_config",
    "use_backend",
]
