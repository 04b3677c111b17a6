"""Attention within documents: the mask against each document by itself, and what flash attention is given."""

import math
import warnings

import pytest
import torch
from megaslm_kernels import (
    Documents,
    attention,
    attention_obstacle,
    causal_attention,
    find_documents,
    prefer_attention,
    separates_by_flash,
)
from megaslm_kernels.attention import _refusal
from torch.nn.attention import SDPBackend, sdpa_kernel

LENGTHS = ((700, 1, 323), (1024,))  # past the blocks of the CPU's flash attention
POSITIONS = torch.stack([torch.cat([torch.arange(n, dtype=torch.int32) for n in row]) for row in LENGTHS])


def heads(h: int, k: int, dtype=torch.float32, device="cpu", d: int = 16, seed: int = 0) -> list[torch.Tensor]:
    """Queries, keys and values as slices of one projection."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(2, 1024, h + 2 * k, d, generator=generator).to(device, dtype)
    return [x.detach().requires_grad_() for x in qkv.split((h, k, k), dim=2)]


def by_itself(q, k, v) -> torch.Tensor:
    """Every document through plain causal attention."""
    rows = []
    for row, lengths in enumerate(LENGTHS):
        parts = [x[row : row + 1].split(lengths, dim=1) for x in (q, k, v)]
        rows.append(torch.cat([causal_attention(*part) for part in zip(*parts, strict=True)], dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("h, k", [(2, 2), (4, 2)])
def test_the_mask_separates_documents(h, k):
    q, k, v = heads(h, k)
    documents = find_documents(POSITIONS, None, 16, torch.float32)
    assert documents.bounds is None
    assert documents.mask.shape == (2, 1, 1024, 1024)
    found, expected = causal_attention(q, k, v, documents), by_itself(q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((y * direction).sum(), (q, k, v)) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_keep_one_mask_for_their_backward_passes(dtype):
    q, k, v = heads(2, 2, dtype)
    documents, large = find_documents(POSITIONS, None, 16, dtype), []
    assert documents.mask.dtype == dtype

    def keep(tensor):
        if tensor.untyped_storage().nbytes() >= 2 * 1024 * 1024:
            large.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for _ in range(3):
            q = causal_attention(q, k, v, documents)
    assert large == [documents.mask.untyped_storage().data_ptr()] * 3


@pytest.mark.parametrize(
    "found, head_dim, capability, dtype, changes",
    [
        (True, 64, (8, 0), torch.bfloat16, {}),
        (True, 64, (12, 0), torch.float16, {}),
        (False, 64, (7, 5), torch.float16, {}),
        (False, 64, (9, 0), torch.float32, {}),
        (False, 64, (9, 0), torch.bfloat16, {"hip": "7.0"}),
        (False, 64, (9, 0), torch.bfloat16, {"available": False}),
        (False, 64, (9, 0), torch.bfloat16, {"device": "cpu"}),
        (True, 192, (8, 6), torch.bfloat16, {}),
        *((True, 256, data_centre, torch.bfloat16, {}) for data_centre in ((8, 0), (9, 0), (10, 0))),
        *((False, 200, workstation, torch.bfloat16, {}) for workstation in ((8, 6), (8, 9), (12, 0))),
        (False, 264, (9, 0), torch.bfloat16, {}),
        (False, 100, (9, 0), torch.bfloat16, {}),
    ],
)
def test_where_documents_are_separated_by_flash_attention(monkeypatch, found, head_dim, capability, dtype, changes):
    monkeypatch.setattr(torch.version, "hip", changes.get("hip"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: changes.get("available", True))
    assert separates_by_flash(torch.device(changes.get("device", "cuda")), head_dim, dtype) is found


@pytest.mark.parametrize("given", [None, 4, 9], ids=["counted", "exact", "more than there are"])
def test_bounds_for_flash_attention(monkeypatch, given):
    monkeypatch.setattr(attention, "separates_by_flash", lambda *_: True)
    documents = find_documents(POSITIONS, given, 16, torch.bfloat16)
    assert documents.mask is None and documents.bounds.dtype == torch.int32
    assert documents.bounds.tolist() == [0, 700, 701, 1024] + [2048] * (1 if given != 9 else 6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_flash_attention_takes_what_it_is_given(compiled):
    """Shapes, grouped heads and gradients, on a device without values: no GPU is needed. Batches have any number of
    documents, for which nothing is compiled anew once two numbers were seen."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counts = CompileCounterWithBackend("aot_eager") if compiled else None
    attend = torch.compile(causal_attention, backend=counts, fullgraph=True) if compiled else causal_attention
    for num_documents in (4, 9, 7, 30):
        qkv = torch.empty(2, 1024, 8, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
        q, k, v = qkv.split((4, 2, 2), dim=2)
        y = attend(q, k, v, Documents(bounds=torch.empty(num_documents + 1, dtype=torch.int32, device="meta")))
        assert y.shape == q.shape
        y.sum().backward()
        assert qkv.grad.shape == qkv.shape
    assert counts is None or counts.frame_count == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("h, k", [(2, 2), (4, 2)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_flash_attention_is_the_mask(h, k, compiled):
    """Bounds past the last document too: flash takes sequences of no length."""
    q, k, v = heads(h, k, torch.bfloat16, "cuda", d=64)
    positions = POSITIONS.cuda()
    flash = find_documents(positions, 9, 64, torch.bfloat16)
    assert flash.mask is None
    mask = find_documents(positions, None, 64, torch.float32)
    attend = torch.compile(causal_attention, fullgraph=True) if compiled else causal_attention
    found = attend(q, k, v, flash)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = causal_attention(*exact, mask)
    assert (found - expected).norm() / expected.norm() < 0.01
    direction = torch.randn_like(expected)
    ours = torch.autograd.grad((found * direction).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * direction).sum(), exact)
    for one, other in zip(ours, theirs, strict=True):
        error = (one - other).norm() / other.norm()
        assert error < 0.02 and math.isfinite(error)


def test_a_preference_holds_until_the_next_and_marks_what_is_compiled():
    before = torch._C._get_sdp_priority_order()
    first = {}
    for name in ("flash", "cudnn"):
        prefer_attention(name)
        first[name] = torch._C._get_sdp_priority_order()[0]
        assert torch.compiler.config.cache_key_tag == f" attention={name}"
    prefer_attention("auto")
    assert first == {"flash": int(SDPBackend.FLASH_ATTENTION), "cudnn": int(SDPBackend.CUDNN_ATTENTION)}
    assert torch._C._get_sdp_priority_order() == before
    assert torch.compiler.config.cache_key_tag == ""


def test_what_is_compiled_under_one_preference_is_not_taken_under_another(monkeypatch, tmp_path):
    """The caches on disk know what is called, and not how it is resolved."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    q, hits = torch.randn(1, 8, 2, 16), []
    try:
        for name in ("flash", "cudnn", "auto", "flash"):
            prefer_attention(name)
            torch.compiler.reset()
            counters.clear()
            with torch.no_grad():
                torch.compile(causal_attention)(q, q, q)
            hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    finally:
        prefer_attention("auto")
    assert hits == [0, 0, 0, 1]


def test_the_reason_is_the_one_against_the_backend_that_is_asked_for():
    def on_a_cpu():
        q = torch.zeros(1, 2, 8, 16)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(q, q, torch.zeros(1, 2, 8, 24))

    def on_a_gpu():
        for line in (
            "Memory efficient kernel not used because:",
            "It is disabled. (Triggered internally at x.cpp:1.)",
            "Flash attention kernel not used because:",
            "It is disabled.",
            "cuDNN attention kernel not used because:",
            "This one. (Triggered internally at x.cpp:2.)",
        ):
            warnings.warn(line, stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    def without_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert _refusal("flash", on_a_cpu).startswith("Flash attention requires q,k,v to have the same last dimension.")
    assert _refusal("cudnn", on_a_gpu) == "This one."
    assert _refusal("flash", lambda: None) is None
    with pytest.raises(torch.OutOfMemoryError):
        _refusal("flash", without_memory)


def test_a_cpu_has_no_choice_of_attentions():
    assert attention_obstacle("flash", torch.device("cpu"), torch.bfloat16, 4, 2, 64, 128) == "it needs a GPU"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name, kernel", [("flash", "flash"), ("cudnn", "cudnn")])
def test_the_preferred_attention_runs(name, kernel):
    device = torch.device("cuda")
    if obstacle := attention_obstacle(name, device, torch.bfloat16, 4, 2, 64, 1024):
        pytest.skip(obstacle)
    q, k, v = heads(4, 2, torch.bfloat16, device, d=64)
    try:
        prefer_attention(name)
        with torch.profiler.profile() as profile:
            causal_attention(q, k, v).sum().backward()
    finally:
        prefer_attention("auto")
    assert any(f"_{kernel}_attention" in event.key for event in profile.key_averages())
