"""Tokenizers: folders with a tokenizer.json, opened here without transformers, and by its AutoTokenizer with equal ids.

Text of documents is always text: `<|endoftext|>` written in a document is encoded by its characters and never becomes
the special token (tiktoken's encode_ordinary; a corpus of source code has such strings). Phrases kept whole
(tools/train_tokenizer.py --keep_whole) are ordinary tokens and are matched.

A folder of ours holds tokenizer.json, tokenizer_config.json, vocab.json, and megaslm_tokenizer.json, which records what
transformers has no word for: the kind of the tokenizer and what it does with an unknown character.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend

from megaslm.errors import UserError, first_line

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

# Pre-tokenizer of Llama 3 (tiktoken's cl100k_base in Oniguruma's spelling): contractions, words with the space or the
# mark before them, digits in threes, runs of marks, newlines, spaces.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# No match of SPLIT_PATTERN has anything behind a newline but white space, and of a run of white space with a newline
# the part up to its last newline is one match: between a newline and a visible character lies a boundary in any
# context. (Visible ASCII only, since Python and Oniguruma differ on which control characters are white space.)
EXACT_CUT = re.compile(r"\n(?=[!-~])")
MAX_PIECE_CHARACTERS = 1 << 16
MAX_BATCH_CHARACTERS = 1 << 21  # an encoded token takes about 120 bytes inside the tokenizers library

SETTINGS_FILE = "megaslm_tokenizer.json"
SETTINGS_VERSION = 1
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    SETTINGS_FILE,
)
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


class Tokenizer:
    """Text to token ids and back. Made by `load_tokenizer` and the trainers of tokenizer_training.py.

    Attributes:
        vocab_size: number of ids, special tokens included (largest id + 1).
        fingerprint: hash of what determines the ids of a text.
        eod_id: id of the end-of-document token; None where the tokenizer has none (characters).
        bos_id: id of the token that begins a text in transformers; eod_id where the tokenizer names none.
        pad_id: id of the padding token, or None.
        kind: "char" or "ascii" for our character tokenizers, else "bpe" (ours) or the model's name in tokenizer.json.
        unknown: what a character tokenizer does with a character it does not know: "map" or "refuse".
    """

    def __init__(self, files: dict[str, str], name: str):
        """`files`: the texts of a tokenizer folder by file name; `name`: what messages call it."""
        self.name = name
        self._files = files
        self._json = _parse(files, "tokenizer.json", name)
        config = {**_parse(files, "special_tokens_map.json", name), **_parse(files, "tokenizer_config.json", name)}
        settings = _parse(files, SETTINGS_FILE, name)
        if settings.get("version", SETTINGS_VERSION) != SETTINGS_VERSION:
            raise UserError(f"{name}/{SETTINGS_FILE} has version {settings['version']}, not {SETTINGS_VERSION}")
        try:
            self._backend = Backend.from_str(files["tokenizer.json"])
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{name}/tokenizer.json is not a tokenizer of the tokenizers library: {error}") from None
        self._backend.encode_special_tokens = True  # as the module's docstring says
        self._backend.no_padding()
        self._backend.no_truncation()
        self._vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1
        self.kind: str = settings.get("type") or self._json["model"].get("type", "unknown").lower()
        self.unknown: str = settings.get("unknown", "map")
        self.eod_id = self._special_id(config, "eos_token", END_OF_TEXT)
        self.bos_id = self._special_id(config, "bos_token", self.eod_token)
        self.pad_id = self._special_id(config, "pad_token", None)
        self._characters = _CharacterTable(self._vocab, self._json) if self.kind in ("char", "ascii") else None

    def __reduce__(self):
        return Tokenizer, (self._files, self.name)  # to worker processes

    @property
    def json(self) -> dict:
        """Content of tokenizer.json; not to be changed."""
        return self._json

    @property
    def files(self) -> dict[str, str]:
        """The texts of the tokenizer's folder by file name, as they were read; not to be changed."""
        return self._files

    @property
    def is_character(self) -> bool:
        """Whether tokens are characters ("char", "ascii")."""
        return self._characters is not None

    def _special_id(self, config: dict, key: str, default: str | None) -> int | None:
        token = config.get(key)
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            return self._vocab.get(default) if default else None
        if token not in self._vocab:
            raise UserError(f"{self.name}: {key} {token!r} is not in the vocabulary of tokenizer.json")
        return self._vocab[token]

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE2b of vocabulary, merges, normalizer, pre-tokenizer and added tokens; decoder and the like left out."""
        model = dict(self._json["model"])
        # "a b" and ["a", "b"] are two spellings of one merge, by the version of the library that wrote it.
        model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or []]
        parts = [model, *(self._json.get(key) for key in ("normalizer", "pre_tokenizer", "added_tokens"))]
        canonical = json.dumps(parts, sort_keys=True, ensure_ascii=True)
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """[vocab_size] int32: UTF-8 bytes of text that each token stands for; special tokens 0.

        Exact for byte-level and character tokenizers: the sum over a text's tokens is the text's length in bytes
        (of the text as mapped, where a character tokenizer maps). For others it is as near as the format comes.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        decoders = _types(self._json.get("decoder"))
        added = {token["content"]: token["special"] for token in self._json.get("added_tokens", [])}
        for token, index in self._vocab.items():
            if token in added:
                lengths[index] = 0 if added[token] else len(token.encode())
            elif "ByteLevel" in decoders:
                lengths[index] = len(token)  # byte-level spelling: one character per byte
            elif "ByteFallback" in decoders and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                lengths[index] = 1
            else:
                lengths[index] = len(token.replace("\u2581", " ").encode())  # SentencePiece's mark for a space
        return lengths

    def count_bytes(self, ids: np.ndarray) -> int:
        """UTF-8 bytes of text that `ids` stand for: the sum of `token_bytes`.

        Ids that are no token's are 0 bytes: -100 of targets that are left out, and ids past `vocab_size`, which a model
        with a larger vocabulary and a token file without a manifest may have.
        """
        known = ids[(ids >= 0) & (ids < self.vocab_size)]
        return int(self.token_bytes[known].sum(dtype=np.int64))

    def same_files(self, other: "Tokenizer") -> bool:
        """Whether the folders of both hold the same, which is more than the same fingerprint: eod, decoder and all."""
        return self._files == other._files

    @property
    def eod_token(self) -> str | None:
        return None if self.eod_id is None else self._backend.id_to_token(self.eod_id)

    def encode(self, text: str, where: str = "the text") -> np.ndarray:
        """[tokens] int32 ids of one text; nothing is added to it. `where` names it in an error."""
        return self.encode_batch([text], [where])[0]

    def encode_batch(self, texts: Sequence[str], wheres: Sequence[object] | None = None) -> list[np.ndarray]:
        """Ids of each text, in order, [tokens] int32 each; on all cores (RAYON_NUM_THREADS limits them).

        A long text is cut where that cannot change its ids, so one huge document is encoded in parallel and in bounded
        memory too; tokenizers whose pre-tokenizer is not ours encode it whole. UserError for an unknown character under
        "refuse": names the character, and the text by its entry in `wheres`.
        """
        if self._characters is not None:
            return [
                self.encode_characters(text, wheres[i] if wheres else "the text")[0] for i, text in enumerate(texts)
            ]
        pieces = [self.cut(text) for text in texts]
        encoded = iter(self._encode_pieces([piece for cut in pieces for piece in cut]))
        return [np.concatenate([next(encoded) for _ in cut]) if len(cut) != 1 else next(encoded) for cut in pieces]

    def _encode_pieces(self, pieces: list[str]) -> list[np.ndarray]:
        encode = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)  # fast: no offsets
        result: list[np.ndarray] = []
        start = 0
        while start < len(pieces):
            stop, characters = start, 0
            while stop < len(pieces) and (stop == start or characters + len(pieces[stop]) <= MAX_BATCH_CHARACTERS):
                characters += len(pieces[stop])
                stop += 1
            batch = encode(pieces[start:stop], add_special_tokens=False)
            result.extend(np.array(encoding.ids, np.int32) for encoding in batch)
            start = stop
        return result

    def cut(self, text: str) -> list[str]:
        """`text` in pieces of about 64 Ki characters whose ids, put together, are the ids of `text`."""
        if len(text) <= MAX_PIECE_CHARACTERS or not self._can_cut:
            return [text]
        return cut_text(text)

    @cached_property
    def _can_cut(self) -> bool:
        splits = (self._json.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
        ours = splits[0].get("type") == "Split" and splits[0].get("pattern") == {"Regex": SPLIT_PATTERN}
        ours = ours and self._json.get("normalizer") is None
        return ours and not any("\n" in token["content"] for token in self._json.get("added_tokens", []))

    def encode_characters(self, text: str, where: object = "the text") -> tuple[np.ndarray, int]:
        """Of a character tokenizer: ids [len(text)] int32, and how many characters were mapped.

        UserError for an unknown character under "refuse"; `where` names the text in it.
        """
        ids, unknown = self._characters.encode(text)
        if unknown.size and self.unknown == "refuse":
            raise UserError(f"{where}: {self._refusal(text, int(unknown[0]))}")
        return ids, int(unknown.size)

    def refusal(self, text: str) -> str | None:
        """Why a character tokenizer under "refuse" cannot encode `text`; None if it, or any other tokenizer, can."""
        if self._characters is None or self.unknown != "refuse":
            return None
        unknown = self._characters.encode(text)[1]
        return self._refusal(text, int(unknown[0])) if unknown.size else None

    def _refusal(self, text: str, at: int) -> str:
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        return (
            f"character {text[at]!r} (U+{ord(text[at]):04X}) at line {line}, column {column} of the text is not among "
            f"the {self.vocab_size} symbols of the tokenizer {self.name}; remove it, or use a tokenizer with unknown = "
            "map"
        )

    def count_unknown(self, text: str) -> int:
        """Characters of `text` that a character tokenizer does not know, and maps; 0 for other tokenizers."""
        return 0 if self._characters is None else int(self._characters.encode(text)[1].size)

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """The text of `ids`; special tokens are left out, or spelled out. Bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the folder that `load_tokenizer` and transformers' AutoTokenizer open."""
        folder = Path(folder)
        files = dict(self._files)
        files.setdefault("tokenizer_config.json", _dump(tokenizer_config(eod=self.eod_token)))
        files.setdefault("vocab.json", _dump(dict(sorted(self._vocab.items(), key=lambda item: item[1]))))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8", newline="")
        except OSError as error:
            raise UserError(f"cannot write the tokenizer to {folder}: {error.strerror or error}") from error


class _CharacterTable:
    """Ids of characters by one table look-up per code point: 100 times faster than the general machinery."""

    def __init__(self, vocab: dict[str, int], tokenizer_json: dict):
        characters = {ord(token): index for token, index in vocab.items() if len(token) == 1}
        self.last = max(characters) + 1  # one entry past the largest code point stands for all beyond it
        self.table = np.full(self.last + 1, -1, np.int32)
        self.table[list(characters)] = list(characters.values())
        self.unknown_id = vocab[tokenizer_json["model"]["unk_token"]]

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids [len(text)] int32 with unknown characters mapped, and the positions of these."""
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids = self.table[np.minimum(codes, self.last)]
        unknown = np.flatnonzero(ids < 0)
        ids[unknown] = self.unknown_id
        return ids, unknown


def cut_text(text: str) -> list[str]:
    """Pieces of at least 64 Ki characters, cut only where SPLIT_PATTERN has a boundary whatever stands around."""
    pieces, start = [], 0
    while len(text) - start > MAX_PIECE_CHARACTERS and (match := EXACT_CUT.search(text, start + MAX_PIECE_CHARACTERS)):
        pieces.append(text[start : match.end()])
        start = match.end()
    return [*pieces, text[start:]]


def tokenizer_config(eod: str | None = None, pad: str | None = None) -> dict:
    """Content of tokenizer_config.json: all that transformers needs to open tokenizer.json and leave text as it is."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if eod is not None:
        config |= {"bos_token": eod, "eos_token": eod}  # in a packed stream the token before a document is its start
    if pad is not None:
        config["pad_token"] = pad
    return config


def load_tokenizer(path_or_hub_name: str | os.PathLike) -> Tokenizer:
    """Open a tokenizer folder, or a tokenizer of the Hugging Face hub (cached there as usual).

    The end-of-document token is the eos_token of tokenizer_config.json, else `<|endoftext|>` if the vocabulary has it.
    UserError if the folder is missing, has no tokenizer.json or a broken one, or the hub does not give it.
    """
    name = os.fspath(path_or_hub_name)
    folder = Path(name)
    if folder.is_file():
        raise UserError(f"tokenizer {name} is a file; give the folder that holds tokenizer.json")
    if not folder.is_dir():
        folder = _from_hub(name)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"tokenizer folder {name} has no tokenizer.json; train one with tools/train_tokenizer.py, or convert an "
            "older format with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
        )
    files = {}
    for file in TOKENIZER_FILES:
        if (folder / file).is_file():
            try:
                files[file] = (folder / file).read_bytes().decode()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{folder / file} cannot be read: {error}") from None
    return Tokenizer(files, name)


def _from_hub(name: str) -> Path:
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"tokenizer folder {name} does not exist")
    from huggingface_hub import snapshot_download  # here, since it takes a while to import

    missing = f"there is no tokenizer folder {name} here, and the Hugging Face hub gives no tokenizer of that name"
    try:
        return Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except Exception as error:  # no network, no such name, no permission: one class each
        reason = first_line(error, type(error).__name__)
        raise UserError(f"{missing} ({reason})") from None


def _parse(files: dict[str, str], file: str, name: str) -> dict:
    try:
        content = json.loads(files.get(file, "{}"))
    except ValueError as error:
        raise UserError(f"{name}/{file} is not valid JSON ({error}); restore it or train the tokenizer again") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}/{file} holds a {type(content).__name__}, not a JSON object")
    return content


def _dump(content: dict) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _types(part: dict | None) -> set[str]:
    """Types in a (possibly nested Sequence) component of tokenizer.json."""
    if not part:
        return set()
    return {part.get("type", "")}.union(*(_types(inner) for inner in part.get("decoders", [])))
