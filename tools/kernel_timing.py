"""How benchmark_kernels.py measures: timers of the host and the device, and what they time."""

import math
import statistics
import time
from collections.abc import Callable

import torch
from kernel_cases import Absent, Case, Implementation, LinearCrossEntropy, implementation, standard
from kernel_report import judge
from torch import Tensor


class HostTimer:
    """Times of work that is done when its call returns."""

    minimum_bytes = 8e6
    """Moved by what is timed once: calls on several sets of inputs follow one another until they are."""
    cold_bytes = 64e6
    """Read before a sample, so that the caches hold nothing of its inputs."""
    has_queue = False

    def __init__(self, device):
        self.device = device
        self._cold = torch.ones(int(self.cold_bytes / 4), device=device)

    def synchronize(self) -> None:
        pass

    def samples(self, prepare: Callable[[], list], body: Callable[[list], object], count: int, host_us: float):
        """ms of `body(prepare())`, without prepare, `count` times with cold caches. host_us: of body on the host.

        What body returns is held until its time is taken, and let go of before the next sample.
        """
        found = []
        for _ in range(count):
            state = prepare()
            self._cold.sum()
            started = time.perf_counter()
            results = body(state)
            found.append(1e3 * (time.perf_counter() - started))
            del state, results
        return found

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        return None


class CudaTimer(HostTimer):
    """Times between events on the device."""

    minimum_bytes = 128e6
    has_queue = True
    CYCLES_PER_US = 2000  # a little above the clock of an H100 or H200 (1980 MHz)

    def __init__(self, device):
        self.device = device
        # Read and not written before each sample: the L2 is then full of lines that need not be written back on
        # the sample's time.
        self._cold = torch.ones(torch.cuda.get_device_properties(device).L2_cache_size, device=device)  # fp32: 4 x L2

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def samples(self, prepare, body, count, host_us):
        events = []
        for _ in range(count):
            state = prepare()
            self._cold.sum()
            # Holds the device until the host has queued all of body: no gap between its kernels is the host's.
            torch.cuda._sleep(int((2 * host_us + 50) * self.CYCLES_PER_US))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            results = body(state)
            end.record()
            del state, results
            events.append((start, end))
        self.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def peak_bytes(self, work):
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        self.synchronize()  # what it breaks on the device fails here, and not in the next one's row
        return torch.cuda.max_memory_allocated(self.device) - before


def measure(timer: HostTimer, prepare: Callable, body: Callable, calls: int) -> dict:
    """Figures of one call.

    body: of `prepare(n)`, which makes what n calls take; returns what they made. Held all together it has a place in
    memory for each call, as the targets of the copies do: written over, a small one would never leave the L2.
    calls: so many are one sample.
    """
    body(prepare(1))
    body(prepare(1))  # the first one compiled
    timer.synchronize()
    state = prepare(1)
    timer.synchronize()
    started = time.perf_counter()
    body(state)
    timer.synchronize()
    ms = 1e3 * (time.perf_counter() - started)
    # Few: a full queue would hold the host up, and 10 ms of calls cannot have written more than 50 GB to hold.
    in_a_row = max(2, min(10, int(10 / ms)))
    body(prepare(max(calls, in_a_row)))  # the allocator has the memory of all from here on
    host, end_to_end = [], []
    for _ in range(4):
        state = prepare(in_a_row)
        timer.synchronize()
        started = time.perf_counter()
        results = body(state)
        queued = time.perf_counter()
        timer.synchronize()
        host.append(1e6 * (queued - started) / in_a_row)
        end_to_end.append(1e6 * (time.perf_counter() - started) / in_a_row)
        del state, results
    host_us = statistics.median(host)
    count = max(5, min(25, int(100 / (calls * max(ms, host_us / 1e3)))))
    samples = [x / calls for x in timer.samples(lambda: prepare(calls), body, count, calls * host_us)]
    return {
        "calls": calls,
        "ms": statistics.median(samples),
        "ms_spread": spread(samples),
        "host_us": host_us if timer.has_queue else None,
        "end_to_end_us": statistics.median(end_to_end),
        "end_to_end_us_spread": spread(end_to_end),
    }


def spread(values: list[float]) -> float:
    """Distance of the quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


class Subject:
    """An implementation of a case with its sets of inputs, which are taken in turn."""

    def __init__(self, case: Case, found: Implementation, device: torch.device, sets: int, dtype=None):
        """dtype: of the arguments, where not the case's own; their values are those of the latter."""
        self.function, self._evaluates = found.function, case.evaluates
        inputs = [_converted(case.inputs(device, 10 * i), dtype or case.dtype) for i in range(sets)]
        self._arguments = [found.prepare(x) for x in inputs]
        self._evaluated = [[a.detach() if isinstance(a, Tensor) else a for a in x] for x in self._arguments]
        self._leaves = [[a for a in x if isinstance(a, Tensor) and a.requires_grad] for x in inputs]
        self._device, self._dtype = device, case.dtype
        self._upstream: list[list[Tensor]] = []

    def outputs(self, i: int) -> list[Tensor]:
        """The differentiable ones of a call on set i."""
        outputs = self.function(*self._arguments[i % len(self._arguments)])
        return [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]

    def gradients(self, i: int, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        i %= len(self._leaves)
        return torch.autograd.grad(outputs, self._leaves[i], self._upstream[i])

    def values(self) -> list[Tensor]:
        """Outputs and gradients of set 0. To be called first, and once: the inputs may have been written over after."""
        outputs = self.outputs(0)
        kept = [y.detach().clone() for y in outputs]
        generator = torch.Generator(self._device).manual_seed(1)
        upstream = [
            torch.randn(y.shape, generator=generator, device=self._device, dtype=self._dtype).to(y.dtype)
            for y in outputs
        ]
        self._upstream = [upstream, *([dy.clone() for dy in upstream] for _ in self._leaves[1:])]
        return [*kept, *self.gradients(0, outputs)]

    def work(self, direction: str) -> tuple[Callable, Callable]:
        """prepare and body of `measure`."""

        def forward(state):
            return [self.function(*self._arguments[i % len(self._arguments)]) for i in state]

        def evaluate(state):
            with torch.no_grad():
                return [self.function(*self._evaluated[i % len(self._evaluated)]) for i in state]

        def both(state):
            return [(outputs := self.outputs(i), self.gradients(i, outputs)) for i in state]

        def backward(state):
            results = []
            while state:  # each graph is let go of, as in training
                results.append(self.gradients(*state.pop()))
            return results

        if direction == "backward":
            return lambda calls: [(i, self.outputs(i)) for i in range(calls)], backward
        return range, both if direction == "both" else evaluate if self._evaluates else forward


def _converted(inputs: list, dtype: torch.dtype) -> list:
    """`inputs` with those that get a gradient in `dtype`."""
    return [
        x.detach().to(dtype).requires_grad_() if isinstance(x, Tensor) and x.requires_grad and x.dtype != dtype else x
        for x in inputs
    ]


class Standard:
    """The reference's outputs and gradients of a case in fp32, and how far another's may be from them."""

    RIVAL_LIMIT = 0.1
    """Of somebody else's implementation, which may round where it likes but must compute the same function."""

    def __init__(self, case: Case, device: torch.device):
        found = standard(case.op, device)
        self._exact = Subject(case, found, device, 1, torch.float32).values()
        # Twice what the same formulas lose in the same type, and what the order of a sum changes
        slack = 1e-4 if case.dtype == torch.float32 else 2e-3
        self._limits = [2 * error + slack for error in self.errors(Subject(case, found, device, 1).values())]

    def worst(self, values: list[Tensor], rival: bool) -> tuple[float, float]:
        """Error and limit of the output or gradient that is nearest to its limit, or farthest beyond it."""
        limits = [max(limit, self.RIVAL_LIMIT) if rival else limit for limit in self._limits]
        return max(zip(self.errors(values), limits, strict=True), key=lambda pair: pair[0] / pair[1])

    def errors(self, values: list[Tensor]) -> list[float]:
        """Of every output and gradient the largest error of a row (of an element, where there is one dimension),
        relative to the mean row; inf where something is not finite."""
        errors = []
        for value, exact in zip(values, self._exact, strict=True):
            exact = exact.reshape(-1, exact.size(-1) if exact.dim() > 1 else 1)
            # In pieces of rows: a difference of logits in fp32 would take gigabytes.
            pieces = zip(value.reshape(exact.shape).split(4096), exact.split(4096), strict=True)
            worst = torch.stack([(v.float() - e).norm(dim=1).max() for v, e in pieces]).max()
            errors.append(float(worst / exact.norm(dim=1).mean()))
        return [error if math.isfinite(error) else math.inf for error in errors]


class Benchmark:
    """Measures cases, each against the roof of its own bytes or products."""

    def __init__(self, backends: list[str], compiles: Callable[[Case], bool], timer: HostTimer, end: float):
        """compiles: whether torch.compile is measured at a case. end: of the time, in time.monotonic()."""
        self._backends, self._compiles, self._timer, self._end = backends, compiles, timer, end
        self._device = timer.device
        self._copies: dict[tuple[int, int], dict] = {}
        self.absent: dict[str, dict[str, list[str]]] = {}
        """Ops by implementation and reason."""
        self.fault: str | None = None
        """What took the device away, and how: nothing can be measured after it."""

    def out_of_time(self) -> bool:
        return time.monotonic() > self._end

    def roofs(self, dtype: torch.dtype) -> dict[str, float]:
        """Bandwidth of a large copy (bytes read and written) and rate of a large matrix product."""
        size, n = (2**30, 8192) if self._device.type == "cuda" else (2**26, 1024)
        x, y = (torch.randn(n, n, device=self._device, dtype=dtype) for _ in range(2))
        product = measure(self._timer, range, lambda calls: [x @ y for _ in calls], 1)
        return {
            "copy_gb_per_s": size / self._copy(size, 1)["ms"] / 1e6,
            "products_tflop_per_s": 2 * n**3 / product["ms"] / 1e9,
        }

    def rows_of(self, case: Case) -> list[dict]:
        """A row per implementation and direction, with the verdicts on ours. What failed says so in its status."""
        rows: list[dict] = []
        try:
            products = self._products(case) if isinstance(case, LinearCrossEntropy) else {}
            rows += products.values()
            reference = Standard(case, self._device)
        except Exception as fault:  # here and below: one that fails must not take the others' rows along
            return [*rows, row_of(case, "reference", "both", status=self._failure(case, "reference", fault))]
        for name in self._backends:
            if self.fault:
                break
            if name == "compile" and not self._compiles(case):
                continue
            try:
                found = implementation(case.op, name, self._device)
            except Absent as absence:
                ops = self.absent.setdefault(name, {}).setdefault(str(absence), [])
                ops += [case.op] if case.op not in ops else []
                continue
            rows += self._measured(case, name, found, reference, products)
        judge(rows)
        return rows

    def _measured(self, case: Case, name: str, found: Implementation, reference: Standard, products) -> list[dict]:
        rows = []
        calls = {d: self._calls(case, d) for d in case.directions}
        try:
            subject = Subject(case, found, self._device, max(calls.values()))
            error, limit = reference.worst(subject.values(), rival=name not in ("triton", "reference"))
            if error > limit:
                status = f"WRONG, not timed: relative error {error:.2g}, limit {limit:.2g}"
                return [row_of(case, name, d, status=status, error=error) for d in case.directions]
            for direction in case.directions:
                prepare, body = subject.work(direction)
                figures = measure(self._timer, prepare, body, calls[direction])
                peak = self._timer.peak_bytes(lambda prepare=prepare, body=body: body(prepare(1)))
                same = (case.traffic(direction), calls[direction])
                roof = products[direction] if products else self._copy(*same)
                rows.append(row_of(case, name, direction, figures, roof, peak, error=error))
        except Exception as fault:
            status = self._failure(case, name, fault)
            rows += [row_of(case, name, d, status=status) for d in case.directions[len(rows) :]]
        return rows

    def _failure(self, case: Case, name: str, error: Exception) -> str:
        """The status of rows that could not be measured; notes whether any others can be."""
        status = failure(error)
        if is_device_fault(error) or not self._device_answers():
            self.fault = f"{name} of {case.op} at {', '.join(f'{k} {v}' for k, v in case.sizes().items())}: {status}"
        return status

    def _device_answers(self) -> bool:
        try:
            self._timer.synchronize()
        except Exception:
            return False
        return True

    def _calls(self, case: Case, direction: str) -> int:
        """Calls of one sample: until enough is moved. The linear loss is bound by its products."""
        if isinstance(case, LinearCrossEntropy):
            return 1
        return math.ceil(self._timer.minimum_bytes / case.traffic(direction))

    def _copy(self, size: int, calls: int) -> dict:
        """Figures of a copy that moves `size` bytes, read and written, measured as the ops are."""
        if (size, calls) not in self._copies:
            pairs = [torch.ones(2, size // 2, dtype=torch.int8, device=self._device) for _ in range(calls)]

            def body(state):
                for i in state:
                    source, target = pairs[i % calls]
                    target.copy_(source)

            self._copies[size, calls] = measure(self._timer, range, body, calls)
        return self._copies[size, calls]

    def _products(self, case: LinearCrossEntropy) -> dict[str, dict]:
        """Rows of its matrix products, by direction."""
        rows = {}
        for direction in case.directions:
            run = case.products(direction, self._device)
            figures = measure(self._timer, range, lambda calls, run=run: [run() for _ in calls], 1)
            rows[direction] = row_of(case, "products", direction, figures, figures)
        return rows


def row_of(
    case: Case, name: str, direction: str, figures: dict | None = None, roof: dict | None = None,
    peak: int | None = None, status: str = "ok", **more,
) -> dict:  # fmt: skip
    """A row of the results, from the figures of `measure` and those of its roof. MB and GB are 10^6 and 10^9 bytes;
    sizes, bytes and FLOP are those of one call."""
    size, flop = case.traffic(direction), case.flops(direction)
    row = {"op": case.op, "shape": case.sizes(), "direction": direction, "implementation": name, "status": status}
    row |= {"bytes": size, "flop": flop, **more}
    if figures is None:
        return row
    return row | figures | {
        "gb_per_s": size / figures["ms"] / 1e6,
        "tflop_per_s": flop / figures["ms"] / 1e9,
        "roof": "products" if isinstance(case, LinearCrossEntropy) else "copy",
        "roof_ms": roof["ms"],
        "roof_ms_spread": roof["ms_spread"],
        "percent_of_roof": 100 * roof["ms"] / figures["ms"],
        "peak_mb": None if peak is None else peak / 1e6,
    }  # fmt: skip


def is_device_fault(error: Exception) -> bool:
    """Whether it is one of the device, such as an access to memory that is not ours: every later call fails too."""
    if is_out_of_memory(error):
        return False
    texts = ("CUDA error", "illegal memory access")
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def is_out_of_memory(error: Exception) -> bool:
    # Other libraries than torch's allocator fail with an error of their own.
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error)
    )


def failure(error: Exception) -> str:
    """The status of a row that could not be measured."""
    if is_out_of_memory(error):
        return "out of memory"
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
