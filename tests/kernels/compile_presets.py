"""Compile every kernel for sm_90 as the presets would launch it; print what the assembler made of it, a JSON a line.

All presets in bf16; one of them also in fp32, with positions, and with one of two results unused.

    python tests/kernels/compile_presets.py OP ...

Runs on any machine: the launchers get meta tensors, and the driver is a stub. A process of its own, see stub_driver.py.
"""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import stub_driver
import torch
from megaslm_kernels import TRITON

from megaslm.config import RunConfig, list_presets, load_run_config

DTYPE = torch.bfloat16
OTHER_PRESET = "megaslm_350m"


def tensor(*shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    dtype = dtype or DTYPE
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def widths(run: RunConfig) -> tuple[int, ...]:
    return tokens(run), run.model.hidden_size


def tokens(run: RunConfig) -> int:
    return run.train.micro_batch_size * run.seq_length


def heads(run: RunConfig) -> tuple[int, ...]:
    model = run.model
    rotated = int(model.head_dim * model.rope_fraction)
    return run.train.micro_batch_size, run.seq_length, model.num_heads, model.num_kv_heads, model.head_dim, rotated


def vocabulary(run: RunConfig) -> tuple[int, ...]:
    vocab_size = run.tokenizer.vocab_size or 96
    return tokens(run), run.model.hidden_size, vocab_size


def padded(vocab_size: int) -> int:
    return -(-vocab_size // 128) * 128


def rms_norm(count: int, n: int):
    return TRITON.rms_norm(tensor(count, n), tensor(n), 1e-5)


def add_rms_norm(count: int, n: int):
    return TRITON.add_rms_norm(tensor(count, n), tensor(count, n), tensor(n), 1e-5)


def last_norm(count: int, n: int):
    """Of a model: nothing but the norm reads the sum."""
    return add_rms_norm(count, n)[1]


def swiglu(count: int, f: int):
    return TRITON.swiglu(tensor(count, 2 * f))


def packed_heads(b: int, s: int, h: int, k: int, d: int, rotated: int) -> tuple:
    """q and k as the model has them, views of one projection, and the tables."""
    q, k, _ = tensor(b, s, (h + 2 * k) * d).unflatten(-1, (-1, d)).split((h, k, k), dim=2)
    table = torch.empty(s, rotated // 2, device="meta")
    return q, k, table, table


def rotary(*sizes: int):
    q, k, cos, sin = packed_heads(*sizes)
    return TRITON.rotary(q, k, cos, sin)


def qk_norm_rotary(*sizes: int):
    q, k, cos, sin = packed_heads(*sizes)
    return TRITON.qk_norm_rotary(q, k, tensor(sizes[4]), tensor(sizes[4]), cos, sin, 1e-5)


def rotary_of_documents(*sizes: int):
    return TRITON.rotary(*packed_heads(*sizes), tensor(*sizes[:2], dtype=torch.int64))


def qk_norm_rotary_of_documents(*sizes: int):
    q, k, cos, sin = packed_heads(*sizes)
    positions = tensor(*sizes[:2], dtype=torch.int32)
    return TRITON.qk_norm_rotary(q, k, tensor(sizes[4]), tensor(sizes[4]), cos, sin, 1e-5, positions)


def shard(count: int, vocab_size: int):
    """What the second of 4 and of 8 ranks has of the vocabulary, statistics and gradient."""
    for ranks in (4, 8):
        v = padded(vocab_size) // ranks
        logits, targets = tensor(count, v).detach(), tensor(count, dtype=torch.int64)
        maximum, total, _ = TRITON.shard_statistics(logits, targets, v, vocab_size)
        TRITON.shard_gradient_(logits, targets, v, vocab_size, maximum, total, 1e-4)
    return ()


def linear_cross_entropy(count: int, width: int, vocab_size: int):
    targets = tensor(count, dtype=torch.int64)
    return TRITON.linear_cross_entropy(
        tensor(count, width), tensor(padded(vocab_size), width), targets, vocab_size, 1e-4
    )[0]


def cross_entropy(count: int, vocab_size: int):
    return TRITON.cross_entropy(tensor(count, padded(vocab_size)), tensor(count, dtype=torch.int64), vocab_size, 1e-4)


def adjacent_pairs(b: int, s: int, h: int, k: int, d: int, rotated: int) -> int:
    return (h + k) * rotated // 2


OPS: dict[str, tuple[Callable, Callable, Callable]] = {
    "rms_norm": (rms_norm, widths, lambda count, n: n),
    "add_rms_norm": (add_rms_norm, widths, lambda count, n: n),
    "swiglu": (swiglu, lambda run: (tokens(run), run.model.ffn_hidden_size), lambda count, f: f),
    "rotary": (rotary, heads, adjacent_pairs),
    "qk_norm_rotary": (qk_norm_rotary, heads, adjacent_pairs),
    "cross_entropy": (cross_entropy, lambda run: (tokens(run), vocabulary(run)[-1]), lambda count, v: v),
    "linear_cross_entropy": (linear_cross_entropy, vocabulary, lambda count, width, v: v),
}
"""Name -> the op on meta tensors of given sizes, the sizes of a preset, and the elements of the row that is loaded."""


OTHERS = {
    "add_rms_norm": last_norm,
    "rotary": rotary_of_documents,
    "qk_norm_rotary": qk_norm_rotary_of_documents,
    "cross_entropy": shard,
}
"""Other calls of an op, that compile other kernels."""


def shapes(op: str) -> Iterator[tuple[int, ...]]:
    """Of all presets; for qk_norm_rotary of those that rotate whole heads, since no preset normalises and rotates a
    part of them (where its loads are narrower)."""
    runs = [load_run_config(name) for name in list_presets()]
    if op == "qk_norm_rotary":
        runs = [run for run in runs if run.model.rope_fraction == 1]
    yield from sorted({OPS[op][1](run) for run in runs})


def backward(outputs) -> None:
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    if outputs:
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def compiled(op: str) -> Iterator[tuple[str, tuple[int, ...], object]]:
    """(direction, sizes, kernel) of every launch of `op` that differs from those before."""
    global DTYPE
    known = set(stub_driver.launch._compiled)
    function, sizes, _ = OPS[op]
    other = sizes(load_run_config(OTHER_PRESET))
    cases = [(torch.bfloat16, function, shape) for shape in shapes(op)]
    cases += [(torch.bfloat16, OTHERS[op], other)] if op in OTHERS else []
    cases += [(torch.float32, function, other)]
    for dtype, function, shape in cases:
        DTYPE = dtype
        outputs = function(*shape)
        for direction in ("forward", "backward"):
            if direction == "backward":
                backward(outputs)
            for key in stub_driver.launch._compiled.keys() - known:
                known.add(key)
                yield direction, shape, stub_driver.launch._compiled[key]


def main() -> None:
    with ThreadPoolExecutor(2) as pool:  # the disassembler is a process, which Triton's compiler need not wait for
        for op in sys.argv[1:]:
            launches = [(*launch[:2], pool.submit(stub_driver.inspect_kernel, launch[2])) for launch in compiled(op)]
            for direction, shape, machine in launches:
                case = {"op": op, "direction": direction, "shape": shape, "row": OPS[op][2](*shape)}
                print(json.dumps(case | asdict(machine.result())))


main()
