"""Triton, or, where it is not installed (it exists for Linux only), a stand-in under which the kernels' files import.

The stand-in serves the reference backend alone: `backends.select_backend` refuses the triton backend with it.
"""

# AVAILABLE: Triton is installed. INTERPRETED: its kernels run in Python, on CPU tensors (TRITON_INTERPRET=1), as Triton
# decides when a kernel is defined.
try:
    import triton
    import triton.language as tl

    AVAILABLE = True
    INTERPRETED = triton.knobs.runtime.interpret
except ImportError:
    from types import SimpleNamespace

    AVAILABLE = INTERPRETED = False
    triton = SimpleNamespace(jit=lambda function=None, **options: function or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=object)

__all__ = ["AVAILABLE", "INTERPRETED", "tl", "triton"]
