"""Load a compressed model from a folder or the Hub into a pipeline, and generate or serve.

    python examples/serve_pipeline.py small "Why does ice float on water?"
    python examples/serve_pipeline.py small --port 8000
    curl localhost:8000 -d '{"prompt": "Why does ice float on water?"}'

The first command prints an answer for every prompt. The second serves the same as JSON until Ctrl-C; it has no
authentication and is meant for this machine. A prompt goes through the chat template if the model has one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
from transformers import pipeline

import hf_compress  # noqa: F401  It teaches Transformers the format, so it stands before the model is loaded.

LONGEST_REQUEST = 2**20


def make_handler(answer: Callable[[str], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                length = min(int(self.headers["Content-Length"]), LONGEST_REQUEST)
                status, reply = 200, {"generated_text": answer(str(json.loads(self.rfile.read(length))["prompt"]))}
            except (KeyError, TypeError, ValueError):
                status, reply = 400, {"error": 'expected JSON such as {"prompt": "..."}'}
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or repository of a compressed model")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--port", type=int, help="serve on this port of this machine; 0 chooses one")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device-map", default="auto" if torch.accelerator.is_available() else None)
    arguments = parser.parse_args()
    if arguments.port is None and not arguments.prompts:
        parser.error("give a PROMPT, or --port to serve")

    generator = pipeline("text-generation", model=arguments.model, device_map=arguments.device_map)

    def answer(prompt: str) -> str:
        chat = generator.tokenizer.chat_template is not None
        question = [{"role": "user", "content": prompt}] if chat else prompt
        found = generator(question, max_new_tokens=arguments.max_new_tokens, do_sample=False, return_full_text=False)
        return str(found[0]["generated_text"]).strip()

    for prompt in arguments.prompts:
        print(f"> {prompt}\n{answer(prompt)}\n", flush=True)
    if arguments.port is not None:
        # One request after the other: a model in one process answers no faster side by side.
        with HTTPServer(("127.0.0.1", arguments.port), make_handler(answer)) as server:
            print(f"Serving on http://127.0.0.1:{server.server_port}", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print("Stopped")


if __name__ == "__main__":
    main()
