"""The memory of one rank, in bytes, by formula: no model is built. One formula for plans, tables and tests.

N parameters of a rank, d data-parallel ranks, elements of e bytes. DeepSpeed 0.19.8 with fp32 accumulation, as in
ds_configs/, holds between two steps

    stage           weights     gradients       Adam's moments and fp32 weights
    0, fp32         4 N         -               8 N
    1, fp32         4 N         -               12 N / d
    1, bf16         2 N         4 N             12 N / d            BF16_Optimizer
    1, fp16; 2      e N         -               12 N / d
    3               e N / d     4 N / d         12 N / d

and on top of that, at the moments of a step at which memory peaks (each was seen in the allocations of a real step;
tools/benchmark_memory.py compares their sum with the peaks of real processes):

    forward     what it keeps, and in stage 3 weights twice: those that came together, until the last of them is used
    loss        what the forward pass keeps (activations.py), a chunk of logits and what the loss makes of it
    backward    the same, and the gradients of hidden states and head twice: as the loss left them, and scaled
    arrival     all gradients of a micro-batch, and no activations: BF16_Optimizer's are added to its sums only then
    blocks      what the blocks keep, and one of them in its backward pass, which is whole where they are recomputed
    reduction   gradients, and the buffers that DeepSpeed copies them into: stage 0 joins those of weights, up to
                500 million; BF16_Optimizer casts them to bf16 (2 N), and joins its two tensors, of all matrices and
                all vectors (4 N), where they are fewer than that: else each is a bucket by itself, which is no copy;
                the others a bucket, or a gradient that is larger than one
    optimizer   gradients, and where they are not flat already a flat copy of them

Gradients: e N as they come from the backward pass, which BF16_Optimizer's sums of 4 N take in at its end, as those of
stage 1 in fp16 do; stages 2 and 3 keep 4 N / d of a micro-batch and a bucket. Stage 3 has e N of gathered weights, up
to `live_parameters`, and up to `prefetch_bucket` twice until the last of these is used. The bucket of stages 1 and 2
lives until Python's collector finds it in a cycle, often over the next pass: it is counted there.

Not in it: the context of CUDA, NCCL's buffers, what torch's allocator loses to fragments (parallel/gpus.py has an
assumed reserve for these), and what torch.compile, float8 and CUDA graphs change.
"""

import math
from dataclasses import astuple, dataclass

from megaslm_kernels.cross_entropy_formulas import reference_rows
from megaslm_kernels.linear_cross_entropy import REFERENCE_CHUNK_BYTES, chunk_limit, chunk_rows, product_rows

from megaslm.config import ModelConfig, RunConfig
from megaslm.model import count_parameters
from megaslm.parallel import BYTES, GPU, Layout, rank_parameters
from megaslm.planning.activations import (
    WIDE,
    Sizes,
    block_bytes,
    mask_bytes,
    norm_bytes,
    stream_bytes,
)

JOINED_GRADIENTS = 500_000_000
"""Elements that stage 0 and BF16_Optimizer reduce together (MEMORY_OPT_ALLREDUCE_SIZE of DeepSpeed's engine): a bucket
ends with the tensor that makes it larger."""
SUBGROUP = 1_000_000_000
"""Elements that stage 3 updates together (`sub_group_size`, whose default is this)."""


MARGIN = 0.10
"""Of an estimate: it fits where it still would if it were so much larger. The accuracy that the estimate promises."""


def fits(estimate: float, gpu: GPU) -> bool:
    """Whether a step that is estimated to take so many bytes may be planned on that GPU."""
    return (1 + MARGIN) * estimate <= gpu.usable_bytes


@dataclass(frozen=True)
class Parts:
    """Bytes on the device at one moment, and in the memory of the host (`host`, of offloading, not in `total`)."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(astuple(self)[:-1])

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class MemoryEstimate:
    """held: between two steps. moments: of a step, by name."""

    held: Parts
    moments: dict[str, Parts]

    @property
    def moment(self) -> str:
        """At which memory peaks."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def peak(self) -> Parts:
        return self.moments[self.moment]

    @property
    def total(self) -> float:
        return self.peak.total


def memory_estimate(
    config: ModelConfig, layout: Layout, kernels: str = "triton", mask_documents: bool = False
) -> MemoryEstimate:
    """Peak bytes of a training step on one rank, by part and moment.

    config: with its vocabulary.
    kernels: "triton", which stands for a GPU, or "reference", for a CPU (on a GPU its loss takes up to 0.13 GB more).
    mask_documents: whether documents of a window are kept apart, by a mask on a CPU.
    """
    model = _Rank(config, layout, kernels)
    held = model.held()
    accumulated = model.accumulated() if layout.accumulation_steps > 1 else Parts()
    gathered = Parts(buffers=model.gathered())
    mask = mask_bytes(layout, kernels) if mask_documents else 0
    kept = Parts(activations=model.kept() + mask)
    kept_by_blocks = Parts(activations=model.kept_by_blocks() + mask)
    running = held + gathered + kept
    buckets = Parts(buffers=model.bucket_in_backward())
    return MemoryEstimate(
        held,
        {
            "forward": held + accumulated + kept + Parts(buffers=model.arriving()),
            "loss": running + accumulated + model.loss() + (buckets if layout.accumulation_steps > 1 else Parts()),
            "backward": running + accumulated + model.backward_of_loss() + buckets,
            "blocks": held
            + gathered
            + kept_by_blocks
            + model.gradients_in_backward()
            + model.block_backward()
            + buckets,
            "arrival": held + gathered + model.arrived() + model.cast() + buckets,
            "reduction": held + gathered + model.reduction(kept_by_blocks.activations),
            "optimizer": held + model.optimizer_step() + model.bucket_of_stage_1(),
        },
    )


def state_bytes(config: ModelConfig, layout: Layout) -> float:
    """Bytes of weights, gradients and Adam's moments on one GPU while gradients are accumulated: what no choice of the
    micro-batch makes smaller."""
    model = _Rank(config, layout, "triton")
    state = model.held() + model.arrived()
    return state.weights + state.gradients + state.optimizer


@dataclass(frozen=True)
class _Rank:
    """One rank of a layout. Shapes: T tokens of a micro-batch, E width, V rows of the head on this rank."""

    config: ModelConfig
    layout: Layout
    kernels: str

    @property
    def parameters(self) -> int:
        return sum(rank_parameters(self.config, self.layout.tensor_parallel_size))

    @property
    def element(self) -> int:
        return BYTES[self.layout.precision]

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.config, self.layout)

    @property
    def has_bf16_optimizer(self) -> bool:
        return self.layout.zero_stage == 1 and self.layout.precision == "bf16"

    @property
    def bucket(self) -> int:
        """Elements of a bucket that are ever used."""
        return min(self.layout.reduce_bucket, self.parameters)

    def held(self) -> Parts:
        n, d, stage = self.parameters, self.layout.data_parallel_size, self.layout.zero_stage
        weights, gradients = self.element * n, 0.0
        optimizer = 12 * n / d if stage else 8 * n
        if self.has_bf16_optimizer:
            gradients = WIDE * n
        if stage < 3:
            return Parts(weights, gradients, optimizer)
        weights, gradients = weights / d, WIDE * n / d
        buffers = self.element * self.layout.reduce_bucket  # there from the start, whole
        host = 0.0
        if self.layout.offload_parameters:
            host, weights = host + weights, 0.0
        if self.layout.offload_optimizer:
            host, gradients, optimizer = host + gradients + optimizer, 0.0, 0.0
        return Parts(weights, gradients, optimizer, buffers=buffers, host=host)

    def accumulated(self) -> Parts:
        """Gradients of earlier micro-batches, where they are not among what is held."""
        n, d, stage = self.parameters, self.layout.data_parallel_size, self.layout.zero_stage
        if stage == 3 or self.has_bf16_optimizer:
            return Parts()
        return Parts(gradients=WIDE * n / d if stage == 2 else WIDE * n)

    def arrived(self) -> Parts:
        """Gradients when the last has been computed: in half precision stage 1 adds them up only then."""
        fresh = self.element * self.parameters if self.layout.zero_stage == 1 and self.element != WIDE else 0
        return self.accumulated() + Parts(gradients=fresh)

    def cast(self) -> Parts:
        """On a CPU the sum of a gradient in half precision and one in fp32 makes a wide copy of the former."""
        casts = self.has_bf16_optimizer and self.kernels == "reference"
        sizes = rank_parameters(self.config, self.layout.tensor_parallel_size)
        return Parts(buffers=WIDE * max(sizes) if casts else 0.0)

    def gradients_in_backward(self) -> Parts:
        """When the blocks begin: that of the head, or of earlier micro-batches those that it is added to."""
        head = Parts(gradients=self.element * self.sizes.vocabulary * self.config.hidden_size)
        if self.layout.accumulation_steps == 1 or self.has_bf16_optimizer:
            return head
        return self.accumulated()

    def gathered(self) -> float:
        """Weights that stage 3 has whole, with those that are on their way where it does not have all."""
        return self.element * min(self._large, self.layout.live_parameters + self.layout.prefetch_bucket)

    def arriving(self) -> float:
        """The same until the last is used: each is a copy of its part of what came together."""
        return self.gathered() + self.element * min(self._large, self.layout.prefetch_bucket)

    @property
    def _large(self) -> int:
        """Elements of the weights that stage 3 fetches: on one rank it has them, unless the host does."""
        layout = self.layout
        if layout.zero_stage < 3 or (layout.data_parallel_size == 1 and not layout.offload_parameters):
            return 0
        sizes = rank_parameters(self.config, layout.tensor_parallel_size)
        return sum(size for size in sizes if size > layout.persistence_threshold)

    def kept(self) -> float:
        """By the forward pass for the backward pass, without the loss."""
        config, layout, blocks = self.config, self.layout, self.config.num_layers
        of_block = block_bytes(config, layout, self.kernels)
        last = norm_bytes(config, layout, self.kernels) - stream_bytes(config, layout)  # nothing keeps its result
        return last + blocks * (stream_bytes(config, layout) if layout.activation_checkpointing else of_block)

    def kept_by_blocks(self) -> float:
        """When the last of them begins its backward pass, computed again where they are."""
        of_block = block_bytes(self.config, self.layout, self.kernels)
        if self.layout.activation_checkpointing:
            return self.config.num_layers * stream_bytes(self.config, self.layout) + of_block
        return self.config.num_layers * of_block

    def chunk(self) -> tuple[int, bool]:
        """Rows of a chunk of the loss, and whether there are several."""
        sizes, budget = self.sizes, self.layout.loss_chunk_bytes
        if budget is None and self.kernels == "reference":
            budget = REFERENCE_CHUNK_BYTES
        limit = chunk_limit(sizes.vocabulary * sizes.element, budget)
        return chunk_rows(sizes.tokens, limit), sizes.tokens > limit

    @property
    def head_gradient_element(self) -> int:
        """Bytes of an element of the head's gradient, as the forward pass leaves it: the sum of several chunks is wide,
        and so is fp16's."""
        _, several = self.chunk()
        return WIDE if several or self.layout.precision == "fp16" else self.element

    def gradients_of_loss(self) -> float:
        """Of hidden states and head, as the forward pass leaves them."""
        sizes, width = self.sizes, self.config.hidden_size
        return width * (sizes.tokens * sizes.element + sizes.vocabulary * self.head_gradient_element)

    def loss(self) -> Parts:
        """The hidden states, whole, a chunk of logits, what the reference makes of it in fp32, and the gradients."""
        config, sizes, (rows, _) = self.config, self.sizes, self.chunk()
        hidden = stream_bytes(config, self.layout)
        if self.layout.sequence_parallel:
            hidden += sizes.tokens * config.hidden_size * sizes.element
        logits = rows * sizes.vocabulary * sizes.element
        if self.kernels == "reference":
            logits += self.wide_logits(rows)
        return Parts(logits=hidden + logits + self.gradients_of_loss())

    def wide_logits(self, rows: int) -> float:
        """Bytes in fp32 that the reference makes of a chunk on a CPU: of a block of its rows, all but the padding and
        their logarithms; for a gradient of the head in fp32, the hidden states and a part of the vocabulary."""
        sizes, width = self.sizes, self.config.hidden_size
        columns = 4 * sizes.vocabulary if self.layout.tensor_parallel_size > 1 else 2 * self.config.vocab_size
        block = min(rows, reference_rows(sizes.vocabulary)) * columns
        if self.head_gradient_element == sizes.element:
            return WIDE * block
        return WIDE * max(block, rows * (width + min(sizes.vocabulary, product_rows(rows))))

    def backward_of_loss(self) -> Parts:
        """Its gradients, and these scaled; on a CPU in half precision the product is in fp32, and its operand too."""
        sizes, width = self.sizes, self.config.hidden_size
        head = sizes.vocabulary * width
        scaled = sizes.tokens * width * sizes.element + head * sizes.element
        wide = 2 * WIDE * head if self.kernels == "reference" and sizes.element != WIDE else 0
        return Parts(logits=self.gradients_of_loss() + scaled + wide)

    def block_backward(self) -> Parts:
        """Gradients of activations within a block, of the wider of its two halves, and of its largest weight, which is
        then added to what is there."""
        config, sizes = self.config, self.sizes
        projected = (sizes.heads + 2 * sizes.kv_heads) * config.head_dim
        inner = sizes.inner * (2 if config.feed_forward == "swiglu" else 1)  # beyond what is freed on the way
        streams = 3 * sizes.own_tokens * config.hidden_size
        widest = sizes.tokens * max(inner * sizes.element, self.attention_backward(projected))
        largest = max(inner, projected) * config.hidden_size
        return Parts(activations=widest + sizes.element * streams, gradients=sizes.element * largest)

    def attention_backward(self, projected: int) -> int:
        """Bytes of a token: gradients of the result and of the heads. Flash attention (mha_bwd of PyTorch) has that of
        the queries in fp32 too, those of keys and values for every query head, and a number in fp32 a head."""
        sizes, width = self.sizes, self.sizes.heads * self.config.head_dim
        if self.kernels != "triton" or sizes.element == WIDE:
            return 2 * projected * sizes.element
        expanded = 2 * width if sizes.heads > sizes.kv_heads else 0
        return (width + projected + expanded) * sizes.element + (width + sizes.heads) * WIDE

    def bucket_in_backward(self) -> float:
        """What stages 1 and 2 have allocated of it while the backward pass runs; that of stage 3 is held."""
        if self.layout.zero_stage in (1, 2) and not self.has_bf16_optimizer:
            return self.element * self.layout.reduce_bucket
        return 0.0

    def bucket_of_stage_1(self) -> Parts:
        """It outlives the reduction."""
        return Parts(buffers=self.bucket_in_backward() if self.layout.zero_stage == 1 else 0.0)

    def reduction(self, kept: float) -> Parts:
        """Stages 2 and 3 reduce while the backward pass still has some of what was `kept`."""
        n, d, stage = self.parameters, self.layout.data_parallel_size, self.layout.zero_stage
        gradients = self.accumulated().gradients
        if stage == 0:
            return Parts(gradients=gradients, buffers=WIDE * min(n, JOINED_GRADIENTS))
        if self.has_bf16_optimizer:
            return Parts(buffers=self.element * n + (WIDE * n if n <= JOINED_GRADIENTS else 0))
        # A gradient that is larger than a bucket, most often the head's, the first to come, is reduced by itself.
        alone = max(rank_parameters(self.config, self.layout.tensor_parallel_size))
        alone = alone if alone > self.bucket else 0
        reduced, left = max(self.bucket, alone), 0.0
        copies = self.bucket_in_backward() + self.element * reduced
        if stage > 1:
            gradients += self.element * alone
            left = kept if alone else kept * max(0.0, 1 - self.bucket / n)
        if stage == 3:
            copies += WIDE * reduced / d
        return Parts(gradients=gradients, buffers=copies, activations=left)

    def optimizer_step(self) -> Parts:
        n, d, stage = self.parameters, self.layout.data_parallel_size, self.layout.zero_stage
        if stage == 0:
            return Parts(gradients=WIDE * n)
        if self.has_bf16_optimizer:
            return Parts()
        if stage == 3:
            return Parts() if self.layout.offload_optimizer else Parts(buffers=WIDE * min(n, SUBGROUP) / d)
        flat = WIDE * n / d if self.element == WIDE else 0.0
        return Parts(gradients=WIDE * n / d, buffers=flat)


def checkpoint_bytes(config: ModelConfig) -> int:
    """A checkpoint on disk: every weight and both moments in fp32, whatever the layout; the headers are left out."""
    return 12 * sum(rank_parameters(config))


def checkpoints_kept(run: RunConfig, steps: int | None) -> int:
    """Checkpoints of a run of so many steps on disk at the same time, at most: the last ones, those kept for good, the
    best one, and one that is being written.

    steps: None: not known; then those that checkpoint.keep_every keeps for good are not counted. Those of
        checkpoint.every_epoch never are: the data tells how many they are.
    """
    policy = run.checkpoint
    if steps is None:
        return policy.keep_last + 1 + policy.keep_best
    saved = [*range(policy.interval, steps, policy.interval), steps] if policy.interval else [steps]
    for_good = [step for step in saved if policy.keep_every and step % policy.keep_every == 0]
    kept = len({*saved[-policy.keep_last :], *for_good}) + 1
    return min(kept, len(saved)) + policy.keep_best


def export_bytes(config: ModelConfig) -> int:
    """A Hugging Face export in bf16, as tools/convert_to_hf.py writes by default, without padding of the vocabulary."""
    return 2 * count_parameters(config)


def host_copy_bytes(config: ModelConfig, local_ranks: int, world_size: int) -> int:
    """What a background save copies to the memory of each node (checkpoint.background)."""
    return math.ceil(checkpoint_bytes(config) * local_ranks / world_size)
