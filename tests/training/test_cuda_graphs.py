"""train.cuda_graphs: what a graph replays is a micro-step, and where it cannot be one."""

import math

import pytest
import torch
from layout_engines import as_run, run_config
from test_device_step import Run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megaslm.config import default_engine_config
from megaslm.errors import UserError
from megaslm.training.cuda_graphs import CudaGraph, GraphedMicroStep, check_cuda_graphs

IMMEDIATE = {"enabled": "auto", "immediate_grad_update": True}
OFFLOADING = {"stage": 1, "offload_optimizer": {"device": "cpu"}}


class Recording(TorchDispatchMode):
    """A `Graph` of any device, which is to PyTorch's operations what a CUDA graph is to kernels: a replay runs them
    again on the same tensors, with the same numbers of the host, and none of the Python around them."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def capture(self, work) -> None:
        work()
        with self:
            work()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, results))
        return results

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, recorded in self.operations:
                found = function(*args, **kwargs)
                if any(returned.alias_info for returned in function._schema.returns):
                    continue  # views and operations in place write to the same memory by themselves
                for to, source in zip(tree_flatten(recorded)[0], tree_flatten(found)[0], strict=True):
                    if isinstance(to, torch.Tensor):
                        to.copy_(source)


def assert_equal_runs(found: Run, expected: Run) -> None:
    assert all(map(torch.equal, found.weights(), expected.weights()))
    assert all(map(torch.equal, found.moments(), expected.moments()))


def test_replayed_steps_are_eager_ones(ranks):
    """Accumulation 4."""
    eager, graphed = (Run(ranks, 1, "bf16") for _ in range(2))
    graphed.engine._graphed = GraphedMicroStep(graphed.engine.deepspeed, Recording())
    for _ in range(3):
        assert graphed.step() == eager.step()
    assert_equal_runs(graphed, eager)


def test_a_step_that_is_left_out_and_an_evaluation_leave_the_graph_as_it_is(ranks):
    """Of one micro-batch, with recomputed activations."""
    options = {"activation_checkpointing": True, "global_batch_size": 1}
    eager, graphed = (Run(ranks, 1, "bf16", **options) for _ in range(2))
    graphed.engine._graphed = GraphedMicroStep(graphed.engine.deepspeed, Recording())
    for poisoned in (False, True, False):
        for run in (eager, graphed):
            run.engine._gradient_scale = math.nan if poisoned else 1 / run.run.tokens_per_step
            run.found = run.step()[0], run.engine.loss_sum(run.batch(50, 1)).item()
        assert graphed.found == eager.found
    assert graphed.engine.skipped_steps == eager.engine.skipped_steps == 1
    assert_equal_runs(graphed, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_graph_trains_as_eager_steps_do(ranks, accumulation, recomputed, compiled, tmp_path):
    """With an evaluation between steps, a step that is left out, and a checkpoint that another run goes on from."""
    if ranks.device.type != "cuda":
        pytest.skip("needs a CUDA device")
    options = {"global_batch_size": accumulation, "activation_checkpointing": recomputed, "compile": compiled}

    class OnDevice(Run):
        def batch(self, *sizes):
            batch = super().batch(*sizes)
            return batch._replace(tokens=batch.tokens.cuda(), targets=batch.targets.cuda())

    def steps(run: Run, number: int) -> list[float]:
        found = []
        for step in range(number):
            scale = run.engine._gradient_scale
            run.engine._gradient_scale = math.nan if step == 1 else scale
            loss, _ = run.step()
            run.engine._gradient_scale = scale
            found += [loss, run.engine.loss_sum(run.batch(50, 1)).item()]
        return found

    eager, graphed, resumed = (
        OnDevice(ranks, 1, "bf16", cuda_graphs=graphs, **options) for graphs in (False, True, True)
    )
    assert isinstance(graphed.engine._graphed._graph, CudaGraph)
    assert steps(graphed, 4) == pytest.approx(steps(eager, 4), rel=2e-3)
    assert graphed.engine.skipped_steps == 1
    graphed.engine.deepspeed.save_checkpoint(tmp_path, tag="saved")
    resumed.engine.deepspeed.load_checkpoint(tmp_path, tag="saved")
    resumed.samples = graphed.samples
    assert steps(resumed, 3) == pytest.approx(steps(graphed, 3), rel=2e-3)


def test_a_config_that_gets_another_optimizer_is_a_mistake_of_ours(ranks):
    """Whether DeepSpeed makes a BF16_Optimizer is told from the config before there is one."""
    with pytest.raises(AssertionError, match="makes another one"):
        GraphedMicroStep(Run(ranks, 2, "bf16").engine.deepspeed, Recording())


def test_a_batch_of_another_size_is_no_replay(ranks):
    run = Run(ranks, 1, "bf16")
    graphed = GraphedMicroStep(run.engine.deepspeed, Recording())
    run.engine.deepspeed.train()
    graphed.run(run.batch(0, 2), 1.0)
    with pytest.raises(AssertionError, match="recorded"):
        graphed.run(run.batch(0, 1), 1.0)  # which a copy would broadcast


def test_targets_that_do_not_count_change_the_scale_from_step_to_step(ranks):
    class Padded(Run):
        """Without the documents that go with masked targets."""

        def batch(self, *sizes):
            return super().batch(*sizes)._replace(positions=None, num_documents=None)

    eager, graphed = (Padded(ranks, 1, "bf16", masked=True) for _ in range(2))
    graphed.engine._graphed = GraphedMicroStep(graphed.engine.deepspeed, Recording())
    for _ in range(3):
        assert graphed.step() == eager.step()


@pytest.mark.parametrize(
    ("device", "precision", "changes", "engine", "words"),
    [
        ("cpu", "bf16", {}, {}, ["GPU"]),
        ("cuda", "fp32", {}, {}, ["bf16", "ZeRO-1", "ds_configs/zero1.json"]),
        ("cuda", "bf16", {}, {"zero_optimization": {"stage": 2}}, ["ZeRO-1"]),
        ("cuda", "bf16", {}, {"zero_optimization": OFFLOADING}, ["ZeRO-1"]),
        ("cuda", "bf16", {}, {"data_types": {"grad_accum_dtype": "bf16"}}, ["fp32 accumulation"]),
        ("cuda", "bf16", {}, {"data_types": {}}, ["fp32 accumulation"]),
        ("cuda", "bf16", {"optimizer": {"type": "apex_fused_adam"}}, {}, ["optimizer.type=adamw"]),
        ("cuda", "bf16", {}, {"bf16": IMMEDIATE}, ["bf16.immediate_grad_update"]),
        ("cuda", "bf16", {"data": {"mask_documents": True}}, {}, ["data.mask_documents"]),
        ("cuda", "bf16", {"parallel": {"tensor_parallel_size": 2}}, {}, ["parallel.tensor_parallel_size=2"]),
        ("cuda", "bf16", {}, {"wall_clock_breakdown": True}, ["wall_clock_breakdown"]),
        ("cuda", "bf16", {}, {"memory_breakdown": True}, ["memory_breakdown"]),
        ("cuda", "bf16", {}, {"timers": {"throughput": {"enabled": True}}}, ["timers.throughput"]),
    ],
)
def test_where_a_micro_step_is_no_graph_a_message_says_why(device, precision, changes, engine, words):
    engine = default_engine_config() | engine
    with pytest.raises(UserError) as error:
        check_cuda_graphs(as_run(run_config(**changes)), precision, engine, torch.device(device))
    assert all(word in str(error.value) for word in ["train.cuda_graphs=false", *words])


def test_bf16_under_zero_1_on_a_gpu_may_be_a_graph():
    off = {"wall_clock_breakdown": False, "timers": {"throughput": {"enabled": False}}}
    off |= {"bf16": {"enabled": True, "immediate_grad_update": False}}
    check_cuda_graphs(as_run(run_config()), "bf16", default_engine_config() | off, torch.device("cuda"))


def test_a_cpu_refuses_before_training(command, preset, tmp_path):
    message = command("--preset", preset, "--run_dir", tmp_path, "train.cuda_graphs=true").message()
    assert "train.cuda_graphs needs a GPU" in message
