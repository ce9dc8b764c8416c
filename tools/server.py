"""A real ComfyUI server on this machine, with this pack in it, driven over its HTTP API."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = "LiteAttention run summary "


class PromptFailed(RuntimeError):
    """The server refused a prompt or a node of it failed; the message is the server's."""


class ComfyServer:
    """Starts `comfy_path` with an empty base directory that holds nothing but this pack; a context manager.

    Args:
        comfy_path: a ComfyUI checkout.
        python: interpreter that has ComfyUI's requirements.
        arguments: further command-line arguments.
        environment: additions to the environment of the server.
    """

    def __init__(self, comfy_path: Path, python: str = sys.executable, arguments: tuple[str, ...] = ("--cpu",),
                 environment: dict[str, str] | None = None):
        self.comfy_path = comfy_path
        self.base = Path(tempfile.mkdtemp(prefix="liteattention-"))
        self.log_path = self.base / "server.log"
        pack = self.base / "custom_nodes" / "ComfyUI-LiteAttention"
        pack.parent.mkdir()
        for name in ("models", "input", "output", "user"):
            (self.base / name).mkdir()
        try:
            pack.symlink_to(ROOT, target_is_directory=True)
        except OSError:  # Windows without the right to make links
            shutil.copytree(ROOT, pack, ignore=shutil.ignore_patterns(".venv", ".git", "out", "__pycache__"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._log = self.log_path.open("wb")
        self._process = subprocess.Popen(
            [python, "main.py", "--base-directory", str(self.base), "--port", str(self.port), "--listen", "127.0.0.1",
             "--disable-auto-launch", "--disable-api-nodes", "--verbose", "DEBUG", *arguments],
            cwd=comfy_path, stdout=self._log, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})})

    def __enter__(self) -> ComfyServer:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return self
            except OSError:
                time.sleep(0.3)
        self.close()
        raise RuntimeError(f"ComfyUI at {self.comfy_path} did not start. The end of its log:\n{self.log()[-3000:]}")

    def __exit__(self, *_: object) -> None:
        self.close()
        shutil.rmtree(self.base, ignore_errors=True)

    def close(self) -> None:
        """Stop the server; its base directory stays until the context ends."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def log(self) -> str:
        """Everything the server has printed."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def summaries(self) -> list[dict]:
        """Summaries of the runs so far, as the debug log has them."""
        return [json.loads(line.split(SUMMARY, 1)[1]) for line in self.log().splitlines() if SUMMARY in line]

    def get(self, path: str) -> dict:
        """A GET request's JSON."""
        return self._request(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, path: str, body: dict) -> dict:
        """A POST request's JSON.

        Raises:
            PromptFailed: the server refused it.
        """
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=json.dumps(body).encode(),
                                         headers={"Content-Type": "application/json"})
        try:
            return self._request(request)
        except urllib.error.HTTPError as error:
            raise PromptFailed(error.read().decode(errors="replace")) from None

    def queue(self, prompt: dict) -> str:
        """Queue an API-format prompt; its id."""
        return self.post("/prompt", {"prompt": prompt})["prompt_id"]

    def wait(self, prompt_id: str, timeout_s: float = 600) -> dict:
        """The outputs of a finished prompt by node id.

        Raises:
            PromptFailed: a node failed, the prompt was interrupted, the server died, or time ran out.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise PromptFailed(f"the server ended with code {self._process.returncode}:\n{self.log()[-3000:]}")
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None and entry.get("status", {}).get("completed") is not None:
                if entry["status"]["status_str"] != "success":
                    raise PromptFailed(json.dumps(entry["status"]["messages"][-1]))
                return entry["outputs"]
            time.sleep(0.2)
        raise PromptFailed(f"prompt {prompt_id} did not finish in {timeout_s} s:\n{self.log()[-3000:]}")

    def run(self, prompt: dict, timeout_s: float = 600) -> dict:
        """Queue and wait."""
        return self.wait(self.queue(prompt), timeout_s)

    def output_file(self, entry: dict) -> Path:
        """The file that an output entry ({"filename", "subfolder", "type"}) names."""
        return self.base / entry.get("type", "output") / entry.get("subfolder", "") / entry["filename"]

    @staticmethod
    def _request(request: urllib.request.Request) -> dict:
        # No proxy: this server is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            return json.loads(answer.read() or b"{}")
