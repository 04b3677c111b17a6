"""Keys and values of the tokens so far, so that a new token costs one row of computation and not its whole context.

Shapes: B rows, K key/value heads, G query heads for each of them, D head size; T tokens that fit, t that are there,
S of them new.
"""

import torch
from megaslm_kernels import attention_to_cache, causal_attention
from torch import Tensor

from megaslm.config import ModelConfig


class KeyValueCache:
    """Room for `capacity` (T) tokens in each of the rows, allocated once, when the first come.

    Keys and values are stored once for a group of query heads. Type, device and number of heads are those of what the
    layers give: a layer may hold a part of the heads.
    """

    def __init__(self, config: ModelConfig, capacity: int, padding: Tensor | None = None):
        """padding: [B] integer, for rows of different lengths: the first padding[b] tokens of row b are seen by no
        other token, and positions count from behind them. None, or zeros: nothing is masked."""
        self._padding = 0 if padding is None else int(padding.max())
        assert capacity - self._padding <= config.context_length, (
            f"a row of {capacity - self._padding} tokens does not fit in the model's context of {config.context_length}"
        )
        self.capacity = capacity
        self.length = 0
        self.layers = [CachedLayer(self) for _ in range(config.num_layers)]
        self.start = 0
        self._mask: Tensor | None = None
        self._hidden: Tensor | None = None
        if self._padding:
            columns = torch.arange(capacity, device=padding.device)
            self._is_padding = columns < padding[:, None]
            # A row that has ended is computed on with the others, past the context's end; nobody reads what it gives.
            self._positions = (columns - padding[:, None]).clamp(0, config.context_length - 1)

    def extend(self, length: int) -> tuple[int, Tensor | None]:
        """Make room for `length` (S) more tokens. Returns the first one's position, and with padding [B, S] of all."""
        assert self.length + length <= self.capacity, f"{self.length} + {length} tokens do not fit in {self.capacity}"
        self.start, self.length = self.length, self.length + length
        self._mask = None
        return self.start, self._positions[:, self.start : self.length] if self._padding else None

    @property
    def is_plain(self) -> bool:
        """Whether the new tokens are the first, without padding: causal attention among themselves."""
        return self.start == 0 and not self._padding

    def mask(self, like: Tensor) -> Tensor | None:
        """What `attention_to_cache` adds to the scores of the new tokens, [B or 1, 1, S, t], on the device and in the
        type of `like`; made once for all layers. None: every token sees all that there is."""
        if self._mask is None:
            if self.length - self.start > 1 or self.start < self._padding:
                self._mask = self._mask_of_several(like)
            elif self._padding:
                if self._hidden is None:
                    self._hidden = _scores(self._is_padding, like)[:, None, None]
                self._mask = self._hidden[..., : self.length]
        return self._mask

    def _mask_of_several(self, like: Tensor) -> Tensor:
        columns = torch.arange(self.length, device=like.device)
        rows = columns[self.start :, None]
        hidden = (columns > rows)[None]
        if self._padding:
            # Padding sees itself: a row of scores that are all -inf would be NaN, and NaN would spread.
            hidden = hidden | self._is_padding[:, None, : self.length] & (columns != rows)
        return _scores(hidden, like)[:, None]


class CachedLayer:
    """Keys and values of one block: [B, K, T, D] each."""

    def __init__(self, cache: KeyValueCache):
        self.cache = cache
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def attend(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
        """Keep the keys and values of the new tokens. Returns their attention to all that is kept, [B, S, H, D]."""
        cache, k_BKSD, v_BKSD = self.cache, k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
        if self.keys is None:
            batch, heads, _, size = k_BKSD.shape
            self.keys = k_BKSD.new_empty(batch, heads, cache.capacity, size)
            self.values = torch.empty_like(self.keys)
        self.keys[:, :, cache.start : cache.length] = k_BKSD
        self.values[:, :, cache.start : cache.length] = v_BKSD
        if cache.is_plain:
            return causal_attention(q_BSHD, k_BSKD, v_BSKD)
        keys, values = self.keys[:, :, : cache.length], self.values[:, :, : cache.length]
        return attention_to_cache(q_BSHD, keys, values, cache.mask(q_BSHD))


def _scores(hidden: Tensor, like: Tensor) -> Tensor:
    """0 for what is seen and -inf for what is hidden."""
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)
