"""A model of transformers as a checkpoint, for continued pretraining and for megaslm's own tools.

    python tools/convert_from_hf.py --model meta/llama --output checkpoints/llama
    python tools/convert_from_hf.py --model downloads/gpt2 --output checkpoints/gpt2 --tokenizer downloads/tokenizer

Reads llama, mistral, qwen3, gpt2 and gpt_neox from safetensors files, whole or sharded, in fp32, bf16 or fp16. A model
that does anything our network does not is refused, with the key of its config.json that says so. Before the checkpoint
gets its name, transformers computes the logits of a text from the original, and they must agree to 1e-4.

In the checkpoint lies a run config, continue.json, with which pretraining continues from it; the commands for that are
printed.
"""

import argparse
import shlex

from megaslm.commands import interrupt_on_termination, run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR_OR_NAME", help="Hugging Face folder, or a hub name")
    parser.add_argument("--output", required=True, metavar="CHECKPOINT", help="folder to make, one checkpoint")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder or hub name (default: the model's own)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    interrupt_on_termination()
    from megaslm.checkpoint import import_model

    done = import_model(arguments.model, arguments.output, arguments.tokenizer)
    print(f"{done.checkpoint}: the checkpoint; {done.run_config}: a run config to continue from it")
    data = f"data/{done.run_name}"
    preprocess = ["python", "tools/preprocess_data.py", "--input", "TEXT", "--tokenizer", done.tokenizer or "TOKENIZER"]
    pretrain = ["python", "launch/pretrain.py", "--preset", done.run_config, "--resume", "weights"]
    print("\nTo continue its pretraining on a text of yours (rate, batch and length stand in the run config):\n")
    for words in ([*preprocess, "--output", data], [*pretrain, "--from", done.checkpoint, f"data.train={data}"]):
        print(f"    {shlex.join(map(str, words))}")


if __name__ == "__main__":
    run_command(main)
