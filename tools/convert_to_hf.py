"""Export a model to a Hugging Face folder, and prove it equal. Needs no GPU and no DeepSpeed.

    python tools/convert_to_hf.py --checkpoint runs/NAME --output DIR

--checkpoint is a checkpoint, a run folder (its newest sound checkpoint), or a link such as lm_current. One tensor is in
memory at a time. Then transformers opens the result, and its logits are compared with those of megaslm, both in fp32:
if they differ by more than 1e-4, nothing is left and the exit code is 2.
"""

import argparse
import re
import signal
from pathlib import Path

from megaslm.commands import run_command
from megaslm.errors import UserError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a checkpoint, a run folder or a link")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make; not there, or empty")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="type of the weights (bf16; of an imported model, its own)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder instead of the one found")
    parser.add_argument("--without_tokenizer", action="store_true", help="export a model whose tokenizer is not known")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to compare logits on (Python's own source)")
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="largest file of weights (5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it is an export of megaslm")
    parser.add_argument("--push_to_hub", metavar="NAME", help="also upload to this repository of the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make the repository of --push_to_hub private")
    arguments = parser.parse_args()
    if arguments.private and arguments.push_to_hub is None:
        raise UserError("--private is of --push_to_hub NAME; give that too, or leave it out")
    return arguments


def bytes_of(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", size.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UserError(f"--max_shard_size {size!r} is no size: give one such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} can't be read: {error}") from None


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def main() -> None:
    arguments = parse_arguments()
    max_shard_bytes = bytes_of(arguments.max_shard_size)
    text = text_of(arguments.text) if arguments.text else None
    from megaslm.checkpoint import DamagedCheckpoint, export_checkpoint, open_model, push_export, sign_in

    for name in ("SIGTERM", "SIGHUP"):  # end as by Ctrl-C, which leaves nothing half-written
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), interrupt)
    if arguments.push_to_hub:
        sign_in(arguments.push_to_hub)  # before the work

    def export(verify: bool):
        source = open_model(arguments.checkpoint, arguments.tokenizer, verify=verify)
        print(f"converting {source.path}", flush=True)
        return export_checkpoint(
            source,
            arguments.output,
            dtype=arguments.dtype,
            max_shard_bytes=max_shard_bytes,
            text=text,
            without_tokenizer=arguments.without_tokenizer,
            overwrite=arguments.overwrite,
            name=arguments.push_to_hub,
            report=lambda line: print(line, flush=True),
        )

    try:
        result = export(verify=False)  # the conversion itself compares the hashes
    except DamagedCheckpoint:
        result = export(verify=True)  # of a run, the newest sound one; of a checkpoint by its name, the same error
    print(f"export: {arguments.output} ({result.bytes / 1e9:.2f} GB, {result.family}, {result.dtype})")
    if arguments.push_to_hub:
        print(f"uploaded: {push_export(result.path, arguments.push_to_hub, private=arguments.private)}")


if __name__ == "__main__":
    run_command(main)
