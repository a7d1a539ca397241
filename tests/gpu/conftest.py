"""The GPU kernels' tests: on a CUDA device where there is one, else on small CPU tensors in Triton's interpreter."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "cuda_only" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch):
    """NumPy has no bfloat16: the interpreter cuts off what does not fit, and its dot multiplies the bits as integers.
    GPUs round to nearest, and multiply as in float32, in which a product of two bfloat16s is exact."""
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, bfloat16, float32 = interpreter.InterpreterBuilder, interpreter.tl.bfloat16, interpreter.tl.float32
    cast_impl, create_dot = builder.cast_impl, builder.create_dot

    def cast(self, source, kind):
        if (source.dtype.scalar, kind.scalar) != (float32, bfloat16):
            return cast_impl(self, source, kind)
        rounded = torch.from_numpy(source.data.copy()).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), bfloat16)

    def dot(self, a, b, *rest):
        a, b = (cast_impl(self, t, float32) if t.dtype.scalar == bfloat16 else t for t in (a, b))
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(builder, "cast_impl", cast)
    monkeypatch.setattr(builder, "create_dot", dot)


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.importorskip("triton")
    return torch.device("cpu")
