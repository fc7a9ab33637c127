"""An OpenAI server of vLLM that serves token ids."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from loopexport.checks.vllm import ENGINE, ENVIRONMENT


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        address: its URL, without a path.
        model: the name of the model that it serves.
    """

    address: str
    model: str

    def complete(self, prompt: list[int], count: int, **options) -> dict:
        """The first choice of the answer to a prompt: `count` greedy tokens, in `token_ids`."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "detokenize": False, **options}
        request = Request(f"{self.address}/v1/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urlopen(request) as answer:
            return json.load(answer)["choices"][0]

    def metric(self, name: str) -> float:
        """The sum of a counter, over its labels."""
        with urlopen(f"{self.address}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


@contextmanager
def running_server(
    python: str, export: Path, environment: dict[str, str], folder: Path, port: int, **options
) -> Iterator[Server]:
    """A server that answers.

    Args:
        python: the interpreter that has vLLM.
        export: the directory to serve.
        environment: variables for the server.
        folder: where it runs and writes its log.
        port: where it listens.
        **options: engine arguments, in addition to those of `verify --runtime vllm`.
    """
    options = {**ENGINE, "max_model_len": 192, "model": export, "port": port, **options}
    flags = [_flag(name.replace("_", "-"), value) for name, value in options.items()]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *flags, "--skip-tokenizer-init"]
    variables = {**os.environ, **ENVIRONMENT, **environment}
    del variables["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=log, cwd=folder)
    try:
        running = Server(f"http://127.0.0.1:{port}", str(export))
        while not _is_ready(running):
            assert server.poll() is None, (folder / "log").read_text()[-2000:]
            time.sleep(1)
        yield running
    finally:
        server.terminate()
        server.wait()


def _flag(name: str, value) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


def _is_ready(server: Server) -> bool:
    try:
        urlopen(f"{server.address}/health").close()
    except URLError:
        return False
    return True
