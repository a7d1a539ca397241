"""Which implementation runs: choice, errors, the warning without the native library, and the library's build."""

import importlib
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from cpu_backends import CAPABILITIES, needs_cpp

import dpdiff_kernels as dk

module = importlib.import_module("dpdiff_kernels.backends")  # the package's attribute of this name is the function
TOKENS, PROTOTYPES = torch.randn(7, 5), torch.randn(3, 5)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_every_backend_says_whether_and_why():
    found = dk.backends()
    assert list(found) == ["reference", "cpp", "triton", "cuda"]
    assert found["reference"].available
    assert all(backend.reason for backend in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_triton_is_available_in_its_interpreter_only():
    code = "import dpdiff_kernels as dk; print(dk.backends()['triton'])"
    assert "available=False" in run(code, TRITON_INTERPRET="0").stdout
    assert "no CUDA device" in run(code, TRITON_INTERPRET="0").stdout
    pytest.importorskip("triton")
    assert "available=True" in run(code, TRITON_INTERPRET="1").stdout


def test_the_interpreter_is_never_chosen_by_itself():
    assert module.select(None, ("triton", "cpp", "reference"), TOKENS) != "triton"


@pytest.mark.skipif(os.environ.get("DPDIFF_BUILD_EXTENSION") == "0", reason="a pure-Python install was asked for")
def test_the_native_library_is_built():
    assert dk.backends()["cpp"].available, dk.backends()["cpp"].reason


def test_order_of_the_choices(monkeypatch):
    def select(backend=None):
        return module.select(backend, ("cpp", "reference"), TOKENS)

    assert select() == "cpp"
    monkeypatch.setenv("DPDIFF_BACKEND", "reference")
    assert select() == "reference"
    with dk.use_backend("auto"):
        assert select() == "cpp"
        with dk.use_backend("reference"):
            assert select() == "reference"
            assert select("cpp") == "cpp"
        assert select() == "cpp"


def test_use_backend_is_undone_by_an_exception():
    with pytest.raises(KeyError), dk.use_backend("reference"):
        raise KeyError
    assert module.select(None, ("cpp", "reference"), TOKENS) == "cpp"


def test_blocks_of_threads_that_end_in_another_order():
    first, second = dk.use_backend("reference"), dk.use_backend("cpp")
    third = dk.use_backend("reference")
    chosen = []
    for step in (first.__enter__, second.__enter__, third.__enter__, lambda: first.__exit__(None, None, None)):
        step()
        chosen.append(module.select(None, ("cpp", "reference"), TOKENS))
    third.__exit__(None, None, None)
    chosen.append(module.select(None, ("cpp", "reference"), TOKENS))
    second.__exit__(None, None, None)
    assert chosen == ["reference", "cpp", "reference", "reference", "cpp"]
    assert not module._blocks


def test_float64_runs_on_the_reference():
    assert module.select(None, ("cpp", "reference"), TOKENS.double()) == "reference"
    with pytest.raises(ValueError, match=r"backend is 'cpp'.*float64"):
        module.select("cpp", ("cpp", "reference"), TOKENS.double())


class Properties(NamedTuple):
    """Of a GPU."""

    major: int
    minor: int


class TestCapabilities:
    """Of GPUs, on any machine: of a call's tensors, only device and dtype are looked at."""

    OPERATOR = ("cuda", "triton", "cpp", "reference")

    @pytest.fixture
    def on_gpu(self, monkeypatch):
        """Tensors on a GPU of the given capability, which the driver is asked for at most once."""
        monkeypatch.setattr(module, "_INTERPRETED", False)
        monkeypatch.setattr(module, "_warned", False)
        for name in ("cuda", "triton"):
            monkeypatch.setitem(module._FOUND, name, module.Backend(True, "pretended"))

        def tensor(major, minor, dtype=torch.float32):
            asked = []

            def properties(index):
                asked.append(index)
                assert asked == [1]
                return Properties(major, minor)

            monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
            module._known_capability.cache_clear()
            return SimpleNamespace(device=torch.device("cuda:1"), dtype=dtype)

        yield tensor
        module._known_capability.cache_clear()

    def test_auto_falls_back_to_the_reference_below_8(self, on_gpu):
        old = on_gpu(7, 5)
        with pytest.warns(
            RuntimeWarning, match=r"reference implementation: cuda:1 has compute capability 7\.5"
        ) as caught:
            assert [module.select(None, self.OPERATOR, old) for _ in range(2)] == ["reference"] * 2
        assert len(caught) == 1

    @pytest.mark.parametrize("name", ["triton", "cuda"])
    def test_an_explicit_choice_is_an_error_below_8(self, on_gpu, name):
        old = on_gpu(7, 0)
        message = rf"{name}'.*\(cuda:1 has compute capability 7\.0, below 8\.0\): expected one of reference$"
        with pytest.raises(ValueError, match=f"^backend is '{message}"):
            module.select(name, self.OPERATOR, old)
        with dk.use_backend(name), pytest.raises(ValueError, match=message):
            module.select(None, self.OPERATOR, old)
        assert module.select("reference", self.OPERATOR, old) == "reference"

    @pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 1)])
    def test_from_8_on_the_fastest_runs(self, on_gpu, capability):
        new = on_gpu(*capability)
        assert module.select(None, self.OPERATOR, new) == "cuda"
        assert module.select("triton", self.OPERATOR, new) == "triton"

    @pytest.mark.filterwarnings("error")
    def test_is_not_asked_for_in_vain(self, on_gpu, monkeypatch):
        old = on_gpu(7, 5)
        monkeypatch.setattr(torch.cuda, "get_device_properties", None)
        assert (
            module.select(None, self.OPERATOR, SimpleNamespace(device=old.device, dtype=torch.float64)) == "reference"
        )
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert module.select("triton", self.OPERATOR, old) == "triton"

    @pytest.mark.filterwarnings("error")
    def test_compiled_code_knows_it(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties(7, 5))
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, backend="eager")
        def shortcoming(x):
            return x + len(module._shortcoming(torch.device("cuda:1")))

        assert shortcoming(torch.zeros(1)) == len("cuda:1 has compute capability 7.5, below 8.0")


@pytest.mark.parametrize("name", ["fastest", "CPP", ""])
def test_unknown_backends(name, monkeypatch):
    with pytest.raises(ValueError, match="expected auto, reference, cpp, triton, cuda"):
        dk.nearest_prototype(TOKENS, PROTOTYPES, backend=name)
    with pytest.raises(ValueError, match="use_backend's name"), dk.use_backend(name):
        pass
    monkeypatch.setenv("DPDIFF_BACKEND", name)
    with pytest.raises(ValueError, match="DPDIFF_BACKEND"):
        dk.nearest_prototype(TOKENS, PROTOTYPES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_unavailable_backend_says_why():
    with pytest.raises(ValueError, match=r"cuda.*no CUDA device"):
        dk.nearest_prototype(TOKENS, PROTOTYPES, backend="cuda")


def test_compiled_code_follows_the_choice():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def which(x):
        return x + (1 if module.select(None, ("triton", "cpp", "reference"), x) == "cpp" else 2)

    assert which(torch.zeros(1)) == 1
    with dk.use_backend("reference"):
        assert which(torch.zeros(1)) == 2
    assert which(torch.zeros(1)) == 1


def test_show_config_fits_on_a_screen(capsys):
    text = dk.show_config()
    assert capsys.readouterr().out == text + "\n"
    for word in ("dpdiff", "torch", "python", *dk.backends()):
        assert word in text
    assert len(text.splitlines()) < 25


def test_one_warning_without_the_library(monkeypatch):
    monkeypatch.setattr(module, "_LIBRARY", module.Backend(False, "the native library was not built"))
    monkeypatch.setattr(module, "_warned", False)
    with pytest.warns(RuntimeWarning, match="pip install") as caught:
        first = module.select(None, ("cpp", "reference"), TOKENS)
        second = module.select(None, ("cpp", "reference"), TOKENS)
    assert first == second == "reference" and len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module._warned = False
        assert module.select("reference", ("cpp", "reference"), TOKENS) == "reference"


def test_everything_imports_and_runs_without_the_library():
    code = """
import pathlib, torch, warnings
real = pathlib.Path.glob
pathlib.Path.glob = lambda self, pattern: iter(()) if pattern.startswith("_C") else real(self, pattern)
import dpdiff_kernels as dk
assert not dk.backends()["cpp"].available
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x, p = torch.randn(2, 6, 4), torch.randn(5, 4)
    dk.nearest_prototype(x, p); dk.aggregate_nearest(x, p); dk.prototype_statistics(x, p); dk.kmeans(x, 3)
    dk.prototype_attention(x[:, None], p[None], p[None]); dk.sinkhorn(x.abs()); dk.sinkhorn_points(x, x)
print(len([w for w in caught if "reference implementation" in str(w.message)]))
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["1"]


def test_an_unknown_instruction_set_is_an_error_of_the_call():
    code = "import torch, dpdiff_kernels as dk; dk.nearest_prototype(torch.ones(2, 3), torch.ones(1, 3))"
    result = run(code, DPDIFF_CPU_CAPABILITY="avx-512")
    expected = "DPDIFF_CPU_CAPABILITY is 'avx-512': expected 'amx', 'avx512', 'avx2', 'portable'"
    assert result.returncode == 1 and result.stderr.endswith(f"\nValueError: {expected}\n"), result.stderr


@pytest.mark.parametrize("wanted", ["AVX2", ""])
def test_unknown_instruction_sets(wanted, monkeypatch):
    monkeypatch.setattr(module, "_CPU_CAPABILITY", wanted)
    with pytest.raises(ValueError, match=f"DPDIFF_CPU_CAPABILITY is '{wanted}': expected 'amx', "):
        dk.nearest_prototype(TOKENS, PROTOTYPES)
    dk.nearest_prototype(TOKENS, PROTOTYPES, backend="reference")


@needs_cpp
@pytest.mark.parametrize("wanted", CAPABILITIES)
def test_the_instruction_set_can_be_lowered(wanted):
    result = run("import torch, dpdiff_kernels; print(torch.ops.dpdiff.cpu_capability())", DPDIFF_CPU_CAPABILITY=wanted)
    best = CAPABILITIES.index(torch.ops.dpdiff.cpu_capability())
    assert CAPABILITIES.index(result.stdout.strip()) == min(best, CAPABILITIES.index(wanted))
