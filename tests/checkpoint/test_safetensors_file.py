"""Safetensors files: read back by the library of that name."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from megaslm.checkpoint import safetensors_file
from megaslm.checkpoint.safetensors_file import LazyTensor, SafetensorsFile, write_safetensors
from megaslm.files import side_by_side


def test_large_tensors_are_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "CHUNK", 1000)
    tensors = {"a": torch.randn(333), "b": torch.randn(10, 50), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    entry = write_safetensors(tmp_path / "x.safetensors", tensors)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert all(torch.equal(load_file(tmp_path / "x.safetensors")[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("chunk", [10, 1000, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lazy_tensors_of_any_type_and_strides(tmp_path, monkeypatch, dtype, chunk):
    """Rows, columns and blocks that are no whole number of chunks; every one read once, in the order of the file."""
    monkeypatch.setattr(safetensors_file, "CHUNK", chunk)
    tensors = {
        "matrix": torch.randn(7, 30),
        "transposed": torch.randn(30, 7, dtype=torch.float64).t(),
        "permuted": torch.randn(3, 4, 5, dtype=torch.bfloat16).permute(2, 0, 1),
        "expanded": torch.randn(5, 1).expand(5, 9),
        "scalar": torch.tensor(2.5),
    }
    read = []

    def reader(name):
        return lambda: read.append(name) or tensors[name]

    lazy = {name: LazyTensor(dtype, tuple(tensor.shape), reader(name)) for name, tensor in tensors.items()}
    entry = write_safetensors(tmp_path / "x.safetensors", lazy)
    assert read == list(tensors)
    assert entry["sha256"] == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    stored = load_file(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor.to(dtype)) and stored[name].dtype == dtype


@pytest.mark.parametrize("hold", [False, True])
def test_threads_may_read_side_by_side(tmp_path, hold):
    tensors = {f"t{i}": torch.full((2**16,), float(i)) for i in range(8)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    file = SafetensorsFile(tmp_path / "x.safetensors", hold)

    def read(name: str) -> int:
        wrong = 0
        for _ in range(40):
            out = torch.empty(2**16)
            file.read_into(out, name, 0)
            wrong += not torch.equal(out, tensors[name])
        return wrong

    assert side_by_side(read, tensors) == [0] * 8
    file.close()


def test_a_tensor_of_another_shape_than_announced_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="w is"):
        write_safetensors(tmp_path / "x", {"w": LazyTensor(torch.float32, (2, 3), lambda: torch.zeros(3, 2))})
