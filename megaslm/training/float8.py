"""Matrix products of the blocks in float8, by torchao: train.float8.

Of a linear layer y = x W^T, each of the three products (y, the gradient of x and that of W) takes both its factors in
float8, scaled so that their largest values fit, and accumulates in fp32. Weights, gradients and what lies between the
layers keep their types: names, checkpoints and exports are those of a run without it. Embedding and output head stay as
they are, since the logits need the precision.

In evaluation mode the products are those of the weights' own type: losses on validation tokens, fingerprints and
samples are those of the model that is saved and exported.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaslm.config import RunConfig
from megaslm.errors import UserError
from megaslm.model import LanguageModel
from megaslm.parallel import quiet_torchao
from megaslm.training.device import device_name

MULTIPLE = 16  # of what the sizes of a float8 product must be (torch._scaled_mm)


def check_float8(run: RunConfig, precision: str, device: torch.device, micro_batch_size: int) -> None:
    """Raise UserError where train.float8 cannot be had: the device, the precision, the layout or a size."""
    asked = f"train.float8={run.train.float8}"
    # ROCm's GPUs have "cuda" devices and capabilities of their own.
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if not is_nvidia or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"{asked} needs an NVIDIA GPU with float8 matrix products (sm_89 or later: L4, H100, H200, ...), which "
            f"{device_name(device)} does not have; use train.float8=off"
        )
    if precision != "bf16":
        raise UserError(f"{asked} is made for bf16, and this run is in {precision}; use train.precision=bf16")
    if run.parallel.tensor_parallel_size > 1:
        raise UserError(
            f"{asked} does not go with parallel.tensor_parallel_size={run.parallel.tensor_parallel_size}: the products "
            "of parts of a matrix have code of their own; use train.float8=off, or data parallelism alone"
        )
    model = run.model
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.num_heads x head_dim": model.num_heads * model.head_dim,
        "the width of queries, keys and values": (model.num_heads + 2 * model.num_kv_heads) * model.head_dim,
        "the tokens of a micro-batch": micro_batch_size * run.seq_length,
    }
    if odd := [f"{name} ({size:,})" for name, size in sizes.items() if size % MULTIPLE]:
        raise UserError(f"{asked} needs multiples of {MULTIPLE}, which these are not: {', '.join(odd)}")


def use_float8(model: LanguageModel, recipe: str, emulate: bool = False) -> None:
    """Let the linear layers of the blocks multiply in float8 while they train. Their parameters stay the same objects.

    recipe: "tensorwise" or "rowwise", as torchao knows them.
    emulate: round to float8 and multiply in the weights' type, as any device can.
    Raises UserError: torchao is not installed.
    """
    quiet_torchao()
    try:
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear
    except ImportError as error:
        raise UserError(
            f"train.float8={recipe} needs torchao, which cannot be imported ({error}): pip install 'megaslm[float8]', "
            "or use train.float8=off"
        ) from error

    class TrainingFloat8Linear(Float8Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else F.linear(x, self.weight, self.bias)

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    for block in model.decoder.blocks:
        for name, module in list(block.named_modules()):
            if type(module) is nn.Linear:
                block.set_submodule(name, TrainingFloat8Linear.from_float(module, config=config))
