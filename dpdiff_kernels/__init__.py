"""Fused operators for prototype-based vision models: nearest-prototype aggregation, prototype-conditioned attention
and batched Sinkhorn, on CPUs and GPUs, differentiable."""

from dpdiff_kernels.attention import ProjectedBanks, PrototypeAttention, prototype_attention
from dpdiff_kernels.backends import backends, show_config, use_backend
from dpdiff_kernels.kmeans import kmeans
from dpdiff_kernels.nearest import aggregate_nearest, nearest_prototype, prototype_statistics
from dpdiff_kernels.sinkhorn import sinkhorn, sinkhorn_points

__all__ = [
    "ProjectedBanks",
    "PrototypeAttention",
    "aggregate_nearest",
    "backends",
    "kmeans",
    "nearest_prototype",
    "prototype_attention",
    "prototype_statistics",
    "show_config",
    "sinkhorn",
    "sinkhorn_points",
    "use_backend",
]
