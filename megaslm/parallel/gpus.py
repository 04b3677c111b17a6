"""The GPUs that a run can be planned for: what they hold, compute and exchange. Nothing of it was measured here.

Sources: datasheets of the vendor for memory, peak and link; for what torch reports as the device's total memory, which
is less than the datasheet's, the messages of runs that were out of it.

    H200        nvidia.com/en-us/data-center/h200; 139.80 GiB in many such messages
    H100        nvidia.com/en-us/data-center/h100; 79.11 GiB (vllm-project/vllm issue 27508), NVL 93.00 (ali-vilab/VACE
                issue 56)
    A100        nvidia.com/en-us/data-center/a100; 79.25 GiB (HiDream-ai/VAREdit issue 6), 39.50 (TianheWu/CoSeR
                issue 10)
    L40S        nvidia.com/en-us/data-center/l40s; 44.43 GiB on a card of as many MiB by nvidia-smi, 46,068
                (modal-labs/modal-client pull request 2797, DINGYANB/MTVCrafter issue 21)
    RTX 4090    NVIDIA Ada GPU architecture whitepaper, appendix A: 165.2 TFLOP/s of bf16 summed in fp32; 23.64 GiB
                (3DTopia/Phidias-Diffusion issue 8)

Of fp32 it is the rate without tensor cores, of the same places: PyTorch multiplies fp32 matrices so by default.
"""

from dataclasses import dataclass

GIB = 2**30
RING_SHARE = 370 / 450
"""Of a link's line rate, what NCCL's rings get: measured for NVLink 4 (nccl-tests issue 212), assumed for others."""
CONTEXT_BYTES = 2.5 * GIB
FRAGMENTS = 0.05
"""Of all memory. With the former, what is kept free: both are assumed."""


PEAK_BF16_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}
"""Dense tensor-core peaks of bf16 in FLOP/s, without sparsity, and of fp16, which are the same, by the name that
torch.cuda.get_device_name() gives. A GPU that is not listed gets no MFU rather than a wrong one."""
PEAK_FP32_FLOPS = {
    "NVIDIA H200": 67e12,
    "NVIDIA H100 80GB HBM3": 67e12,
    "NVIDIA H100 NVL": 60e12,
    "NVIDIA A100-SXM4-80GB": 19.5e12,
    "NVIDIA A100-SXM4-40GB": 19.5e12,
    "NVIDIA L40S": 91.6e12,
    "NVIDIA GeForce RTX 4090": 82.6e12,
}
"""The same of fp32 outside of the tensor cores."""


@dataclass(frozen=True)
class GPU:
    """One device.

    title: for people; torch_names: what torch.cuda.get_device_name() says, by which results of benchmarks are found.
    nominal_bytes: the datasheet's memory, decimal GB as it is sold. total_bytes: what torch reports.
    link: bytes/s that it can send to another GPU of its node, line
    rate, one way. has_float8: whether it multiplies matrices in float8 (sm_89 or later).
    """

    title: str
    torch_names: tuple[str, ...]
    nominal_bytes: float
    total_bytes: float
    link: float
    link_name: str
    has_float8: bool = False

    def peak(self, precision: str) -> float | None:
        """Dense FLOP/s of matrix products in "fp32", "bf16" or "fp16"; None where it is not known."""
        peaks = PEAK_FP32_FLOPS if precision == "fp32" else PEAK_BF16_FLOPS
        return next((peaks[name] for name in self.torch_names if name in peaks), None)

    @property
    def usable_bytes(self) -> float:
        """What a run's own tensors may take."""
        return self.total_bytes - self.reserved_bytes

    @property
    def reserved_bytes(self) -> float:
        """For the context of CUDA, NCCL's buffers and fragments of torch's allocator. Assumed."""
        if not self.torch_names:  # a CPU rank: what is available of a machine is there for it
            return FRAGMENTS * self.total_bytes
        return CONTEXT_BYTES + FRAGMENTS * self.total_bytes

    @property
    def ring_rate(self) -> float:
        """Bytes/s that it sends within its node in a collective."""
        return RING_SHARE * self.link


NVLINK_4, NVLINK_3, PCIE_5, PCIE_4 = ("NVLink 4", 450e9), ("NVLink 3", 300e9), ("PCIe 5", 64e9), ("PCIe 4", 32e9)


def _gpu(title: str, torch_name: str, gigabytes: float, gib: float, link: tuple[str, float], float8=True) -> GPU:
    return GPU(title, (torch_name,), gigabytes * 1e9, gib * GIB, link[1], link[0], float8)


GPUS = {
    "h200": _gpu("H200", "NVIDIA H200", 141, 139.80, NVLINK_4),
    "h100": _gpu("H100 SXM", "NVIDIA H100 80GB HBM3", 80, 79.11, NVLINK_4),
    "h100_nvl": _gpu("H100 NVL", "NVIDIA H100 NVL", 94, 93.00, PCIE_5),
    "a100_80gb": _gpu("A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 80, 79.25, NVLINK_3, False),
    "a100_40gb": _gpu("A100 SXM 40 GB", "NVIDIA A100-SXM4-40GB", 40, 39.50, NVLINK_3, False),
    "l40s": _gpu("L40S", "NVIDIA L40S", 48, 44.43, PCIE_4),
    "rtx4090": _gpu("RTX 4090", "NVIDIA GeForce RTX 4090", 24, 23.64, PCIE_4),
}
"""By the names that `tools/plan.py --gpu` takes."""
