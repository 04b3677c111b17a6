"""The proof of an export: transformers, from the files alone, computes the logits of our network.

Both compute in fp32, on the CPU, from weights rounded to the type of the export. Ours reads the source and not the
export, so that a mistake in the mapping shows.

Our network runs with one module's weights in memory at a time, and so does that of transformers where its weights would
take more than half of the memory that is free. Else the export is opened as its users will open it.

Logits of a model with massive activations differ by more than the bound between two exact computations of the same
fp32. Where the bound is passed, what is allowed is the difference between two of transformers' own.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megaslm.checkpoint.huggingface.folder import BUFFERS, CONFIG, DTYPES, HEADS, weight_files
from megaslm.checkpoint.huggingface.library import load_transformers
from megaslm.checkpoint.huggingface.tokenizer_files import same_tokenizer
from megaslm.checkpoint.safetensors_file import SafetensorsFile
from megaslm.data import PYTHON_STDLIB, standard_text
from megaslm.errors import UserError
from megaslm.model import LanguageModel
from megaslm.resources import available_memory

if TYPE_CHECKING:
    from megaslm.checkpoint.opening import ModelSource

BOUND = 1e-4  # absolute, of fp32 logits
MAX_TOKENS = 256
MIN_TOKENS = 32  # or the context, if that is shorter
TEXT_CHARACTERS = 4096  # of the default text: more than MAX_TOKENS, of most tokenizers
MAX_CHARACTERS = 1 << 16  # of a given one
PIECE = 1 << 24  # elements that are converted at a time
# The output head of gpt_neox has two names: in the files of every version, and in the network of transformers 5.
RENAMED = {"lm_head.weight": "embed_out.weight"}


class ExportDiffers(UserError):
    """An export is not the model that it was made from."""


@dataclass(frozen=True)
class LogitsCheck:
    """What was compared, and how it came out.

    Attributes:
        max_difference: the largest absolute difference of a logit, over all positions and the whole vocabulary.
        largest_logit: the largest absolute value of one.
        bound: what the difference may be.
        rounding: where it is larger, the difference between transformers' own ways to compute attention (sdpa, eager),
            up to which it may then be; else None.
        tokens: positions compared.
        text: where the tokens come from.
        streamed: transformers' network had one module's weights in memory at a time.
        tokenizer_equal: AutoTokenizer does the same, see `same_tokenizer`; None without a tokenizer.
        transformers, torch: versions.
    """

    max_difference: float
    largest_logit: float
    bound: float
    rounding: float | None
    tokens: int
    text: str
    streamed: bool
    tokenizer_equal: bool | None
    transformers: str
    torch: str

    @property
    def logits_equal(self) -> bool:
        return self.max_difference <= max(self.bound, self.rounding or 0.0)  # a NaN is not below anything

    @property
    def passed(self) -> bool:
        return self.logits_equal and self.tokenizer_equal is not False

    def __str__(self) -> str:
        allowed = f"bound {self.bound:g}"
        if self.rounding is not None:
            allowed += f"; transformers' sdpa and eager attention differ by {self.rounding:.3g}"
        how = ", a layer at a time" if self.streamed else ""
        return (
            f"largest difference of a logit {self.max_difference:.3g} ({allowed}), of logits up to "
            f"{self.largest_logit:.3g}, over {self.tokens} tokens ({self.text}), transformers {self.transformers}{how}"
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


@torch.no_grad()
def compare_logits(
    export_dir: str | Path,
    source: "ModelSource",
    text: str | None = None,
    streamed: bool | None = None,
    dtype: torch.dtype | None = None,
    same_ids: bool = True,
) -> LogitsCheck:
    """Compare the logits of an export, computed by transformers, with those of the model it was made from.

    Args:
        export_dir: config.json, safetensors files, and the tokenizer's if `source` has one.
        text: real text, of which up to 256 tokens are taken. None: a file of Python's standard library, or where there
            is no tokenizer the fingerprint's tokens and random ones.
        streamed: run transformers' network module by module; None: where its weights need it.
        dtype: of the export's weights; None: as config.json says.
        same_ids: compare the ids of the text too; else the export's tokenizer is not that of `source`.

    Raises:
        ExportDiffers: transformers misses a tensor, has no use for one, or has another shape for it.
        UserError: the text gives no tokens.
    """
    transformers = load_transformers()
    folder = Path(export_dir)
    dtype = dtype or getattr(torch, json.loads((folder / CONFIG).read_text())["dtype"])
    tokens, where, text = tokens_to_compare(source, text)
    ids = torch.tensor([tokens])
    network = empty_network(source)
    if streamed is None:
        size = 4 * sum(tensor.numel() for tensor in network.parameters())
        streamed = size > available_memory() / 2
    theirs = _their_logits(folder, ids, streamed)
    with parameters_on_demand(network, lambda name: rounded(source.weights.read(name), dtype)):
        ours = network(ids)
    if not ours.isfinite().all():
        raise UserError(
            f"the logits of {source.path} are not finite: its training diverged, and nothing can be compared; export "
            "an earlier checkpoint"
        )
    difference, rounding = (ours - theirs).abs().max().item(), None
    if not difference <= BOUND:
        rounding = (theirs - _their_logits(folder, ids, streamed, attention="eager")).abs().max().item()
    compared = same_ids and source.tokenizer is not None
    return LogitsCheck(
        max_difference=difference,
        largest_logit=ours.abs().max().item(),
        bound=BOUND,
        rounding=rounding,
        tokens=len(tokens),
        text=where,
        streamed=streamed,
        tokenizer_equal=same_tokenizer(folder, source.tokenizer, text) if compared else None,
        transformers=transformers.__version__,
        torch=torch.__version__,
    )


def tokens_to_compare(source: "ModelSource", text: str | None) -> tuple[list[int], str, str]:
    """Token ids, where they come from, and the text they stand for. Arguments and errors of `compare_logits`."""
    length = min(MAX_TOKENS, source.config.context_length)
    least = min(MIN_TOKENS, length)
    if source.tokenizer is None:
        if text is not None:
            raise UserError("a text to compare on needs a tokenizer: name one, or leave the text out")
        return _random_tokens(source, length), "random tokens", ""
    if text is None:
        text = standard_text(source.tokenizer, TEXT_CHARACTERS)
        tokens = source.tokenizer.encode(text).tolist()[:length]
        if len(tokens) < least:  # of a tokenizer that refuses nearly all of it
            return _random_tokens(source, length), "random tokens", text
        return tokens, PYTHON_STDLIB, text
    text = text[:MAX_CHARACTERS]
    tokens = source.tokenizer.encode(text, where="the text to compare on").tolist()[:length]
    if len(tokens) < least:
        raise UserError(
            f"the text to compare on gives {len(tokens)} tokens, and so few prove nothing: give one of {least} or more"
        )
    return tokens, "given text", text


def _random_tokens(source: "ModelSource", length: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(source.config.vocab_size, (length,), generator=generator).tolist()


def _their_logits(folder: Path, ids: Tensor, streamed: bool, attention: str | None = None) -> Tensor:
    """Of the network of transformers. attention: as it names a way to compute it; None: as a user gets it."""
    transformers = load_transformers()
    options = {"dtype": torch.float32, "trust_remote_code": False}
    options |= {"attn_implementation": attention} if attention else {}
    with _ParametersWithoutMemory():
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()
    files = {name: file for file in map(SafetensorsFile, weight_files(folder)) for name in file.shapes}
    places = _places(model, folder, files)
    if streamed:
        with parameters_on_demand(model, partial(_read_stored, places, files)):
            return model.eval()(ids, use_cache=False).logits
    return _opened_by_transformers(folder, options).eval()(ids, use_cache=False).logits


def _opened_by_transformers(folder: Path, options: dict[str, Any]) -> nn.Module:
    """As a user opens it."""
    transformers = load_transformers()
    logging = transformers.utils.logging
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    finally:
        if bars:
            logging.enable_progress_bar()
    named = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys")}
    faults = {kind: wrong for kind, names in named.items() if (wrong := [n for n in names if not BUFFERS.fullmatch(n)])}
    if faults:
        raise ExportDiffers(f"the files in {folder} are not what transformers' {type(model).__name__} has: {faults}")
    return model


def _read_stored(places: dict[str, str], files: dict[str, SafetensorsFile], name: str) -> Tensor:
    """A parameter of theirs as fp32, without a second copy of the whole."""
    stored = places[name]
    file = files[stored]
    whole = torch.empty(file.shapes[stored])
    for start in range(0, whole.numel(), PIECE):
        target = whole.view(-1)[start : start + PIECE]
        piece = torch.empty(target.shape, dtype=DTYPES[file.types[stored]])
        file.read_into(piece, stored, start)
        target.copy_(piece)
    return whole


def _places(model: nn.Module, folder: Path, files: dict[str, SafetensorsFile]) -> dict[str, str]:
    """The name, in the files, of every parameter of a model of transformers, as its from_pretrained finds it.

    Args:
        files: by the names of the tensors in them.

    Raises:
        ExportDiffers: a tensor is missing, of another shape, or of no use.
    """
    places, wrong = {}, []
    for name, parameter in model.named_parameters():
        spellings = (name, RENAMED.get(name, name), name.removeprefix(f"{model.base_model_prefix}."))
        places[name] = next((spelling for spelling in spellings if spelling in files), name)
        if places[name] not in files or files[places[name]].shapes[places[name]] != tuple(parameter.shape):
            wrong.append(places[name])
    tied = HEADS if model.config.tie_word_embeddings else ()
    unused = files.keys() - set(places.values()) - set(tied)
    wrong += sorted(name for name in unused if not BUFFERS.fullmatch(name))
    if wrong:
        raise ExportDiffers(
            f"the files in {folder} are not what transformers' {type(model).__name__} has: "
            f"{', '.join(wrong[:8])} differ{'s' if len(wrong) == 1 else ''}"
        )
    return places


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 with the precision of another type, in place where it is fp32 already."""
    tensor = tensor.to(torch.float32).contiguous()
    for piece in tensor.view(-1).split(PIECE):
        piece.copy_(piece.to(dtype))
    return tensor


class _ParametersWithoutMemory(TorchFunctionMode):
    """Modules made under it have parameters on the meta device, and buffers with their values: modules make the former
    by torch.empty, and compute the latter."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.empty:
            options = {**(options or {}), "device": "meta"}
        return function(*arguments, **(options or {}))


def empty_network(source: "ModelSource") -> LanguageModel:
    """The network of a model without memory for its parameters, in eval mode, for `parameters_on_demand`."""
    with torch.device("meta"):
        network = LanguageModel(source.config)
    if network.decoder.rotary_table is not None:
        network.decoder.rotary_table.to_empty(device="cpu")
        network.decoder.rotary_table.fill()
    return network.eval()


@contextlib.contextmanager
def parameters_on_demand(model: nn.Module, read: Callable[[str], Tensor]) -> Iterator[None]:
    """Within it, each module of `model` has its own parameters, as fp32, while it runs, and no memory for them else.

    Args:
        model: its parameters are on the meta device; shared ones have the name that comes first.
        read: a parameter by its name, of any float type.
    """
    first: dict[int, str] = {}
    hooks = []
    for path, module in model.named_modules():
        own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
        names = {name: first.setdefault(id(tensor), f"{path}.{name}".lstrip(".")) for name, tensor in own.items()}
        if not own:
            continue

        def load(module, _, names=names):
            for name, whole in names.items():
                module._parameters[name] = nn.Parameter(read(whole).to(torch.float32), requires_grad=False)

        def drop(module, *_, own=own):
            module._parameters.update(own)

        hooks += [module.register_forward_pre_hook(load), module.register_forward_hook(drop, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
