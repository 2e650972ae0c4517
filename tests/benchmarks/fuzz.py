"""Thousands of damaged checkpoints: each is refused with an error or loads and runs, and nothing else happens.

    python tests/benchmarks/fuzz.py --cases 20000

Small checkpoints of every module type are changed at random, by a seed, and loaded with a plain `from_pretrained` in a
worker process. What loads is run once and its report and card are printed. A violation is a crash of the process, more
than 20 seconds, more memory than twice the file's size and 64 MiB for the libraries, a file opened for writing, an
import, a process, a connection, or an error that left our code and is none of ours. Large checkpoints that are whole
are loaded as well, for the memory. Prints one JSON object; the exit status is 1 if there was a violation.

`--only SEED:NUMBER` repeats one case.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

# Before the tests' conftest, whose hook would check shapes at run time.
import hf_compress.cli
import hf_compress.hub
import hf_compress.training

sys.path.insert(0, str(Path(__file__).parents[1]))
SECONDS = 20
# For the libraries: allocators, thread pools, the code of operators that are used for the first time.
CONSTANT = 64 << 20
ADDRESS_SPACE = 4 << 30
# For what is worked out piece by piece, of a load that is not the first one.
FIXED = 16 << 20


def card_of(folder: Path) -> str | None:
    """What is wrong with the card of a checkpoint, if it has one."""
    try:
        card = hf_compress.hub.folder_card(folder)
    except hf_compress.CompressionError:
        return None
    except Exception as error:  # the card's own errors are the only ones that it may have
        return f"card: {type(error).__qualname__}: {str(error)[:200]}"
    body = card.partition("\n---\n")[2]
    text = body.split("```")[::2]  # outside of the fences, in which nothing is markup
    for mark in ("<script", r"(?<!\\)\]\((javascript|http://127)", "\x1b", "\u202e"):
        if any(re.search(mark, part) for part in text):
            return f"card: {mark!r} got through"
    if body.count("<!-- hf_compress: end -->") != 1:
        return "card: the mark of our section got through"
    commands = body.split("```bash")[1:]
    if any("hf_compress_was_here" in command.split("```")[0] for command in commands):
        return "card: a command got through"
    return None


def work(arguments: argparse.Namespace) -> None:
    """The worker: one line of JSON when a case begins and one when it ends."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    from support.checkpoints import KINDS, attempt
    from support.mutation import Checkpoint, mutate
    from support.watching import Peak, Watch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(50)
    seeds = {name: Checkpoint.read(arguments.folder / name) for name in KINDS}
    watch, peak = Watch(), Peak()
    # What is imported at the first use of a class, or for an error's text, has been imported then.
    for name in KINDS:
        seeds[name].write(arguments.folder / "case")
        assert attempt(arguments.folder / "case", name) == ("loaded", ""), name
        assert card_of(arguments.folder / "case") is None
    for number in range(400):
        name = list(KINDS)[number % len(KINDS)]
        mutate(seeds[name], f"warm:{number}").write(arguments.folder / "case")
        attempt(arguments.folder / "case", name)
        card_of(arguments.folder / "case")
    gc.collect()
    gc.freeze()  # collecting garbage would go over all the libraries for every case
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, used + ADDRESS_SPACE))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, in whatever it is
    for number in range(arguments.first, arguments.last):
        print(json.dumps({"begin": number}), flush=True)
        name = list(KINDS)[number % len(KINDS)]
        checkpoint = mutate(seeds[name], f"{arguments.seed}:{number}")
        folder = arguments.folder / "case"
        checkpoint.write(folder)
        size = len(checkpoint.config) + len(checkpoint.weights)
        gc.collect()
        peak.start()
        signal.alarm(SECONDS)
        with watch.listening():
            outcome, detail = attempt(folder, name)
        signal.alarm(0)
        taken = peak.bytes() or 0
        problems = [*watch.events]
        if outcome == "unclean" or "MemoryError" in detail:
            problems.append(detail)
        if taken > 2 * size + CONSTANT:
            problems.append(f"{taken:,} bytes of memory for files of {size:,}")
        if number % 4 == 0:
            with watch.listening():
                shown = card_of(folder)
            problems += [f"card: {event}" for event in watch.events] + ([] if shown is None else [shown])
        found = {"end": number, "outcome": outcome, "error": detail, "problems": problems, "memory": taken}
        print(json.dumps({**found, "kind": name}), flush=True)


def large(folder: Path) -> dict[str, float]:
    """Peak memory of a load beyond the file itself, over the file's size, for large checkpoints of one kind of matrix.

    Linux counts the file as well, whose pages are mapped. What does not grow with the file is left out.
    """
    code = (
        "import sys, json, gc; sys.path.insert(0, sys.argv[3])\n"
        "import hf_compress, torch, os; from support.watching import Peak; from pathlib import Path\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[2]); gc.collect(); peak = Peak(); peak.start()\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(json.dumps([peak.bytes(), os.path.getsize(Path(sys.argv[1]) / 'model.safetensors')]))\n"
    )
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    recipes: dict[str, Any] = {
        "pruned, gaps": hf_compress.PruningConfig(sparsity=0.95, criterion="magnitude"),
        "pruned, mask": hf_compress.PruningConfig(sparsity=0.6, criterion="magnitude"),
        "pruned, int8": hf_compress.PruningConfig(sparsity=0.95, criterion="magnitude", values="int8"),
        "coded, 1.58 bits": hf_compress.CodebookConfig(bits=1.58, learning="none"),
        "coded, 3 bits": hf_compress.CodebookConfig(bits=3, learning="none"),
    }
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 1}
    ratios = {}
    for name, recipe in recipes.items():
        torch.manual_seed(0)
        # Learning codes for as many weights would take minutes.
        width = 8192 if name.startswith("coded") else 32_768
        config = LlamaConfig(vocab_size=64, intermediate_size=width, tie_word_embeddings=True, **sizes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        hf_compress.compress(model, recipe).save_pretrained(folder / "large")
        small = folder / ("coded, tied" if name.startswith("coded") else "pruned, gaps")
        command = [sys.executable, "-c", code, str(folder / "large"), str(small), str(Path(__file__).parents[1])]
        taken, size = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratios[name] = None if taken is None else round(max(taken - size - FIXED, 0) / size, 2)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--only", help="SEED:NUMBER of one case")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--last", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        work(arguments)
        return
    seed, first, last = arguments.seed, 0, arguments.cases
    if arguments.only:
        seed, _, number = arguments.only.rpartition(":")
        first, last = int(number), int(number) + 1
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        from support.checkpoints import KINDS, save

        for name in KINDS:
            save(name, folder / name)
        (folder / "case").mkdir()
        records: list[dict[str, Any]] = []
        violations: list[dict[str, Any]] = []
        while first < last:
            command = [sys.executable, __file__, "--folder", str(folder), "--seed", seed]
            command += ["--first", str(first), "--last", str(last)]
            log = folder / "stderr"  # a pipe that nobody reads would fill up
            with (
                log.open("w") as errors,
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as worker,
            ):
                assert worker.stdout is not None
                open_case = None
                for line in worker.stdout:
                    found = json.loads(line) if line.startswith("{") else {}
                    open_case = found.get("begin", open_case)
                    if "end" in found:
                        records.append(found)
                        first, open_case = found["end"] + 1, None
            told = log.read_text(errors="replace")[-2000:]
            if worker.returncode and open_case is None:
                raise SystemExit(f"the worker failed before a case:\n{told}")
            if open_case is not None:
                lines = told.strip().splitlines()[-3:]
                violations.append({"case": f"{seed}:{open_case}", "ended": worker.returncode, "error": lines})
                first = open_case + 1
        ratios = large(folder) if not arguments.only else {}
    violations += [
        {"case": f"{seed}:{one['end']}", "kind": one["kind"], "problems": one["problems"]}
        for one in records
        if one["problems"]
    ]
    violations += [
        {"large": name, "memory beyond the file": ratio} for name, ratio in ratios.items() if (ratio or 0) > 2.1
    ]
    outcomes = collections.Counter(one["outcome"] for one in records)
    refused = collections.Counter(one["error"] for one in records if one["outcome"] == "refused")
    raised = collections.Counter(one["error"] for one in records if one["outcome"] == "forward raised")
    most = max((one["memory"] for one in records), default=0)
    summary = {
        "cases": len(records),
        "outcomes": dict(outcomes.most_common()),
        "refused by": dict(refused.most_common()),
        "forward raised": dict(raised.most_common()),
        "most memory of a case, MiB": round(most / 2**20, 1),
        "memory of a load beyond the file, over its size": ratios,
        "seconds": round(time.monotonic() - began),
        "violations": len(violations),
        "of these": violations[:50],
    }
    print(json.dumps(summary, indent=1))
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
