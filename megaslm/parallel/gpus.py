"""The GPUs that a run can be planned for: what they hold, compute and exchange. Nothing of it was measured here.

Sources: datasheets of the vendor for peaks and link; for what torch reports as the device's total memory, which
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


@dataclass(frozen=True)
class GPU:
    """One device. Peaks are dense rates of matrix products in FLOP/s, without sparsity; None where they are not known.

    title: for people. torch_name: what torch.cuda.get_device_name() says, by which results of benchmarks are found;
    None of a CPU rank.
    total_bytes: what torch reports as its memory.
    link: bytes/s that it can send to another GPU of its node, line rate, one way.
    bf16_flops: by tensor cores; of fp16 too, which is the same. fp32_flops: without them.
    has_float8: whether it multiplies matrices in float8 (sm_89 or later).
    """

    title: str
    torch_name: str | None
    total_bytes: float
    link: float
    link_name: str
    bf16_flops: float | None = None
    fp32_flops: float | None = None
    has_float8: bool = False

    def peak(self, precision: str) -> float | None:
        """Of "fp32", "bf16" or "fp16"."""
        return self.fp32_flops if precision == "fp32" else self.bf16_flops

    @property
    def usable_bytes(self) -> float:
        """What a run's own tensors may take."""
        return self.total_bytes - self.reserved_bytes

    @property
    def reserved_bytes(self) -> float:
        """For the context of CUDA, NCCL's buffers and fragments of torch's allocator. Assumed."""
        if self.torch_name is None:  # a CPU rank: what is available of a machine is there for it
            return FRAGMENTS * self.total_bytes
        return CONTEXT_BYTES + FRAGMENTS * self.total_bytes

    @property
    def ring_rate(self) -> float:
        """Bytes/s that it sends within its node in a collective."""
        return RING_SHARE * self.link


NVLINK_4, NVLINK_3, PCIE_5, PCIE_4 = (450e9, "NVLink 4"), (300e9, "NVLink 3"), (64e9, "PCIe 5"), (32e9, "PCIe 4")

GPUS = {
    "h200": GPU("H200", "NVIDIA H200", 139.80 * GIB, *NVLINK_4, 989e12, 67e12, True),
    "h100": GPU("H100 SXM", "NVIDIA H100 80GB HBM3", 79.11 * GIB, *NVLINK_4, 989e12, 67e12, True),
    "h100_nvl": GPU("H100 NVL", "NVIDIA H100 NVL", 93.00 * GIB, *PCIE_5, 835e12, 60e12, True),
    "a100_80gb": GPU("A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 79.25 * GIB, *NVLINK_3, 312e12, 19.5e12),
    "a100_40gb": GPU("A100 SXM 40 GB", "NVIDIA A100-SXM4-40GB", 39.50 * GIB, *NVLINK_3, 312e12, 19.5e12),
    "l40s": GPU("L40S", "NVIDIA L40S", 44.43 * GIB, *PCIE_4, 362e12, 91.6e12, True),
    "rtx4090": GPU("RTX 4090", "NVIDIA GeForce RTX 4090", 23.64 * GIB, *PCIE_4, 165.2e12, 82.6e12, True),
}
"""By the names that `tools/plan.py --gpu` takes."""

PEAK_BF16_FLOPS = {gpu.torch_name: gpu.bf16_flops for gpu in GPUS.values()} | {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
}
"""Peaks in bf16 by torch's name, also of GPUs that no run can be planned for. A GPU that is not listed gets no MFU
rather than a wrong one."""
