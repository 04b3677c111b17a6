"""The run configuration: what to train. Every field's docstring is its manual (`--help_config` prints them).

How to train it (ZeRO stage, precision, buckets, offload) stands in the engine config: see engine.py.
Units are in the names or the docstrings. None means that a value follows from others; the docstring says from which.
"""

import math
import re
from typing import Annotated, Literal

from annotated_types import Ge, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

VOCAB_MULTIPLE = 128
# Symbols of the ascii tokenizer: padding and the printable characters 32 to 126.
ASCII_VOCAB_SIZE = 96


class Section(BaseModel):
    """Base of every section: unknown keys are errors, types are strict, assignments are validated."""

    # Strict: without it pydantic would take train.max_steps=true for 1 and model.qk_norm="no" for false.
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, validate_assignment=True
    )


def _as_list(value):
    return [value] if isinstance(value, (str, dict)) else value


def _as_tuple(value):
    # JSON has no tuples.
    return tuple(value) if isinstance(value, list) else value


class ModelConfig(Section):
    """The network: one decoder whose switches cover the llama, qwen3, gpt2 and gpt_neox families."""

    vocab_size: int | None = Field(None, ge=1)
    """Number of tokens in the vocabulary. None takes the tokenizer's; the embedding is padded to a multiple of 128."""
    context_length: int = Field(ge=1)
    """Longest sequence the model is built for, in tokens."""
    num_layers: int = Field(ge=1)
    """Number of transformer blocks."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    num_heads: int = Field(ge=1)
    """Number of query heads."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Number of key/value heads (grouped-query attention), a divisor of num_heads. None: as many as query heads."""
    head_dim: int | None = Field(None, ge=2)
    """Width of one head. None: hidden_size / num_heads."""
    ffn_hidden_size: int = Field(ge=1)
    """Inner width of the feed-forward layer (of the gate and of the up projection each, for swiglu)."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the feed-forward and before the output head."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of the normalisation."""
    qk_norm: bool = False
    """RMS-normalise every query and key head before the rotation (as in Qwen3)."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary position embedding, or a learned vector per position."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_fraction: float = Field(1.0, gt=0, le=1)
    """Fraction of each head that is rotated (GPT-NeoX uses 0.25)."""
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """Stretching of the rotary positions: linear divides the positions, ntk raises theta, yarn (arXiv:2309.00071) and
    llama3 (Llama 3.1) divide the slow channels and keep the fast ones."""
    rope_scaling_factor: float = Field(1.0, ge=1)
    """Factor of rope_scaling: 2 doubles the reach."""
    rope_original_context: int | None = Field(None, ge=1)
    """Tokens of the context before it was stretched, by which yarn and llama3 tell slow channels from fast ones.
    None: context_length / rope_scaling_factor for these two."""
    feed_forward: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """Feed-forward layer: gated SiLU, exact GELU, or GELU by tanh (as in GPT-2)."""
    parallel_residual: bool = False
    """Attention and feed-forward read the same residual and are added together (as in GPT-NeoX)."""
    bias: bool = False
    """Biases in every linear layer of the blocks and in layernorm. The output head has none."""
    tie_embeddings: bool = False
    """The output head shares the input embedding's matrix."""
    init_std: float | None = Field(None, gt=0)
    """Standard deviation of the initial weights; the projections back into the residual stream get
    init_std / sqrt(2 num_layers). None: sqrt(2 / (5 hidden_size)) (arXiv:1910.05895, as GPT-NeoX): 0.023 at width 768,
    and larger for narrow models, which learn much faster so than with GPT-2's 0.02."""

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 128, whatever the layout."""
        assert self.vocab_size is not None, "vocab_size is filled in from the tokenizer"
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @model_validator(mode="after")
    def _check_sizes(self) -> "ModelConfig":
        # Through __dict__, since an assignment here would validate again without end.
        if self.num_kv_heads is None:
            self.__dict__["num_kv_heads"] = self.num_heads
        if self.init_std is None:
            self.__dict__["init_std"] = math.sqrt(2 / (5 * self.hidden_size))
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} does not divide into num_heads {self.num_heads}; "
                    "change one of them or give head_dim"
                )
            self.__dict__["head_dim"] = self.hidden_size // self.num_heads
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                "every key/value head serves the same number of query heads"
            )
        if self.position == "rope" and int(self.head_dim * self.rope_fraction) % 2:
            raise ValueError(
                f"head_dim {self.head_dim} x rope_fraction {self.rope_fraction} must be an even number of channels"
            )
        if self.rope_scaling == "none" and self.rope_scaling_factor != 1.0:
            raise ValueError(
                "rope_scaling_factor has no effect with rope_scaling none; choose linear, ntk, yarn or llama3"
            )
        if self.position == "learned" and self.rope_scaling != "none":
            raise ValueError("rope_scaling has no effect with learned positions")
        if self.rope_scaling in ("yarn", "llama3"):
            if self.rope_original_context is None:
                context = max(1, int(self.context_length / self.rope_scaling_factor))
                self.__dict__["rope_original_context"] = context
        elif self.rope_original_context is not None:
            raise ValueError(f"rope_original_context has no effect with rope_scaling {self.rope_scaling}")
        if self.rope_scaling == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_scaling yarn needs a rope_theta above 1, not {self.rope_theta:g}")
        return self


class TokenizerConfig(Section):
    """Which tokenizer: an existing one (path), or the kind to train on data.input."""

    path: str | None = None
    """Folder with a tokenizer.json, or a name on the Hugging Face hub. None: the one that data.train was built with,
    or one trained on data.input."""
    type: Literal["bpe", "char", "ascii"] = "bpe"
    """Kind to train when there is no path: byte-level BPE, the input's own characters, or padding and ASCII 32-126
    (96 symbols)."""
    vocab_size: int | None = Field(None, ge=257)
    """Number of tokens of a trained BPE, special tokens included."""
    unknown: Literal["map", "refuse"] = "map"
    """What a character tokenizer does with a character it does not know: map it to the nearest symbol it has
    (ascii: a space), or refuse the document."""

    @model_validator(mode="after")
    def _check_vocab_size(self) -> "TokenizerConfig":
        if self.vocab_size and self.type != "bpe":
            raise ValueError(
                f"vocab_size {self.vocab_size} has no effect with type {self.type}, whose symbols are fixed; "
                "leave it out, or take type bpe"
            )
        return self


class DatasetConfig(Section):
    """One token file and its share of the blend."""

    prefix: str
    """Path of PREFIX.bin and PREFIX.idx, without the ending."""
    weight: float = Field(1.0, ge=0)
    """Share of the samples, relative to the other datasets."""


def _as_datasets(value):
    return [{"prefix": v} if isinstance(v, str) else v for v in _as_list(value)]


def _as_prefixes(value):
    """A PREFIX or a list of them as a list; named ones as an object of lists."""
    if isinstance(value, dict):
        for name, prefixes in value.items():
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise ValueError(f"the name {name!r} of a set must be letters, digits, `_`, `.` and `-`")
            if isinstance(prefixes, dict) or not _as_prefixes(prefixes):
                raise ValueError(f"the set {name!r} must be a PREFIX (text) or a list of at least one")
        return {name: _as_prefixes(prefixes) for name, prefixes in value.items()}
    prefixes = [value] if isinstance(value, str) else value
    if not isinstance(prefixes, list) or not all(isinstance(prefix, str) for prefix in prefixes):
        raise ValueError('must be a PREFIX (text), a list of them, or named ones: {"NAME": PREFIX or list, ...}')
    return prefixes


Datasets = Annotated[list[DatasetConfig], BeforeValidator(_as_datasets)]
Prefixes = Annotated[list[str] | dict[str, list[str]], BeforeValidator(_as_prefixes)]
UNNAMED_SET = "validation"


class DataConfig(Section):
    """Where the tokens come from: raw text (input), or token files (train, validation)."""

    input: Annotated[list[str], BeforeValidator(_as_list)] = []
    """Raw text: jsonl files, text files, folders, globs, or `python-stdlib` (the standard library's own source).
    Tokenized once into build_dir; the same input and options are not built again."""
    text_key: str = "text"
    """Field of a jsonl record that holds the text."""
    build_dir: str = "data"
    """Folder for what is built from input; each build gets a folder of its own, named after the run and a hash."""
    validation_fraction: float = Field(0.02, gt=0, lt=1)
    """Part of input held out for validation."""
    validation_unit: Literal["document", "character"] = "document"
    """Hold out whole documents, or the last part of every document (for a corpus that is one long text)."""
    train: Datasets = []
    """Token files to train on: a PREFIX, a list of them, or of {"prefix": ..., "weight": ...}."""
    validation: Prefixes = []
    """Token files to evaluate on: a PREFIX or a list of them, without weights: every token is read once. Named sets, as
    one JSON object (data.validation='{"wiki": "PREFIX", "code": ["PREFIX", "PREFIX"]}'), are reported one by one too;
    the loss over the targets of all of them decides which checkpoint is the best. Empty: the part of train that split
    keeps back."""
    split: str = "98,2"
    """Shares of the sequences of each train file for training, validation and (optional) test: contiguous ranges.
    Used when validation is empty."""
    seq_length: int | None = Field(None, ge=1)
    """Tokens a sample trains on. None: the model's context_length."""
    order: Literal["windows", "megatron"] = "windows"
    """Order of the training samples. windows: a keyed permutation of windows of seq_length tokens, computed on the fly,
    for any number of epochs. megatron: Megatron-LM's own, to go on with one of its runs (see first_sample). It is built
    at start for first_sample and the samples of this run together, which must be as many as it was built for there; so
    train.max_epochs can't be the length. One file is read as by --data-path PREFIX, without a weight, there; several as
    by WEIGHT PREFIX WEIGHT PREFIX. Without weights they are equal here, and by size there; weight 0 leaves a file out
    here, and is refused there."""
    first_sample: int = Field(0, ge=0)
    """Sample of the order that the run begins with: those that an earlier run has read, such as Megatron-LM's
    consumed_train_samples. Schedule and length of this run do not count them."""
    mask_documents: bool = False
    """Let a token attend to its own document alone, with positions that restart in each, in training and evaluation:
    as if every document were a sequence by itself. Otherwise documents that share a window see each other, as in
    Megatron-LM. A document is what the token files call one; in packed files, a piece of a bin. The first token behind
    a document stays a target of its last, as in Megatron-LM without --eod-mask-loss."""

    @property
    def validation_sets(self) -> dict[str, list[str]]:
        """The token files of each named set of `validation`; those without names are one, UNNAMED_SET."""
        named = self.validation if isinstance(self.validation, dict) else {UNNAMED_SET: self.validation}
        return {name: prefixes for name, prefixes in named.items() if prefixes}

    @field_validator("split")
    @classmethod
    def _check_split(cls, split: str) -> str:
        try:
            shares = [float(share) for share in split.split(",")]
        except ValueError:
            shares = []
        if len(shares) not in (2, 3) or min(shares) < 0 or shares[0] == 0 or not sum(shares) < float("inf"):
            raise ValueError('must be two or three shares, the first above zero, such as "98,2" or "969,30,1"')
        return split


Beta = Annotated[float, Ge(0), Lt(1)]


class OptimizerConfig(Section):
    """AdamW, whose implementation can be chosen; the rate is in schedule."""

    type: Literal["adamw", "deepspeed_cpu_adam", "apex_fused_adam"] = "adamw"
    """torch's fused AdamW, DeepSpeed's CPU Adam (needs a C++ compiler), or apex's FusedAdam (needs apex)."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_as_tuple)] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Term added to the denominator."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of matrices; norms, biases and other vectors get none."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest global L2 norm of the gradient; 0 is off."""


class ScheduleConfig(Section):
    """Learning rate as a pure function of the samples consumed. Steps count batches of train.global_batch_size."""

    type: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape after the warmup: constant, linear or cosine down to the minimum, or warmup-stable-decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear rise from zero to the peak."""
    horizon_steps: int | None = Field(None, ge=1)
    """Step at which the minimum is reached. None: the end of the run (by steps, tokens or epochs)."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Minimum learning rate as a fraction of the peak."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """wsd only: last part of the horizon, in which the rate falls (1 - sqrt shape) to the minimum."""

    @model_validator(mode="after")
    def _check_horizon(self) -> "ScheduleConfig":
        if self.horizon_steps and self.warmup_steps >= self.horizon_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} leaves no step of horizon_steps {self.horizon_steps} "
                "for the fall; shorten the one or lengthen the other"
            )
        return self


class TrainConfig(Section):
    """Batch, length and numerics."""

    seed: int = Field(1234, ge=0)
    """Seed of the initial weights and of the sample order."""
    global_batch_size: int = Field(ge=1)
    """Sequences of one optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: int = Field(ge=1)
    """Most sequences of one forward pass on one rank. Accumulation steps are derived:
    the largest micro-batch up to this one that divides the rank's share of global_batch_size is taken."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps. One of max_steps, max_tokens and max_epochs must be given."""
    max_tokens: int | None = Field(None, ge=1)
    """Stop once this many tokens are consumed (rounded up to whole steps)."""
    max_epochs: float | None = Field(None, gt=0)
    """Stop after this many passes over the training tokens (rounded up to whole steps)."""
    max_seconds: float | None = Field(None, gt=0)
    """Save and stop after this much wall time; the schedule's horizon does not follow it."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: as the engine config says. Anything else overrides an "auto" there, and must agree with a fixed value."""
    kernels: Literal["auto", "reference", "triton"] = "auto"
    """Norms, rotation, gate and loss by PyTorch (reference) or by fused Triton kernels, which need CUDA sm_80 or later.
    auto: triton where it runs, else reference."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of the squared log of the softmax's denominator in what is minimised, which keeps logits from drifting
    (arXiv:2204.02311, which takes 1e-4); 0: none. The reported loss is without it."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass (non-reentrant): less memory, about a third more time."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile every block. Where it can't (no compiler), the run says so and goes on without. auto: on GPUs below
    ZeRO-3, whose fetches break the graphs; not on CPUs, where the compiler takes longer than most runs gain."""
    attention: Literal["auto", "flash", "cudnn"] = "auto"
    """Which of PyTorch's fused attentions a GPU tries first: flash (FlashAttention-2) or cuDNN's. What the one can't
    compute, another does. auto: PyTorch's own order; from version 2.10 on that is cuDNN's first on sm_90 and sm_100,
    where the cuDNN is newer than 9.15."""
    float8: Literal["off", "tensorwise", "rowwise"] = "off"
    """Matrix products of the blocks in float8 (E4M3 forward, E5M2 or E4M3 backward; needs torchao, bf16 and sm_89 or
    later): tensorwise has one scale for each matrix, rowwise one for each row, which is slower and closer to bf16. All
    else, weights and gradients among them, stays in bf16, and so does evaluation. For wide models, with train.compile:
    the scaling costs small ones more than the products gain."""
    cuda_graphs: bool = False
    """Record forward and backward pass of a micro-batch once and replay them, for models so small that the host sets
    the pace. Needs a GPU, and bf16 under ZeRO-1 with fp32 accumulation and optimizer.type adamw; goes with neither
    data.mask_documents nor tensor parallelism. The memory of the activations is kept during evaluation."""


class ParallelConfig(Section):
    """How the model is cut over the ranks. It changes no numbers: a run may continue with any other values."""

    tensor_parallel_size: int = Field(1, ge=1)
    """Ranks that hold one copy of the model together, side by side on a node: each has a part of every matrix's rows or
    columns. The rest of the parallelism is over the data: ranks / tensor_parallel_size copies. It must divide the
    number of ranks, num_heads, ffn_hidden_size and the padded vocabulary, and divide num_kv_heads or be a multiple of
    it. For models or sequences that do not fit on one device; it costs two reductions of the activations in every
    block, forward and backward."""
    sequence_parallel: bool = False
    """With tensor_parallel_size above 1: between the matrices, in norms and in the residual stream, each of its ranks
    holds a part of every sequence and not all of it. Less memory for the same communication; data.seq_length must be a
    multiple of tensor_parallel_size."""

    @property
    def sequence_parts(self) -> int:
        """Between the matrices a rank has one of so many parts of every sequence."""
        return self.tensor_parallel_size if self.sequence_parallel else 1


class EvalConfig(Section):
    """Evaluation on the validation tokens, and a sample of generated text."""

    interval: int = Field(1000, ge=0)
    """Steps between evaluations; 0: only at the end."""
    max_sequences: int | None = Field(None, ge=1)
    """Validation windows to read of each set, from the first. None: every target of the validation part, once."""
    sample_tokens: int = Field(0, ge=0)
    """Tokens of text to generate after each evaluation; 0: none."""
    sample_prompt: str = ""
    """Start of the generated text. Empty: the end-of-document token, or the first token of the validation part."""
    sample_temperature: float = Field(0.8, ge=0)
    """Softmax temperature of the sample; 0 is greedy."""
    sample_top_k: int = Field(50, ge=0)
    """Sample among the k most probable tokens; 0: all."""


class CheckpointConfig(Section):
    """When to save and what to keep."""

    interval: int = Field(1000, ge=0)
    """Steps between saves; 0: only at the end."""
    every_epoch: bool = False
    """Also save at the end of each epoch of the training data, and keep these for good."""
    background: bool = True
    """Write while training goes on: a step waits only for a copy to host memory (12 bytes a parameter)."""
    keep_last: int = Field(5, ge=1)
    """Newest checkpoints to keep."""
    keep_every: int = Field(0, ge=0)
    """Keep for good what is saved at multiples of this many steps; a multiple of the interval; 0: nothing."""
    keep_best: bool = True
    """Also save and keep the checkpoint with the lowest validation loss."""
    rolling_names: bool = False
    """Let the links lm_current, lm_prev and lm_prev2 in the checkpoint folder point to the newest three."""

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        if self.keep_every and (not self.interval or self.keep_every % self.interval):
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} is not a multiple of checkpoint.interval={self.interval}: "
                "no save would fall on it, or not on each; change one of them"
            )
        if self.rolling_names and self.keep_last < 3:
            raise ValueError(
                f"checkpoint.rolling_names names the newest three checkpoints and keep_last={self.keep_last} "
                "keeps fewer; set it to 3 or more"
            )
        return self


class LoggingConfig(Section):
    """What is written while the run goes."""

    interval: int = Field(10, ge=1)
    """Steps between lines on the terminal and in metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard files under RUN_DIR/tensorboard."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: not at all, into RUN_DIR/wandb for a later upload, or live."""
    wandb_project: str = "megaslm"
    """Project name for Weights & Biases."""


class RunConfig(Section):
    """A whole run: what `--preset` names and dotted overrides change."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run (letters, digits, `.`, `_`, `-`); its folder is runs/NAME unless --run_dir says otherwise."""
    description: str = ""
    """One line about the preset."""
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def seq_length(self) -> int:
        """Tokens a sample trains on."""
        return self.data.seq_length or self.model.context_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens consumed by one optimizer step over all ranks."""
        return self.train.global_batch_size * self.seq_length

    @property
    def token_limit(self) -> int | None:
        """Tokens after which train.max_steps or train.max_tokens ends the run; None where train.max_epochs alone does,
        whose length the data tells."""
        limits = [self.train.max_steps and self.train.max_steps * self.tokens_per_step, self.train.max_tokens]
        return min((limit for limit in limits if limit), default=None)

    @property
    def step_limit(self) -> int | None:
        """`token_limit` in optimizer steps."""
        return None if self.token_limit is None else math.ceil(self.token_limit / self.tokens_per_step)

    @property
    def expected_vocab_size(self) -> int | None:
        """Vocabulary as far as the configuration tells before there is a tokenizer: what a preset's parameter count
        is stated with. None when only the tokenizer knows (an existing one, or one over the input's characters)."""
        if self.model.vocab_size or self.tokenizer.path or self.data.train:
            return self.model.vocab_size
        return ASCII_VOCAB_SIZE if self.tokenizer.type == "ascii" else self.tokenizer.vocab_size

    @model_validator(mode="after")
    def _check_run(self) -> "RunConfig":
        if self.seq_length > self.model.context_length:
            raise ValueError(
                f"data.seq_length {self.seq_length} is longer than model.context_length {self.model.context_length}; "
                "shorten the one or lengthen the other"
            )
        if not (self.train.max_steps or self.train.max_tokens or self.train.max_epochs):
            raise ValueError("one of train.max_steps, train.max_tokens and train.max_epochs must be given")
        if self.parallel.sequence_parallel and self.seq_length % self.parallel.tensor_parallel_size:
            raise ValueError(
                f"parallel.sequence_parallel cuts sequences of {self.seq_length} tokens "
                f"({'data.seq_length' if self.data.seq_length else 'model.context_length'}) into "
                f"parallel.tensor_parallel_size={self.parallel.tensor_parallel_size} equal parts, which it can't; take "
                "another length, another size, or parallel.sequence_parallel=false"
            )
        if self.data.order == "megatron" and self.train.max_epochs:
            raise ValueError(
                "data.order=megatron is built for a number of samples, and train.max_epochs gives none: "
                "give train.max_steps or train.max_tokens instead"
            )
        if self.data.order == "megatron" and self.checkpoint.every_epoch:
            raise ValueError(
                "checkpoint.every_epoch has no epochs to save under data.order=megatron, which shuffles those of a run "
                "together: take checkpoint.keep_every, or data.order=windows"
            )
        if self.data.input and self.data.train:
            raise ValueError("data.input and data.train exclude each other: raw text to build from, or token files")
        if self.data.validation and not self.data.train:
            raise ValueError(
                "data.validation goes with data.train; from data.input, data.validation_fraction is held out"
            )
        return self
