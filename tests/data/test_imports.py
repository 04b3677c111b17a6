import subprocess
import sys


def test_data_imports_nothing_heavy():
    heavy = ["torch", "transformers", "deepspeed", "huggingface_hub", "megaslm.config", "megaslm.model"]
    code = f"import sys, megaslm.data; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
