"""What nearest_prototype, aggregate_nearest and prototype_statistics say of wrong arguments."""

import pytest
import torch
from cpu_backends import needs_cpp

import dpdiff_kernels as dk


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "tokens is a list", dict(tokens=[[1.0]])),
        (
            TypeError,
            "prototypes has dtype torch.float16: expected torch.float32",
            dict(prototypes=torch.ones(3, 4).half()),
        ),
        (TypeError, "tokens has dtype torch.int64", dict(tokens=torch.ones(2, 4, dtype=torch.int64))),
        (TypeError, "tokens is a NoneType: expected a torch.Tensor", dict(tokens=None)),
        (TypeError, "prototypes is a NoneType", dict(prototypes=None)),
        (TypeError, "k is 1.5", dict(k=1.5)),
        (ValueError, r"tokens has shape \(4,\): expected \(..., N, D\)", dict(tokens=torch.ones(4))),
        (ValueError, r"prototypes has shape \(3, 5\): expected \('K', 4\)", dict(prototypes=torch.ones(3, 5))),
        (ValueError, r"prototypes has shape \(4,\): expected \('K', 4\)", dict(prototypes=torch.ones(4))),
        (
            ValueError,
            r"prototypes has shape \(5, 3, 4\): expected \('K', 4\) or \(2, 'K', 4\)",
            dict(tokens=torch.ones(2, 6, 4), prototypes=torch.ones(5, 3, 4)),
        ),
        (ValueError, "k is 4: expected at most the number of prototypes, 3", dict(k=4)),
        (ValueError, "k is 0: expected at least 1", dict(k=0)),
        (ValueError, "metric is 'euclidean': expected 'cosine', 'dot', 'l2'", dict(metric="euclidean")),
        (ValueError, "groups is given without active_groups", dict(groups=torch.zeros(3, dtype=torch.int64))),
        (ValueError, "k is 1: expected at most the number of prototypes, 0", dict(prototypes=torch.ones(0, 4))),
    ],
)
def test_errors_name_the_argument(error, message, arguments):
    arguments = dict(tokens=torch.ones(2, 4), prototypes=torch.ones(3, 4)) | arguments
    for function in (dk.nearest_prototype, dk.aggregate_nearest):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_other_errors():
    with pytest.raises(ValueError, match="temperature is 0: expected a positive finite number"):
        dk.aggregate_nearest(torch.ones(2, 4), torch.ones(3, 4), temperature=0)
    with pytest.raises(ValueError, match=r"weights has shape \(3,\): expected \(2,\)"):
        dk.prototype_statistics(torch.ones(2, 4), torch.ones(3, 4), weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"prototypes has shape \(2, 3, 4\): expected \('K', 4\)"):
        dk.prototype_statistics(torch.ones(2, 2, 4), torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match="with_inertia is 1: expected a bool"):
        dk.prototype_statistics(torch.ones(2, 4), torch.ones(3, 4), with_inertia=1)
    with pytest.raises(TypeError, match="prototypes is a NoneType"):
        dk.prototype_statistics(torch.ones(2, 4), None)
    for d in (4, 0):
        with pytest.raises(ValueError, match="prototypes is empty: expected at least 1 prototype for the tokens given"):
            dk.prototype_statistics(torch.ones(2, d), torch.ones(0, d))


@needs_cpp
def test_the_native_operator_refuses_a_search_of_nothing():
    with pytest.raises(RuntimeError, match="k is 1 of 0 prototypes"):
        torch.ops.dpdiff.prototype_statistics(torch.ones(2, 0), torch.ones(0, 0), "l2", None, True)
