"""A bag of features, three ways: learn a codebook, read it by attention, and match two images by optimal transport.

python examples/operators.py
"""

import torch

import dpdiff_kernels as dk


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(20, 64, generator=generator)
    labels = torch.randint(20, (4, 784), generator=generator)
    tokens = centres[labels] + 0.5 * torch.randn(4, 784, 64, generator=generator)  # four images of 784 tokens

    codebook = dk.kmeans(tokens, 20, generator=generator)
    statistics = dk.prototype_statistics(tokens, codebook)
    print(f"k-means: {int((statistics.counts > 0).sum())} of 20 prototypes in use, inertia {statistics.inertia:.0f}")

    denoised = dk.aggregate_nearest(tokens, codebook, metric="l2").values
    before, after = ((x - centres[labels]).square().mean().item() for x in (tokens, denoised))
    print(f"nearest prototype: mean squared error {before:.3f} -> {after:.3f}")

    query = tokens.unsqueeze(1)  # one head
    blended = dk.prototype_attention(query, codebook[None], codebook[None]).squeeze(1)
    print(f"attention to the prototypes: mean squared error {(blended - centres[labels]).square().mean():.3f}")

    x, y = tokens[0], tokens[1]
    scale = torch.cdist(x, y).square().mean()
    transport = dk.sinkhorn(torch.cdist(x, y).square() / scale, eps=0.05, n_iters=1000, tol=1e-3)
    same = (labels[0][:, None] == labels[1]).float()
    print(f"transport: {(transport.plan * same).sum():.0%} of the mass stays within its class,")
    print(f"  {transport.n_iters} iterations, marginals off by {transport.error:.1e}")


if __name__ == "__main__":
    main()
