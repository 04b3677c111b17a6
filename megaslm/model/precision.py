"""The floating-point types of weights and of arithmetic, by the names that configs and commands know them under."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
