"""Export SmolLM2-135M-Instruct as files that a program without Python runs: model.so, model.safetensors, and prompts as token ids.

    python examples/03_deploy.py --out smollm2 --prompt "The capital of France is" --prompt "Once upon a time"
    examples/cpp/build.sh                                       # builds the program, and says how to start it
    … generate smollm2/model.so smollm2/model.safetensors smollm2/prompts.txt | python examples/03_deploy.py --read

--read turns the token ids that the program prints into text. Any other plain Llama GGUF goes with --model.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import tvm_infer
from tvm_infer.models import find_smollm2, load_gguf

PROMPTS = ["The capital of France is", "Once upon a time, there was a"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FOLDER", type=pathlib.Path, default=pathlib.Path("smollm2"))
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="to be continued; repeatable")
    parser.add_argument("--model", metavar="FILE.gguf", default=None)
    parser.add_argument("--read", action="store_true", help="print token ids of the standard input as text")
    arguments = parser.parse_args()
    model = load_gguf(arguments.model or find_smollm2())
    if arguments.read:
        for line in sys.stdin:
            print(repr(model.tokenizer.decode([int(word) for word in line.split()])))
        return

    # The library holds the code, and all that it needs of tvm_infer; the weights are a file of their own.
    executable = tvm_infer.compile(model)
    executable.save(arguments.out)
    lines = [" ".join(map(str, model.tokenizer.encode(text))) for text in arguments.prompt or PROMPTS]
    (arguments.out / "prompts.txt").write_text("".join(line + "\n" for line in lines))
    for path in sorted(arguments.out.iterdir()):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
