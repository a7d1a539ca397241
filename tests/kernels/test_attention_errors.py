"""What prototype_attention says of wrong arguments."""

import pytest
import torch
from attention_problems import inputs

import dpdiff_kernels as dk

WRONG = {
    "query is a list": (TypeError, "query is a list", {"query": [1]}),
    "no query": (TypeError, "query is a NoneType: expected a torch.Tensor", {"query": None}),
    "no keys": (TypeError, "local_key is a NoneType", {"local_key": None}),
    "no values": (TypeError, "local_value is a NoneType", {"local_value": None}),
    "integers": (TypeError, "local_key has dtype torch.int64", {"local_key": torch.ones(2, 11, 16, dtype=torch.int64)}),
    "two dtypes": (
        TypeError,
        "gate has dtype torch.bfloat16: expected torch.float32",
        {"gate": torch.ones(1).bfloat16()},
    ),
    "flat query": (ValueError, r"query has shape \(17, 16\)", {"query": torch.ones(17, 16)}),
    "channels": (ValueError, r"local_key has shape \(2, 11, 8\)", {"local_key": torch.ones(2, 11, 8)}),
    "heads": (ValueError, r"local_key has shape \(1, 11, 16\)", {"local_key": torch.ones(1, 11, 16)}),
    "batch": (ValueError, r"global_key has shape \(2, 2, 5, 16\)", {"global_key": torch.ones(2, 2, 5, 16)}),
    "values": (ValueError, r"local_value has shape \(2, 10, 16\)", {"local_value": torch.ones(2, 10, 16)}),
    "half a bank": (ValueError, "global_key is given without global_value", {"global_value": None}),
    "other half": (ValueError, "global_value is given without global_key", {"global_key": None}),
    "lone gate": (ValueError, "gate is given without a global bank", {"global_key": None, "global_value": None}),
    "gate": (ValueError, r"gate has shape \(3, 17\): expected one that broadcasts", {"gate": torch.ones(3, 17)}),
    "scale": (TypeError, "scale is '1'", {"scale": "1"}),
    "infinite scale": (ValueError, "scale is inf", {"scale": float("inf")}),
    "half a route": (
        ValueError,
        "groups is given without active_groups",
        {"groups": torch.zeros(11, dtype=torch.int64)},
    ),
    "short groups": (
        ValueError,
        r"groups has shape \(10,\)",
        {"groups": torch.zeros(10, dtype=torch.int64), "active_groups": torch.zeros(3, 1, dtype=torch.int64)},
    ),
    "active groups": (
        ValueError,
        r"active_groups has shape \(2, 1\)",
        {"groups": torch.zeros(11, dtype=torch.int64), "active_groups": torch.zeros(2, 1, dtype=torch.int64)},
    ),
    "float groups": (TypeError, "groups has dtype", {"groups": torch.zeros(11), "active_groups": torch.zeros(3, 1)}),
    "backend": (ValueError, "backend is 'fast'", {"backend": "fast"}),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    error, message, changes = WRONG[case]
    with pytest.raises(error, match=message):
        dk.prototype_attention(**{**inputs(), **changes})


def test_nothing_to_attend_to_is_an_error(backend):
    tensors = inputs(m_global=None)
    active = torch.tensor([[0, 1], [-1, 5], [1, 1]])
    with pytest.raises(ValueError, match="active_groups"):
        dk.prototype_attention(
            **tensors, groups=torch.zeros(11, dtype=torch.int64), active_groups=active, backend=backend
        )
    for m_global in (None, 0):
        with pytest.raises(ValueError, match="local_key has no prototypes"):
            dk.prototype_attention(**inputs(m=0, m_global=m_global), backend=backend)


def test_mixed_devices():
    with pytest.raises(ValueError, match="local_value is on meta"):
        dk.prototype_attention(**{**inputs(), "local_value": torch.ones(2, 11, 16, device="meta")})
