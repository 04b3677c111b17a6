"""One rank of the parity tests: trains a tiny model in many engine layouts, saving and restoring on the way.

    python engine_worker.py JOB.json        (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)

JOB.json: {"directory": where checkpoints go, "output": file for rank 0's findings,
           "tasks": [[function, argument, ...], ...]}.
Losses are written as hexadecimal floats, so that a comparison of the text is one of every bit.
"""

import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from megaslm.checkpoint import (
    Checkpoint,
    HostBuffers,
    Piece,
    check_fingerprint,
    latest_sound,
    list_checkpoints,
    open_checkpoint,
    restore,
    save_checkpoint,
    take_fingerprint,
    write_checkpoint,
)
from megaslm.checkpoint import folder as folder_module
from megaslm.checkpoint.deepspeed_state import EngineState
from megaslm.checkpoint.safetensors_file import write_safetensors
from megaslm.config import ModelConfig
from megaslm.errors import UserError
from megaslm.model import build_model
from megaslm.parallel import Placement, host, init_distributed, shard_model
from megaslm.training.start import check_restored

VOCAB, WIDTH, GLOBAL_BATCH = 61, 16, 4
KINDS = ("weights", "exp_avg", "exp_avg_sq")
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
LAYOUTS = {
    "z0": ({"stage": 0}, {}),
    "z1": ({"stage": 1}, {}),
    "z2": ({"stage": 2}, {}),
    "z3": ({"stage": 3, "stage3_param_persistence_threshold": 0}, {}),
    "z1_bf16": ({"stage": 1}, BF16),
    "z1_bf16_fp32_accumulation": ({"stage": 1}, BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}),
    "z2_bf16": ({"stage": 2}, BF16),
    "z3_bf16": ({"stage": 3, "stage3_param_persistence_threshold": 0}, BF16),
    "z3_bf16_persistent": ({"stage": 3}, BF16),
    "z3_bf16_subgroups": ({"stage": 3, "sub_group_size": 300}, BF16),
    "z1_fp16": ({"stage": 1}, FP16),
    "z2_fp16": ({"stage": 2}, FP16),
    "z3_fp16": ({"stage": 3}, FP16),
    "z2_bf16_offload": ({"stage": 2} | OFFLOAD, BF16),
    "z2_round_robin": ({"stage": 2, "round_robin_gradients": True}, {}),
    "z3_bf16_offload": ({"stage": 3, "offload_param": {"device": "cpu"}} | OFFLOAD, BF16),
}


class TinyLM(nn.Module):
    """Tied embeddings, vectors without weight decay, sizes that divide into nothing."""

    def __init__(self, hidden: int = 37) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.ones(1))  # fewer elements than ranks
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, tokens):
        hidden = self.embedding(tokens[:, :-1])
        hidden = hidden + self.down(torch.relu(self.up(self.norm(hidden))))
        logits = self.head(hidden * self.scale).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def build(layout: str, seed: int, hidden: int = 37):
    zero, precision = LAYOUTS[layout]
    torch.manual_seed(seed)
    model = TinyLM(hidden)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "gradient_clipping": 0.5,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        **precision,
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine, first: int, last: int) -> list[str]:
    """Steps first + 1 to last; the mean loss of each over all ranks."""
    losses = []
    share = GLOBAL_BATCH // dist.get_world_size()
    for step in range(first, last):
        batch = torch.randint(VOCAB, (GLOBAL_BATCH, 9), generator=torch.Generator().manual_seed(step))
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        loss = engine(batch[dist.get_rank() * share :][:share])
        engine.backward(loss)
        engine.step()
        total = loss.detach().double()
        dist.all_reduce(total)
        losses.append((total / dist.get_world_size()).item().hex())
    return losses


def fingerprint(engine) -> str:
    """Hash of every bit of the whole state, whatever its layout: weights, moments, step counts, decay, loss scaler."""
    state, digest = EngineState(engine), hashlib.sha256()
    for kind in KINDS:
        mine = [
            (piece.parameter, piece.part.start, piece.data.contiguous().numpy().tobytes())
            for piece in state.pieces(kind, HostBuffers())
        ]
        for _, _, data in sorted(piece for of_rank in host.gather(mine) for piece in of_rank):
            digest.update(data)
    digest.update(json.dumps([state.steps(), state.weight_decay(), state.loss_scaler()]).encode())
    return digest.hexdigest()


def save(engine, directory: Path, step: int, **options) -> Path:
    return save_checkpoint(
        directory, engine, step=step, run_config={"name": "tiny"}, global_state={"samples": step * 4}, **options
    )


def message_of(function, *arguments, **options) -> list[str]:
    """What every rank is told when `function` fails."""
    text = "no error"
    try:
        function(*arguments, **options)
    except UserError as error:
        text = str(error)
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, text)
    return messages


def same_layout(directory: Path, layout: str) -> dict:
    """Six steps with a save after the third, and the last three again from that save."""
    directory = directory / f"{layout}_{dist.get_world_size()}"
    engine = build(layout, seed=1)
    losses = train(engine, 0, 3)
    path = save(engine, directory, 3)
    saved = fingerprint(engine)
    losses += train(engine, 3, 6)
    end = fingerprint(engine)
    engine.destroy()

    engine = build(layout, seed=2)
    state = restore(open_checkpoint(path), engine)
    restored = fingerprint(engine)
    resumed = train(engine, 3, 6)
    result = {"losses": losses, "resumed": resumed, "saved": saved, "restored": restored, "end": end}
    result |= {"resumed_end": fingerprint(engine), "global_state": state}
    result["loss_scaler"] = open_checkpoint(path).optimizer["loss_scaler"]
    # Back once more, now in an engine that has made steps.
    restore(open_checkpoint(path), engine)
    result["resumed_again"] = train(engine, 3, 6)
    engine.destroy()
    return result


def chain(directory: Path, source: str, layout: str, first: int, last: int) -> dict:
    """Continue another layout's checkpoint, and save."""
    engine = build(layout, seed=2)
    restore(open_checkpoint(directory / source), engine)
    before = fingerprint(engine)
    losses = train(engine, first, last)
    path = save(engine, directory / f"{Path(source).parent}-{layout}_{dist.get_world_size()}", last)
    engine.destroy()
    return {"losses": losses, "fingerprint": before, "path": str(path.relative_to(directory))}


def weights_alone(directory: Path, layout: str) -> dict:
    """From the weights of a checkpoint with a fresh optimizer, against a save of the weights alone."""
    full = directory / f"{layout}_{dist.get_world_size()}" / "step_00000003"
    engine = build(layout, seed=2)
    restore(open_checkpoint(full), engine, weights_only=True)
    path = save(engine, directory / f"weights_{layout}_{dist.get_world_size()}", 0, weights_only=True)
    losses = train(engine, 0, 2)
    restore(open_checkpoint(path), engine, weights_only=True)  # in an engine with moments: they must go
    again = train(engine, 0, 2)
    steps = set(EngineState(engine).steps().values())
    refusal = message_of(restore, open_checkpoint(path), engine)
    engine.destroy()
    return {"losses": losses, "again": again, "steps": sorted(steps), "refusal": refusal}


def before_first_step(directory: Path, layout: str) -> dict:
    """A save before the first step holds zero moments and step 0."""
    engine = build(layout, seed=1)
    checkpoint = open_checkpoint(save(engine, directory / f"zero_{layout}_{dist.get_world_size()}", 0))
    steps = set(checkpoint.optimizer["steps"].values())
    moments = sum(checkpoint.read(name, "exp_avg").abs().sum().item() for name in checkpoint.shapes)
    losses = train(engine, 0, 2)
    engine.destroy()
    engine = build(layout, seed=2)
    restore(checkpoint, engine)
    resumed = train(engine, 0, 2)
    engine.destroy()
    return {"steps": sorted(steps), "moments": moments, "losses": losses, "resumed": resumed}


def failures(directory: Path) -> dict:
    """A rank that can't write, another model, a damaged file: what every rank is told, and what is left."""
    directory = directory / f"failures_{dist.get_world_size()}"
    engine = build("z1", seed=1)
    train(engine, 0, 1)
    save(engine, directory, 1)
    result = {}
    if dist.get_rank() == dist.get_world_size() - 1:  # one rank alone meets the end of its disk
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    result["full_disk"] = message_of(save, engine, directory, 2)
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    result["left"] = sorted(path.name for path in directory.iterdir())
    dist.barrier()
    save(engine, directory, 2)
    if dist.get_rank() == 0:
        file = next((directory / "step_00000002").glob("exp_avg_0*"))
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    dist.barrier()
    reports: list[str] = []
    checkpoint = latest_sound(directory, reports.append)
    result |= {
        "step": checkpoint.step,
        "reports": reports,
        "damaged": message_of(open_checkpoint, directory / "step_00000002"),
    }
    save(engine, directory, 2)  # in the place of the damaged one
    result["replaced"] = latest_sound(directory, reports.append).step
    result["list"] = [path.name for path in list_checkpoints(directory)]
    engine.destroy()
    engine = build("z1", seed=1, hidden=38)
    result["another_model"] = message_of(restore, checkpoint, engine)
    # As if two parameters here were parts of one, such as queries and keys, but in groups of their own.
    engine.module.norm.weight.placement = Placement("up.weight", (38, 16), (), sliced=True)
    try:
        EngineState(engine).weight_decay()
    except AssertionError as error:
        result["two_rates"] = str(error)
    engine.destroy()
    return result


def fingerprints(directory: Path) -> dict:
    """Of weights that lie in parts on the ranks; and what all are told of a difference that one of them alone sees."""
    sizes = {"num_layers": 2, "hidden_size": 20, "ffn_hidden_size": 31, "num_heads": 2, "context_length": 8}
    config, tokens = ModelConfig(vocab_size=VOCAB, **sizes), list(range(3, 12))
    alone = take_fingerprint(build_model(config, seed=1), tokens, "fp32", "cpu", with_roundings=True)
    result = {"alone": alone.to_json()}
    for layout in ("z3", "z3_bf16", "z1"):
        zero, precision = LAYOUTS[layout]
        model = build_model(config, seed=1)
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **precision}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
        now = take_fingerprint(engine.module, tokens, "fp32", "cpu", with_roundings=True)
        spread = [p.ds_status.name for p in model.parameters() if hasattr(p, "ds_status")]
        result[layout] = {"fingerprint": now.to_json(), "spread": spread}
        if layout == "z1":
            if dist.get_rank() == dist.get_world_size() - 1:
                model.decoder.norm.weight.data.mul_(1.1)
            check = check_fingerprint(engine.module, now, "cpu")
            checkpoint = SimpleNamespace(path="step_1", manifest={"code": {}}, fingerprint=now)
            plan = SimpleNamespace(ops=SimpleNamespace(backend="reference"), precision="fp32", say=print)
            result["refusal"] = message_of(check_restored, checkpoint, check, plan)
            result["seen"] = host.gather(check.equal)
        engine.destroy()
    return result


def network(bias: bool) -> ModelConfig:
    """With everything that is cut in a way of its own, and fewer key/value heads than 4 ranks.

    bias: without biases it is the network that Qwen3 is, and can be exported.
    """
    sizes = {
        "num_layers": 2,
        "hidden_size": 20,
        "ffn_hidden_size": 28,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
    }
    return ModelConfig(vocab_size=VOCAB, context_length=8, qk_norm=True, bias=bias, tie_embeddings=True, **sizes)


def build_sliced(config: ModelConfig, layout: str, tensor_parallel_size: int):
    model = build_model(config, seed=1)
    ranks = init_distributed(tensor_parallel_size)
    shard_model(model, ranks.tensor_parallel)
    zero, precision = LAYOUTS[layout]
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero}
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    deepspeed.utils.groups.mpu = ranks.mpu  # it keeps that of an engine before
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings | precision, mpu=ranks.mpu)[0]


def write_made_up(directory: Path, config: ModelConfig) -> Path:
    """A checkpoint of that network, in which every number of every kind is another. One rank writes it whole."""
    shapes = {name: tuple(parameter.shape) for name, parameter in build_model(config, seed=1).named_parameters()}
    generator = torch.Generator().manual_seed(1)
    pieces = {
        kind: [Piece.whole(name, torch.randn(shape, generator=generator).abs()) for name, shape in shapes.items()]
        for kind in KINDS
    }
    optimizer = {
        "type": "adam",
        "moments": list(KINDS[1:]),
        "steps": {name: 3 if len(shape) > 1 else 5 for name, shape in shapes.items()},
        "weight_decay": {name: 0.1 if len(shape) > 1 else 0.0 for name, shape in shapes.items()},
        "loss_scaler": None,
    }
    pieces = pieces if dist.get_rank() == 0 else {}
    run_config = {"model": config.model_dump(mode="json")}
    options = {"run_config": run_config, "global_state": {"samples": 12}, "optimizer": optimizer}
    return write_checkpoint(directory, pieces, step=3, **options)


def relay(directory: Path, name: str, bias: bool, stations: list[list]) -> list[str]:
    """Restore and save in one [layout, tensor-parallel size] after the other; the folders of the saves."""
    config = network(bias)
    paths = [write_made_up(directory / name, config)]
    for i, (layout, tensor_parallel_size) in enumerate(stations):
        engine = build_sliced(config, layout, tensor_parallel_size)
        before = open_checkpoint(paths[-1])
        options = {"run_config": before.run_config, "global_state": restore(before, engine)}
        buffers = HostBuffers() if i % 2 else None  # as a save beside the training, or at once
        folder = directory / f"{name}_{i}_{layout}_{tensor_parallel_size}"
        paths.append(save_checkpoint(folder, engine, step=3, buffers=buffers, **options))
        engine.destroy()
    return list(map(str, paths))


def global_batch(number: int) -> torch.Tensor:
    return torch.randint(VOCAB, (GLOBAL_BATCH, 9), generator=torch.Generator().manual_seed(number))


def train_sliced(engine, number: int) -> str:
    """One step, on a batch that the ranks of data parallelism share out; the mean loss."""
    rank, size = dist.get_rank(engine.seq_data_parallel_group), engine.seq_dp_world_size
    mine = global_batch(number).tensor_split(size)[rank]
    objective, loss = engine(mine[:, :-1], mine[:, 1:])
    engine.backward(objective / mine[:, 1:].numel())
    engine.step()
    means = host.gather(loss.item() / mine[:, 1:].numel())
    return (sum(means) / len(means)).hex()


def train_whole(checkpoint: Checkpoint, dtype: torch.dtype) -> list[str]:
    """The losses of two steps of torch's own Adam on the whole network, in fp32 but for weights rounded to `dtype`."""
    model, losses = build_model(checkpoint.model_config, seed=2), []
    masters = [nn.Parameter(checkpoint.read(name)) for name, _ in model.named_parameters()]
    groups = [{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in masters]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for master, (name, _) in zip(masters, model.named_parameters(), strict=True):
        optimizer.state[master] = {kind: checkpoint.read(name, kind) for kind in KINDS[1:]}
        optimizer.state[master]["step"] = torch.tensor(float(checkpoint.optimizer["steps"][name]))
    for number in (0, 1):
        for master, parameter in zip(masters, model.parameters(), strict=True):
            parameter.data = master.detach().to(dtype).float()
        batch = global_batch(number)
        objective, loss = model(batch[:, :-1], batch[:, 1:])
        gradients = torch.autograd.grad(objective / batch[:, 1:].numel(), list(model.parameters()))
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient
        optimizer.step()
        losses.append((loss.item() / batch[:, 1:].numel()).hex())
    return losses


def steps_between(directory: Path, source: str, layout: str, tensor_parallel_size: int) -> dict:
    """Continue a checkpoint of one rank: two steps, a save between them, and the second once more from that save."""
    made_up, folder = open_checkpoint(directory / source), directory / f"steps_{layout}_{tensor_parallel_size}"
    engine = build_sliced(made_up.model_config, layout, tensor_parallel_size)
    options = {"run_config": made_up.run_config, "global_state": {}}
    unborn = open_checkpoint(save_checkpoint(folder, engine, step=0, **options))
    result = {
        "unborn steps": sorted(set(unborn.optimizer["steps"].values())),
        "unborn moments": sum(unborn.read(name, "exp_avg").abs().sum().item() for name in unborn.shapes),
    }
    restore(made_up, engine)
    losses = [train_sliced(engine, 0)]
    path = save_checkpoint(folder, engine, step=4, **options)
    losses.append(train_sliced(engine, 1))
    result |= {"losses": losses, "end": fingerprint(engine)}
    restore(open_checkpoint(path), engine)
    result |= {"again": train_sliced(engine, 1), "end again": fingerprint(engine)}
    result["loss scaler"] = open_checkpoint(path).optimizer["loss_scaler"]
    restore(made_up, engine, weights_only=True)
    result["weights alone"] = train_sliced(engine, 0)
    result["steps of weights alone"] = sorted(set(EngineState(engine).steps().values()))
    dtype = next(engine.module.parameters()).dtype
    result["expected"] = host.on_first(lambda: train_whole(made_up, dtype))
    engine.destroy()
    return result


def killed_save(directory: Path) -> None:
    """The last rank is killed when it has begun the first of its files."""
    engine = build_sliced(network(bias=True), "z1", 2)
    save(engine, directory, 1)
    if dist.get_rank() == dist.get_world_size() - 1:

        def write(path: Path, tensors: dict) -> dict:
            if path.name.startswith("exp_avg_0"):
                while not path.with_name(path.name.replace("exp_avg", "weights")).exists():
                    time.sleep(0.001)  # the files of a rank are written side by side
                os.kill(os.getpid(), signal.SIGKILL)
            return write_safetensors(path, tensors)

        folder_module.write_safetensors = write
    save(engine, directory, 2)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    # DeepSpeed wants fast fp16 instructions, which few CPUs have; slow ones give the same bits.
    get_accelerator().is_fp16_supported = lambda: True
    init_distributed()
    results = {}
    for name, *arguments in job["tasks"]:
        key = " ".join([name, *(str(one) for one in arguments if not isinstance(one, list))])
        results[key] = globals()[name](Path(job["directory"]), *arguments)
    if dist.get_rank() == 0:
        Path(job["output"]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
