"""The choice of a backend: once, said, and never another one in silence."""

import sys

import pytest
import torch
from megaslm_kernels import REFERENCE, TRITON, BackendUnavailable, _triton, select_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_on_a_cpu_auto_is_the_reference_and_triton_is_refused():
    assert select_backend("auto", CPU) is REFERENCE is select_backend("reference", CPU)
    with pytest.raises(BackendUnavailable, match="the device is cpu, they need CUDA"):
        select_backend("triton", CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only")
def test_on_a_gpu_auto_is_triton_from_sm_80_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_triton, "fault", lambda: None)
    assert select_backend("auto", CUDA) is TRITON is select_backend("triton", CUDA)
    assert select_backend("reference", CUDA) is REFERENCE
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert select_backend("auto", CUDA) is REFERENCE
    with pytest.raises(BackendUnavailable, match="compute capability 7.5 is below 8.0"):
        select_backend("triton", CUDA)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only")
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines where Triton finds no GPU")
def test_where_triton_can_not_reach_the_gpu_auto_is_the_reference(monkeypatch):
    """As without a C compiler: the run must not end at its first step."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert select_backend("auto", CUDA) is REFERENCE
    with pytest.raises(BackendUnavailable, match="triton can't reach the GPU"):
        select_backend("triton", CUDA)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from megaslm_kernels import REFERENCE, BackendUnavailable, select_backend
assert select_backend("auto", torch.device("cuda")) is REFERENCE
print(REFERENCE.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).tolist())
try:
    select_backend("triton", torch.device("cuda"))
except BackendUnavailable as error:
    print(error)
"""


def test_without_triton_the_package_imports_and_serves_the_reference(python):
    run = python("-c", WITHOUT_TRITON)
    assert run.returncode == 0, run.stderr
    assert "[[1.0, 1.0, 1.0, 1.0]]" in run.stdout and "triton is not installed" in run.stdout
