"""How fast training steps are, here and elsewhere: cases, ranks that take them, and what was found."""

from megaslm.throughput.benchmark import MAX_ACCUMULATION, Progress, run_benchmark
from megaslm.throughput.case import Case
from megaslm.throughput.peers import PEERS
from megaslm.throughput.plot import draw_results
from megaslm.throughput.ranks import start_ranks
from megaslm.throughput.results import result_lines, write_report, write_results

__all__ = [
    "MAX_ACCUMULATION",
    "PEERS",
    "Case",
    "Progress",
    "draw_results",
    "result_lines",
    "run_benchmark",
    "start_ranks",
    "write_report",
    "write_results",
]
