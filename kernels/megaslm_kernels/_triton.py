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


def fault() -> str | None:
    """Why Triton can't run kernels on the GPU. It compiles a piece of C for the driver first."""
    try:
        _ = triton.runtime.driver.active.utils
    except Exception as error:  # no compiler, no header, no driver: of all kinds
        return f"triton can't reach the GPU ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    return None


__all__ = ["AVAILABLE", "INTERPRETED", "fault", "tl", "triton"]
