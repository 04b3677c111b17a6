"""A GPU for Triton that is not there: an H100 whose kernels compile in full and whose launches do nothing.

Import it in a process of its own, before any kernel is launched: every launcher of ours then runs to its end on CPU or
meta tensors, and `compiled_kernels` gives what it would have run.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from megaslm_kernels import launch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _NoLaunch:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments):
        pass


class _Driver:
    launcher_cls = _NoLaunch
    utils = SimpleNamespace(
        load_binary=lambda *arguments: (0, 0, 0, 0, 1024),  # module, function, registers, spills, threads
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
    )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


driver.set_active(_Driver())


@dataclass(frozen=True)
class Machine:
    """What the assembler made of one kernel, per thread where not said otherwise."""

    name: str
    num_warps: int
    registers: int
    local_bytes: int
    """Stack and local memory: spilled registers and indexed arrays."""
    local_accesses: int
    doubles: int
    """Instructions of the PTX on 64-bit floating-point numbers."""
    loads: dict[int, int]
    """Width in bits -> number of load instructions from global memory."""
    stores: dict[int, int]
    narrow_offsets: tuple[str, ...]
    """32-bit products of a program's number: they overflow where a batch passes 2^31 elements."""


def compiled_kernels() -> list[tuple[tuple, Machine]]:
    """Every kernel launched so far, with its key: (id, num_warps, device, constants..., types...)."""
    return [(key, inspect_kernel(kernel)) for key, kernel in launch._compiled.items()]


def inspect_kernel(kernel) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Machine(
        name=kernel.metadata.name,
        num_warps=kernel.metadata.num_warps,
        registers=registers,
        local_bytes=stack + local,
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        doubles=len(re.findall(r"\.f64\b", kernel.asm["ptx"])),
        loads=_widths(code, "LDG"),
        stores=_widths(code, "STG"),
        narrow_offsets=narrow_offsets(kernel.asm["ttir"]),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _widths(code: str, instruction: str) -> dict[int, int]:
    widths: dict[int, int] = {}
    for modifiers in re.findall(rf"\b{instruction}\.([\w.]+)", code):
        width = next((int(m) for m in modifiers.split(".") if m in ("64", "128")), 32)
        width = next((int(m[1:]) for m in modifiers.split(".") if m in ("U8", "S8", "U16", "S16")), width)
        widths[width] = widths.get(width, 0) + 1
    return widths


def narrow_offsets(ttir: str) -> tuple[str, ...]:
    """Lines of Triton's IR that multiply, in 32 bits, a value that derives from the program's number."""
    derived: set[str] = set()
    narrow = []
    for line in ttir.splitlines():
        assigned = re.match(r"\s*(%[\w#:]+) = ", line)
        operands = set(re.findall(r"%[\w#]+", line.split(" = ", 1)[-1]))
        if "tt.get_program_id" in line or operands & derived:
            if "arith.muli" in line and re.search(r": (?:tensor<[\dx]+x)?i32", line):
                narrow.append(line.strip())
            if assigned and "tt.load" not in line:
                derived.add(assigned[1].split(":")[0])
            # A loop's own names: for %row = %program to ..., iter_args(%a = %b)
            derived.update(re.findall(r"scf\.for (%[\w#]+)", line))
            derived.update(name for name, value in re.findall(r"(%\w+) = (%[\w#]+)[,)]", line) if value in derived)
    return tuple(narrow)
