"""The training loop and what it does at its intervals: log, evaluate, save."""

import contextlib
import gc
import math
import time
from dataclasses import asdict

import numpy as np
import torch

from megaslm.checkpoint import (
    Checkpoint,
    Fingerprint,
    HostBuffers,
    Snapshot,
    check_fingerprint,
    differing_copies,
    restore,
    take_fingerprint,
    take_snapshot,
)
from megaslm.generation import sample_tokens
from megaslm.model import flops_per_token
from megaslm.parallel import host, memory_used
from megaslm.training import report
from megaslm.training.batches import StepBatches, to_device
from megaslm.training.device import peak_flops
from megaslm.training.engine import TrainingEngine
from megaslm.training.evaluation import Evaluation, evaluate
from megaslm.training.metrics import MetricsLog, Stopwatch
from megaslm.training.preparation import Plan, identity
from megaslm.training.progress import Progress, conclude
from megaslm.training.run_dir import RunLock, environment, open_run_dir
from megaslm.training.saving import Saving
from megaslm.training.schedule import learning_rate
from megaslm.training.start import InitialWeights, check_restored
from megaslm.training.stop import StopRequest


class Training:
    """One process's part in a run: `go` from a checkpoint, or from the start, to the end or to a stop."""

    def __init__(self, plan: Plan, engine: TrainingEngine, lock: RunLock, compiled: str):
        self.plan, self.lock = plan, lock
        self.run, self.data, self.ranks, self.say = plan.run, plan.data, plan.ranks, plan.say
        self.engine, self.compiled = engine, compiled
        self.run_dir = plan.options.run_dir
        self.progress = Progress()
        self.skipped_before = 0
        self.last_evaluation: Evaluation | None = None
        self.evaluated_step: int | None = None
        # Losses and targets summed on the device, read at the logging interval alone, and the steps of this process.
        self.interval_sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        self.interval_steps = 0
        self.watch = Stopwatch(self.ranks.device)
        self.eta_steps, self.eta_seconds = 0, 0.0
        self.log: MetricsLog | None = None

    def go(self, checkpoint: Checkpoint | None, weights: InitialWeights | None = None) -> None:
        """Continue from `checkpoint`, or start (from `weights`, if given), run to the end or to a stop, and report."""
        if checkpoint is not None:
            self.progress = Progress(**restore(checkpoint, self.engine.deepspeed)["progress"])
            self.progress.evaluation_due &= _due(self.progress.step, self.run.eval.interval)
            self.skipped_before = self.progress.skipped_steps
            self._set_interval_sums()
            self.say(f"continuing from {checkpoint.path} at step {self.progress.step}")
            self._compare_with(checkpoint)
        elif weights is not None:
            restore(weights.checkpoint, self.engine.deepspeed, weights_only=True)
            self.progress.weights_from = weights.origin
            self.say(f"a new run from the weights of {weights.checkpoint.path}{weights.differences}")
            if weights.same_model:
                self._compare_with(weights.checkpoint)
        self.first_step = self.progress.step + 1
        host.on_first(self._open_run_dir)
        # The checkpoint of a step that is yet to be evaluated is saved again where it turns out to be the best.
        saved = checkpoint is not None and not self.progress.evaluation_due
        self.saving = Saving(self.run.checkpoint, self.say, checkpoint.step if saved else None)
        self.started = time.perf_counter() - self.progress.seconds
        self.watch.restart()
        try:
            with StopRequest(self.ranks, self.run.train.max_seconds) as stop:
                if self.progress.evaluation_due:
                    self._evaluate()
                first_sample = self.run.data.first_sample + self.progress.samples
                steps = self.plan.steps - self.progress.step
                with StepBatches(self.data.training, self.plan.layout, self.ranks, first_sample, steps) as batches:
                    reason = self._loop(stop, batches)
            self.progress.seconds = time.perf_counter() - self.started
            # The others wait for it: of a rank that is gone before, srun may end the step, and rank 0 with it.
            host.on_first(lambda: conclude(self.plan, self.progress, reason))
        except Exception:
            self.saving.finish_running()
            raise
        finally:
            if self.log is not None:
                self.log.close()

    def _open_run_dir(self) -> None:
        """On rank 0: take the folder, write what is known before the first step, open the metrics."""
        self.lock.take()
        train = self.run.train
        facts = environment(self.ranks, self.plan.precision, self.plan.ops.backend) | {
            "compile": self.compiled,
            "attention": train.attention,
            "float8": train.float8,
            "cuda_graphs": train.cuda_graphs,
        }
        open_run_dir(self.run_dir, self.run, self.plan.engine_config, facts, self.progress.step)
        # An evaluation that is made up for may have been logged before a kill.
        self.log = MetricsLog(
            self.run_dir, self.run, self.progress.step, self.say, without_evaluation=self.progress.evaluation_due
        )

    def _loop(self, stop: StopRequest, batches: StepBatches) -> str | None:
        """Step until the end; returns why it stopped before, or None."""
        progress, run, plan = self.progress, self.run, self.plan
        horizon = (run.schedule.horizon_steps or plan.steps) * run.train.global_batch_size
        while progress.step < plan.steps:
            lr = learning_rate(
                progress.samples,
                horizon=horizon,
                batch=run.train.global_batch_size,
                optimizer=run.optimizer,
                schedule=run.schedule,
            )
            self.interval_sums += self.engine.train_step(batches.next(), lr)
            self.interval_steps += 1
            progress.step += 1
            progress.samples += run.train.global_batch_size
            progress.tokens += run.tokens_per_step
            if progress.step == self.first_step:
                # What exists now lives as long as the run: the collector need not walk it again (half-second stalls).
                gc.collect()
                gc.freeze()
            reason, done = stop.agreed(), progress.step == plan.steps
            if done or _due(progress.step, run.logging.interval):
                # An interval that a stop cuts short is not logged: its sums go through the checkpoint to the next run.
                self._log_interval(lr)
            if done or _due(progress.step, run.eval.interval):
                if done or reason is None:
                    self._evaluate()
                else:  # who wants to stop need not wait for it: the run that continues makes it up
                    progress.evaluation_due = True
            last = done or reason is not None
            if last or _due(progress.step, run.checkpoint.interval) or self._ended_epoch() is not None:
                self._save(last)
            if reason is not None and not done:
                return reason
        return None

    def _log_interval(self, lr: float) -> None:
        """One record and one line; the only place of the loop that waits for the device."""
        progress, run = self.progress, self.run
        loss_sum, targets = self.ranks.sum(self.interval_sums).tolist()
        # Of an interval that an earlier process began, the time is that of this one's steps.
        steps, seconds = self.interval_steps, self.watch.restart()
        tokens_per_s = steps * run.tokens_per_step / seconds
        per_device = tokens_per_s / self.ranks.world_size / 1e12
        flops = flops_per_token(run.model, run.seq_length)
        peak = peak_flops(self.ranks.device)
        progress.skipped_steps = self.skipped_before + self.engine.skipped_steps
        record = {
            "kind": "train",
            "step": progress.step,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "loss": loss_sum / targets,
            "grad_norm": self.engine.grad_norm,
            "lr": lr,
            "tokens_per_s": tokens_per_s,
            "ms_per_step": 1e3 * seconds / steps,
            "tflops": flops * per_device,
            "tflops_causal": flops_per_token(run.model, run.seq_length, causal=True) * per_device,
            "mfu": flops * per_device * 1e12 / peak if peak else None,
            "skipped_steps": progress.skipped_steps,
            "loss_scale": self.engine.loss_scale,
            **memory_used(self.ranks.device),
        }
        if progress.step - steps >= self.first_step:
            # Not the first interval: its first steps allocate, compile and fill caches.
            self.eta_steps, self.eta_seconds = self.eta_steps + steps, self.eta_seconds + seconds
        self.interval_sums.zero_()
        self.interval_steps = 0
        if self.log is not None:
            left = self.plan.steps - progress.step
            eta = left * self.eta_seconds / self.eta_steps if self.eta_steps else None
            self.log.write(record)
            self.say(report.train_line(record, self.plan.steps, eta))

    def _evaluate(self) -> None:
        """Loss on the validation part, a sample of text, and a checkpoint where it is the best so far."""
        progress = self.progress
        progress.evaluation_due = False
        with self.watch.paused():
            result = evaluate(
                self.engine,
                self.data.validation,
                self.data.tokenizer,
                self.plan.layout.micro_batch_size,
                self.ranks,
                self.run.eval.max_sequences,
            )
            self.last_evaluation, self.evaluated_step = result, progress.step
            record = {
                "kind": "eval",
                "step": progress.step,
                "samples": progress.samples,
                "tokens": progress.tokens,
                **result.record(),
            }
            if self.log is not None:
                self.log.write(record)
                self.say(report.eval_line(record))
            if self.run.eval.sample_tokens and self.data.tokenizer is not None:
                self._sample()
        loss = result.overall.loss
        if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
            progress.best_loss, progress.best_step = loss, progress.step
            if self.run.checkpoint.keep_best and progress.step < self.plan.steps:
                self._save()

    def _sample(self) -> None:
        tokenizer, config = self.data.tokenizer, self.run.eval
        prompt = self.data.sample_prompt
        if prompt is None:
            first = next(iter(self.data.validation.values())).batch(0, 1)[0][0, :1]
            prompt = first if tokenizer.eod_id is None else np.array([tokenizer.eod_id])
        with self._eager():
            generated = sample_tokens(
                self.engine.model,
                to_device(prompt, self.ranks.device),
                config.sample_tokens,
                temperature=config.sample_temperature,
                top_k=config.sample_top_k,
                seed=self.run.train.seed + self.progress.step,
                stop_id=tokenizer.eod_id,
            )
        text = config.sample_prompt + tokenizer.decode(generated)
        if self.log is not None:
            self.log.write_text(self.progress.step, text)
        self.say("sample:", *(f"    {line}" for line in text.splitlines()))

    def _eager(self) -> contextlib.AbstractContextManager:
        """Where another length than that of training would compile every block anew, for a few tokens.

        (Without compile the compiler stays unimported: that saves a second, and triton's complaints at exit.)
        """
        return torch.compiler.set_stance("force_eager") if self.run.train.compile else contextlib.nullcontext()

    def _fingerprint(self) -> Fingerprint | None:
        """Of the model as it is now; None, with a warning, where a device has no room for it. Collective.

        A save must not fail for want of it. Where all ranks run out of memory, as they do, being alike, they agree
        here. Under ZeRO-3 or tensor parallelism one that does alone leaves the others waiting for its part, until the
        backend ends the process; nothing short of that can call them back.
        """
        fingerprint = None
        try:
            with self._eager():
                fingerprint = take_fingerprint(
                    self.engine.model,
                    self.data.fingerprint_tokens,
                    self.plan.precision,
                    self.ranks.device,
                    with_roundings=True,
                )
        except torch.OutOfMemoryError:
            pass  # outside of this block the error's frames, and the tensors in them, are gone
        short = [rank for rank, one in enumerate(host.gather(fingerprint is None)) if one]
        if short:
            self.say(
                f"warning: rank {short[0]} has no device memory left for the fingerprint of step {self.progress.step}: "
                "the checkpoint is saved without"
            )
        return None if short else fingerprint

    def _compare_with(self, checkpoint: Checkpoint) -> None:
        """See that the restored model computes what it did when it was saved; older checkpoints do not tell."""
        if (stored := checkpoint.fingerprint) is not None:
            with self._eager():
                check = check_fingerprint(self.engine.model, stored, self.ranks.device)
            check_restored(checkpoint, check, self.plan)

    def _ended_epoch(self) -> int | None:
        """The number of the epoch that this step completed, if its end is to be kept."""
        if not self.run.checkpoint.every_epoch:
            return None
        samples = self.run.data.first_sample + self.progress.samples
        epoch = samples // self.data.training.samples_per_epoch
        before = (samples - self.run.train.global_batch_size) // self.data.training.samples_per_epoch
        return epoch if epoch > before else None

    def _save(self, last: bool = False) -> None:
        """Save this step, once; the step waits for a copy to host memory, or to the end where it is the last."""
        with self.watch.paused():
            if self.log is not None:
                self.log.flush()
            self.saving.save(self.progress.step, self._snapshot, last)

    def _warn_of_differing_copies(self) -> None:
        if names := differing_copies(self.engine.deepspeed):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.say(
                f"warning: at step {self.progress.step} tensor-parallel ranks hold different values of {names[0]}"
                f"{more}, which every one of them should hold alike; the checkpoint has those of one rank, and a run "
                "that continues from it computes something else than this one. Kernels that sum in another order on "
                "one rank do this (try train.compile=false), and devices that compute wrongly"
            )

    def _snapshot(self, buffers: HostBuffers | None) -> Snapshot:
        self._warn_of_differing_copies()
        progress = self.progress
        losses, targets = self.ranks.sum(self.interval_sums).tolist()
        progress.interval_loss, progress.interval_targets = losses, int(targets)
        self._set_interval_sums()
        progress.skipped_steps = self.skipped_before + self.engine.skipped_steps
        progress.seconds = time.perf_counter() - self.started
        evaluation = self.last_evaluation if self.evaluated_step == progress.step else None
        loss = evaluation.overall.loss if evaluation is not None else math.nan
        return take_snapshot(
            self.run_dir / "checkpoints",
            self.engine.deepspeed,
            step=progress.step,
            run_config=self.run.model_dump(mode="json"),
            global_state={
                "progress": asdict(progress),
                "identity": identity(self.run, self.data),
                "data": self.data.training.state(),
            },
            marks={"validation_loss": loss if math.isfinite(loss) else None, "epoch": self._ended_epoch()},
            fingerprint=self._fingerprint(),
            tokenizer_files=self.data.tokenizer.files if self.data.tokenizer is not None else None,
            buffers=buffers,
        )

    def _set_interval_sums(self) -> None:
        """Let rank 0 carry the sums of all ranks, here as in a run that continues from this checkpoint."""
        self.interval_sums.zero_()
        if self.ranks.is_first:
            self.interval_sums += torch.tensor(
                [self.progress.interval_loss, self.progress.interval_targets], dtype=torch.float64
            ).to(self.ranks.device)


def dry_run(plan: Plan, engine: TrainingEngine) -> str:
    """One step with the largest batch; what it took."""
    started = time.perf_counter()
    first_sample = plan.run.data.first_sample
    with StepBatches(plan.data.training, plan.layout, plan.ranks, first_sample, steps=1) as batches:
        sums = engine.train_step(batches.next(), plan.run.optimizer.lr)
    loss_sum, targets = plan.ranks.sum(sums).tolist()
    return report.dry_run_table(plan, loss_sum / targets, engine.grad_norm, time.perf_counter() - started)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
