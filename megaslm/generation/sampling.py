"""Plain sampling without a cache: the whole context is run again for every token. For samples during training."""

import torch
from torch import Tensor

from megaslm.model import LanguageModel


@torch.no_grad()
def sample_tokens(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    stop_id: int | None = None,
) -> list[int]:
    """Ids that `model` continues `prompt` [S] with, at most `max_new_tokens`, ending before `stop_id`.

    temperature 0 takes the most probable token; top_k 0 keeps the whole vocabulary. The context slides once it is full.
    The draws are made on the CPU from `seed`, so that ranks with the same weights get the same text. Every call makes
    max_new_tokens forward passes, whatever it meets: under ZeRO-3 and tensor parallelism a forward is collective, and a
    rank that drew another token from a logit's last bit must not leave the others waiting.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt.view(1, -1)
    generated: list[int] = []
    for _ in range(max_new_tokens):
        hidden = model.decoder(tokens[:, -model.config.context_length :])
        logits = model.head(hidden[:, -1])[0].float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            if 0 < top_k < logits.numel():
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            token = int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
        generated.append(token)
        tokens = torch.cat((tokens, tokens.new_tensor([[token]])), dim=1)
    model.train(was_training)
    return generated[: generated.index(stop_id)] if stop_id in generated else generated
