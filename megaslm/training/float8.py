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

from megaslm.config import RunConfig, float8_problem
from megaslm.errors import UserError
from megaslm.model import LanguageModel
from megaslm.parallel import quiet_torchao
from megaslm.training.device import device_name


def check_float8(run: RunConfig, precision: str, device: torch.device, micro_batch_size: int) -> None:
    """Raise UserError where train.float8 cannot be had: the device, the precision, the layout or a size."""
    # ROCm's GPUs have "cuda" devices and capabilities of their own.
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    has_float8 = is_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)
    if problem := float8_problem(run, precision, device_name(device), has_float8, micro_batch_size):
        raise UserError(problem)


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
