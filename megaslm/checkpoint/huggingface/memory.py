"""A model of ours as one of transformers, without a folder between them: for comparisons of the two."""

import torch
from torch import nn

from megaslm.checkpoint.huggingface.families import family_of, hf_config
from megaslm.checkpoint.huggingface.folder import HEADS
from megaslm.checkpoint.huggingface.library import load_transformers
from megaslm.checkpoint.huggingface.mapping import parameter_groups
from megaslm.model import LanguageModel


@torch.no_grad()
def as_transformers(model: LanguageModel) -> nn.Module:
    """transformers' model with copies of the weights of `model`, in fp32 on its device, in eval mode.

    Raises UserError where no family of transformers holds the model.
    """
    transformers = load_transformers()
    family = family_of(model.config)
    ours = dict(model.named_parameters())
    options = hf_config(model.config, "fp32", None)
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    device = next(model.parameters()).device
    with device:
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {}
    for group in parameter_groups(model.config, family):
        if group.ours is None:
            sizes = zip(group.theirs, group.shapes, strict=True)
            state |= {name: torch.zeros(shape, device=device) for name, shape in sizes}
        else:
            state |= dict(zip(group.theirs, group.split(ours[group.ours]), strict=True))
    names = theirs.state_dict().keys()
    head = next(name for name in HEADS if name in names)
    state = {head if name in HEADS else name: tensor for name, tensor in state.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    # transformers lists a tied head as missing, or not, by version; it takes the embedding's weight.
    tied = set(HEADS) if model.config.tie_embeddings else set()
    assert set(missing) <= tied and not unexpected, (missing, unexpected)
    theirs.tie_weights()
    return theirs.eval()
