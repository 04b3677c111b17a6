# The environment of GPU ranks on H100 and H200 nodes, each line with its reason. Sourced by node.sh, cluster.sh and
# slurm.sbatch; what is set already stays. MEGASLM_DEFAULTS names what is set here, MEGASLM_GIVEN what was set before:
# for the other nodes, and since CPU ranks go without these defaults.
# Not yet measured on a GPU.
# shellcheck shell=bash

decide() { # NAME VALUE
    if [ -n "${!1+set}" ]; then
        export MEGASLM_GIVEN="${MEGASLM_GIVEN:-} $1"
    else
        export "$1=$2" MEGASLM_DEFAULTS="${MEGASLM_DEFAULTS:-} $1"
    fi
}

# --- the allocator ---
# Segments that grow instead of many of fixed sizes: what a longer micro-batch or a checkpoint leaves free can be used
# again, so that the largest micro-batch that fits really fits (pytorch, CUDA semantics: optimizing memory usage).
# The old name of the variable on purpose: torch 2.9.1 ignores this setting under the new one, PYTORCH_ALLOC_CONF
# (pytorch issue 183387), and every version from 2.9 to 2.13 reads the old one. Some print once that it is old.
if [ -z "${PYTORCH_ALLOC_CONF:-}" ]; then
    decide PYTORCH_CUDA_ALLOC_CONF expandable_segments:True
else
    decide PYTORCH_ALLOC_CONF "" # the user's
fi

# --- the host ---
# Threads of a rank. Left alone every rank takes all cores, and eight of them fight; what runs on the host in a step
# is small. (Counted for 8 ranks and 64 cores or more; torchrun would set 1.)
decide OMP_NUM_THREADS 8

# --- caches of compiled kernels ---
# On a local disk: in a home folder on a network file system, ranks of many nodes wait for each other's locks and files.
# Not in $TMPDIR, which may be another folder on every node: these names are sent to all of them.
caches="/tmp/megaslm_${USER:-$(id -un)}"
decide TRITON_CACHE_DIR "$caches/triton"
decide TORCHINDUCTOR_CACHE_DIR "$caches/inductor"
unset caches

# --- errors instead of hangs ---
# NCCL's watchdog ends a rank whose collective failed or timed out, so that the launcher ends the others; 3 is torch's
# own default, written down since a 0 that a cluster's profile sets turns it off (pytorch, ProcessGroupNCCL variables).
decide TORCH_NCCL_ASYNC_ERROR_HANDLING 3
# Minutes that a collective may take; 10 if left alone (deepspeed/constants.py). Ranks compile at their first step, and
# on a cold cache the slowest of many may keep the others waiting for longer than that.
decide DEEPSPEED_TIMEOUT 30
# NCCL's own warnings, and nothing else; INFO where the check of the all-reduce finds it slow.
decide NCCL_DEBUG WARN

# --- compiling DeepSpeed's own kernels ---
# Nothing is compiled: the optimizer is torch's. Where a user's engine config asks for an op of DeepSpeed, this is the
# only architecture it is built for (under CUDA 13 DeepSpeed's default has none that an H200 is).
decide TORCH_CUDA_ARCH_LIST 9.0

# Left alone on purpose:
# - NCCL_NVLS_ENABLE, NCCL_ALGO, NCCL_PROTO, NCCL_IB_*, NCCL_NET_GDR_LEVEL, NCCL_CROSS_NIC: NCCL finds NVLink SHARP,
#   the rails and the network by itself, and its manual warns against settings of a debugging session that stay.
#   On a network that it gets wrong: NCCL_SOCKET_IFNAME (the interface of the first contact), NCCL_IB_HCA (the ports).
# - CUDA_DEVICE_MAX_CONNECTIONS=1: orders kernels for the overlap of tensor-parallel collectives with matrix products as
#   in Megatron-LM (issue 533); we overlap none of them, and it would keep ZeRO's own streams from running side by side
#   (nanotron issue 236).
# - TORCH_NCCL_AVOID_RECORD_STREAMS: torch does always what it once asked for (pytorch pull request 194701).
# - DS_SKIP_CUDA_CHECK: needed only to compile DeepSpeed's ops with another CUDA than torch's.
