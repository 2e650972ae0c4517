"""A portable checkpoint as a GGUF file, read by Transformers and run by llama.cpp, beside the checkpoint itself.

    pip download llama-cpp-python --no-deps --no-binary llama-cpp-python   # holds llama.cpp's sources; unpack it
    cmake -S SOURCES/vendor/llama.cpp -B BUILD -DCMAKE_BUILD_TYPE=Release && cmake --build BUILD --target llama-simple
    python tests/benchmarks/convert_gguf.py --model PORTABLE --llama-cpp SOURCES/vendor/llama.cpp \\
        --binary BUILD/bin/llama-simple

The model is one that `hf-compress run MODEL PORTABLE --portable ...` has written. Prints a JSON line: the largest
difference between the logits of the two as Transformers loads them, and what both continue a text with, greedily.
llama.cpp's script needs the package sentencepiece.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "The capital of France is"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a portable checkpoint, with its tokenizer")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="sources of llama.cpp")
    parser.add_argument("--binary", type=Path, help="its built program llama-simple")
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    continued = model.generate(**prompt, max_new_tokens=arguments.tokens, do_sample=False)[0]
    line = {"width": model.config.intermediate_size, "transformers": tokenizer.decode(continued)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        script = arguments.llama_cpp / "convert_hf_to_gguf.py"
        path = os.pathsep.join([str(arguments.llama_cpp / "gguf-py"), os.environ.get("PYTHONPATH", "")])
        subprocess.run(
            [sys.executable, str(script), str(arguments.model), "--outfile", str(file), "--outtype", "f32"],
            check=True,
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.DEVNULL,
        )
        line["gguf_bytes"] = file.stat().st_size
        again = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
        ids = torch.randint(3, model.config.vocab_size - 3, (2, 64), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            line["largest difference of logits"] = float((again(ids).logits - model(ids).logits).abs().max())
        if arguments.binary is not None:
            command = [str(arguments.binary), "-m", str(file), "-n", str(arguments.tokens), "-ngl", "0", PROMPT]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            line["llama.cpp"] = done.stdout.strip()
    print(json.dumps(line, indent=1))


if __name__ == "__main__":
    main()
