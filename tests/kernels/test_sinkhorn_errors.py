"""What sinkhorn and sinkhorn_points say of wrong arguments."""

import math

import pytest
import torch

import dpdiff_kernels as dk


def test_a_matrix_on_another_device():
    transport = dk.sinkhorn_points(torch.rand(3, 2), torch.rand(4, 2))
    with pytest.raises(ValueError, match="v is on meta: expected cpu, where the points are"):
        transport.apply(torch.rand(4, 1, device="meta"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cost": torch.rand(3)}, ValueError, r"cost has shape \(3,\): expected \(..., N, M\)"),
        ({"cost": [[1.0]]}, TypeError, "cost is a list"),
        ({"cost": None}, TypeError, "cost is a NoneType: expected a torch.Tensor"),
        ({"cost": torch.ones(2, 2, dtype=torch.int64)}, TypeError, "cost has dtype torch.int64"),
        ({"a": torch.rand(4)}, ValueError, r"a has shape \(4,\): expected \(5,\)"),
        ({"b": torch.rand(5)}, ValueError, r"b has shape \(5,\): expected \(4,\)"),
        ({"b": torch.full((4,), 0.5)}, ValueError, "a sums to 1 and b to 2 .problem 0 of 1.: expected equal masses"),
        ({"a": torch.tensor([-0.2, 0.3, 0.3, 0.3, 0.3])}, ValueError, "a has a weight of -0.2: expected none below 0"),
        ({"eps": 0}, ValueError, "eps is 0: expected a positive finite number"),
        ({"eps": math.nan}, ValueError, "eps is nan"),
        ({"eps": "1"}, TypeError, "eps is '1'"),
        ({"n_iters": 0}, ValueError, "n_iters is 0: expected at least 1"),
        ({"n_iters": 2.5}, TypeError, "n_iters is 2.5: expected an int"),
        ({"tol": -1e-3}, ValueError, "tol is -0.001"),
        ({"tau_a": 0.0}, ValueError, "tau_a is 0.0"),
        ({"tau_b": -1.0}, ValueError, "tau_b is -1.0"),
        ({"return_plan": "no"}, TypeError, "return_plan is 'no': expected a bool"),
        ({"cost": torch.eye(4).to_sparse()}, TypeError, "cost has layout torch.sparse_coo: expected a dense tensor"),
        ({"backend": "fast"}, ValueError, "backend is 'fast'"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        dk.sinkhorn(**({"cost": torch.rand(5, 4)} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": None}, TypeError, "x is a NoneType: expected a torch.Tensor"),
        ({"y": None}, TypeError, "y is a NoneType"),
        ({"x": torch.rand(3)}, ValueError, r"x has shape \(3,\)"),
        ({"y": torch.rand(4, 2)}, ValueError, r"y has shape \(4, 2\): expected \('M', 3\)"),
        ({"y": torch.rand(2, 4, 3)}, ValueError, "y has shape"),
        ({"y": torch.rand(4, 3).half()}, TypeError, "y has dtype torch.float16"),
        ({"metric": "dot"}, ValueError, "metric is 'dot': expected 'l2', 'cosine'"),
        ({"a": torch.ones(5)}, ValueError, "a sums to 5 and b to 1"),
        ({"eps": -1.0}, ValueError, "eps is -1.0"),
    ],
)
def test_wrong_arguments_of_points(arguments, error, message):
    with pytest.raises(error, match=message):
        dk.sinkhorn_points(**({"x": torch.rand(5, 3), "y": torch.rand(4, 3)} | arguments))
    u = dk.sinkhorn_points(torch.rand(2, 5, 3), torch.rand(2, 4, 3))
    with pytest.raises(ValueError, match=r"v has shape \(4, 1\): expected \(2, 4, 'C'\)"):
        u.apply(torch.rand(4, 1))
    with pytest.raises(TypeError, match="v is a NoneType"):
        u.apply(None)
