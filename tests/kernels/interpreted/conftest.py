"""Kernels run by Triton's interpreter, on the CPU: `TRITON_INTERPRET=1 pytest tests/kernels/interpreted`.

Triton reads the variable when a kernel is defined, so these tests have processes of their own: test_interpreted.py
starts them. In any other process nothing here is collected.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # comparison.py

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]
else:
    import bf16_interpreter

    bf16_interpreter.install()
