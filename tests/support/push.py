"""Push an export to the Hub double, and look at what the client sent and what the Hub received."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from loopexport.cli import main
from support.commands import sha256, tree
from support.hub_requests import OWNER_TOKEN

# Clients before version 2 cannot copy between repositories, and do not check the write permission in advance.
HAS_COPY = "src_repo_id" in inspect.signature(huggingface_hub.CommitOperationCopy).parameters
copies = pytest.mark.skipif(not HAS_COPY, reason="this huggingface_hub cannot copy between repositories")
# The command line, with short waits between the client's retries.
RUN = """
import sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
from loopexport.cli.commands import main
main(sys.argv[1:], prog_name="loopexport")
"""
BASE = "org/base"
REPO = "me/Looped"
CARD = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Base\n"


def environment(hub, home, token=OWNER_TOKEN):
    """The environment of a client of the Hub double."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    return {**os.environ, **settings, **({"HF_TOKEN": token} if token else {})}


def loopexport_process(hub, home, *arguments, token=OWNER_TOKEN):
    """Run the command line in its own process, as a user does."""
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(hub, home, token))


def loopexport_command(hub, home, *arguments, token=OWNER_TOKEN):
    """Run the command line in this process, with the settings that a new process would read.

    Clients before version 2 keep copies of the settings in many places, so with them it is a process of its own.
    """
    if not HAS_COPY:
        return loopexport_process(hub, home, *arguments, token=token)
    with this_process_as_a_client(hub, home, token):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(returncode=result.exit_code, stdout=result.stdout, stderr=result.stderr)


@contextmanager
def this_process_as_a_client(hub, home, token):
    """Set the Hub's settings, also in the `constants` of huggingface_hub, which read them once at import."""
    variables = {name: value for name, value in environment(hub, home, token).items() if name.startswith("HF_")}
    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DOWNLOAD_TIMEOUT": 5,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        for name, value in values.items():
            patch.setattr(constants, name, value, raising=False)
        patch.setattr(time, "sleep", _short_sleep)
        yield


def _short_sleep(seconds, sleep=time.sleep):
    """Shorten the client's waits between retries, not the waits of the Hub double."""
    is_hub = "process_request_thread" in threading.current_thread().name
    sleep(seconds if is_hub else min(seconds, 0.01))


def pushed(done):
    """The JSON object that a successful push printed."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_refused(done, says):
    """Assert that a command failed with one error line that contains `says`, and printed nothing else."""
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.stderr
    assert says in errors[0], errors
    assert "Traceback" not in done.stderr


def weights(root):
    return {path.name: sha256(path) for path in root.glob("*.safetensors")}


def bytes_received(hub):
    return sum(hub.received.values())


def writes(hub):
    """The requests so far that change something on the Hub."""
    reads = ("/paths-info/", "/api/validate-yaml")
    return [
        (method, path) for method, path in hub.asked if method in ("POST", "PUT") and not any(r in path for r in reads)
    ]


def edit_manifest(root, change):
    values = json.loads((root / "loopexport.json").read_text())
    change(values)
    (root / "loopexport.json").write_text(json.dumps(values, indent=2) + "\n")


def write_listed(root, name, text):
    """Write a file and record it in the manifest, as the conversion does."""
    (root / name).write_text(text)
    record = {"size": len(text.encode()), "sha256": sha256(root / name)}
    edit_manifest(root, lambda values: values["files"].update({name: record}))


TOKEN = "hf_" + "a1B2" * 8


def remote_card(hub):
    return hub.repositories[REPO].files()["README.md"].decode()


def edit_loop(root, steps):
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "loop_steps": steps}))


def assert_whole_or_untouched(hub, export, is_whole):
    """Assert that the branch has the whole export, or nothing of it."""
    repository = hub.repositories.get(REPO)
    names = set() if repository is None else set(repository.files()) - {".gitattributes"}
    assert names == (set(tree(export)) if is_whole else set())


def start_push(hub, export):
    command = [sys.executable, "-c", RUN, "push", str(export), REPO, "--no-server-copy"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment(hub, Path(export).parent / "home"), **quiet)


LOAD = """
import sys
sys.modules["loopexport"] = None  # importing it would fail
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=sys.argv[2] or None, trust_remote_code=True)
tokens = torch.arange(3, 40).reshape(1, -1)
torch.save({"logits": model(tokens).logits, "class": type(model).__name__}, sys.argv[3])
"""


def load(hub, home, model, revision, out):
    """Load a model from the Hub double in a process without LoopExport; its logits and its class."""
    import torch

    command = [sys.executable, "-c", LOAD, str(model), revision, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(hub, home), cwd=home)
    assert done.returncode == 0, done.stderr
    return torch.load(out)
