"""Text from tokens as they come: whole characters, and nothing that a stop string may still cut off."""

import os
from collections.abc import Sequence

from megaslm.data import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 8
LONGEST_CHARACTER = 4  # bytes
# Longer than any character's bytes: a run of tokens that still has no end is no character that is being spelled.
LONGEST_WAIT = 32
MOST_TOKENS = 64  # that are looked back over


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
        # Of the text of these tokens, `_given` belongs to the prompt, is given out, or stands in `_held`. Behind the
        # first `_settled` ones stands a character that is not whole yet.
        self._tokens, self._settled, self._given = list(prompt), 0, ""
        self._keep_context()
        self._held = ""

    def feed(self, token: int) -> str:
        """The text that is certain with one token more."""
        self._tokens.append(token)
        text = self._decode()
        whole = text.rstrip(REPLACEMENT)
        if whole != text and len(self._tokens) - self._settled <= LONGEST_WAIT:
            new = ""
            if self._goes_on(whole) and (new := self._beyond_given(whole)):
                self._given = whole
            return self._release(new)
        new = self._new_in(text)
        self._keep_context()
        return self._release(new)

    def finish(self) -> str:
        """The text held back, when no more tokens come: half a character is U+FFFD."""
        if self.stopped:
            return ""
        new = self._release(self._new_in(self._decode()))
        held, self._held = self._held, ""
        return new if self.stopped else new + held

    def _decode(self) -> str:
        return self._tokenizer.decode(self._tokens)

    def _keep_context(self) -> None:
        """Of the tokens so far, keep the last ones, by which the next ones are spelled, from a whole character on: of a
        run of bytes in which half a character stands, some decoders spell none at all."""
        tokens, count = self._tokens, CONTEXT_TOKENS
        while count <= MOST_TOKENS:
            for more in range(LONGEST_CHARACTER):
                self._tokens = tokens[-count - more :]
                self._given = self._decode()
                if len(self._tokens) == len(tokens) or self._given[:1] not in ("", REPLACEMENT):
                    self._settled = len(self._tokens)
                    return
            count *= 2
        self._settled = len(self._tokens)

    def _goes_on(self, text: str) -> bool:
        return text.startswith(self._given.rstrip(REPLACEMENT))

    def _beyond_given(self, text: str) -> str:
        """Of a text that goes on, what is not given. Half a character at the end of a prompt is U+FFFD until its other
        half comes, and then another character; a U+FFFD that the prompt spells out stays."""
        return text[len(os.path.commonprefix((self._given, text))) :]

    def _new_in(self, text: str) -> str:
        """What is to be given out of the whole `text`, half characters too. Where these have made U+FFFD of given
        characters (see `_keep_context`), the new tokens by themselves."""
        if self._goes_on(text):
            return self._beyond_given(text)
        return self._tokenizer.decode(self._tokens[self._settled :])

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
