"""Text from tokens as they come: whole characters, and nothing that a stop string may still cut off."""

from collections.abc import Sequence

from megaslm.data import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 8
# Longer than any character's bytes: a run of tokens that still has no end is no character that is being spelled.
LONGEST_WAIT = 32


class TextStream:
    """The text of one row. `feed` gives what has become certain, `finish` the rest; together they are the text.

    A character whose bytes are spread over tokens appears when it is whole. The beginning of a stop string is held back
    until it is clear that it is none.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        """prompt: the ids before the text; some decoders spell a token by what stands before it."""
        self.stopped = False
        """Whether a stop string came; the text ends before it."""
        self._tokenizer = tokenizer
        self._stop = stop
        # Text of the first `_given` characters of these tokens is given out or stands in `_held`.
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        self._given = len(self._decode().rstrip(REPLACEMENT))
        self._settled = len(self._tokens)
        self._held = ""

    def feed(self, token: int) -> str:
        """The text that is certain with one token more."""
        self._tokens.append(token)
        text = self._decode()
        whole = text.rstrip(REPLACEMENT)
        if whole != text and len(self._tokens) - self._settled <= LONGEST_WAIT:
            new, self._given = whole[self._given :], max(self._given, len(whole))
            return self._release(new)
        new = text[self._given :]
        # Only the tokens since the last whole character are kept, as the context of the next ones.
        self._tokens = self._tokens[self._settled :]
        self._settled, self._given = len(self._tokens), len(self._decode())
        return self._release(new)

    def finish(self) -> str:
        """The text held back, when no more tokens come: half a character is U+FFFD."""
        if self.stopped:
            return ""
        new = self._release(self._decode()[self._given :])
        held, self._held = self._held, ""
        return new if self.stopped else new + held

    def _decode(self) -> str:
        return self._tokenizer.decode(self._tokens)

    def _release(self, new: str) -> str:
        """Of the text held back and the new one, what no stop string can reach."""
        if not self._stop:
            return new
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max(
            (n for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
            default=0,
        )
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain]
