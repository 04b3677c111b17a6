"""Export a model to a Hugging Face folder, and prove it equal. Needs no GPU and no DeepSpeed.

    python tools/convert_to_hf.py --checkpoint runs/NAME --output DIR

--checkpoint is a checkpoint, a run folder (its newest sound checkpoint), or a link such as lm_current. One tensor is in
memory at a time. Then transformers opens the result, and its logits are compared with those of megaslm, both in fp32:
if they differ by more than 1e-4, and by more than two ways of transformers itself to compute attention do, nothing is
left and the exit code is 2. Nothing that lies in the folder is executed.
"""

import argparse
import re
from pathlib import Path

from megaslm.commands import interrupt_on_termination, run_command
from megaslm.errors import UserError

TEXT_CHARACTERS = 1 << 16
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a checkpoint, a run folder or a link")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make; not there, or empty")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="type of the weights (bf16; of an imported model, its own)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder instead of the one found")
    parser.add_argument("--without_tokenizer", action="store_true", help="export the model alone")
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
    """The beginning, which is more than is compared."""
    try:
        if not path.is_file():
            raise UserError(f"--text {path} is no file")
        with open(path, encoding="utf-8") as file:
            return file.read(TEXT_CHARACTERS)
    except (OSError, ValueError) as error:
        raise UserError(f"--text {path} can't be read: {error}") from None


def main() -> None:
    arguments = parse_arguments()
    max_shard_bytes = bytes_of(arguments.max_shard_size)
    text = None if arguments.text is None else text_of(arguments.text)
    from megaslm.checkpoint import DamagedCheckpoint, export_checkpoint, open_model, push_export, sign_in

    interrupt_on_termination()
    repository = arguments.push_to_hub
    if repository is not None:
        repository = sign_in(repository, arguments.private)  # before the work

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
            name=repository,
            report=lambda line: print(line, flush=True),
        )

    try:
        result = export(verify=False)  # the conversion itself compares the hashes
    except DamagedCheckpoint:
        result = export(verify=True)  # of a run, the newest sound one; of a checkpoint by its name, the same error
    print(f"export: {arguments.output} ({result.bytes / 1e9:.2f} GB, {result.family}, {result.dtype})")
    if repository is not None:
        print(f"uploaded: {push_export(result.path, repository, private=arguments.private)}")


if __name__ == "__main__":
    run_command(main)
