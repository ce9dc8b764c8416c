"""The files that the registry gets, in a real server: the demo runs, and comfy-test (comfy-test.toml) finds nothing."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from comfyui import find_comfyui

from liteattention.tools import server

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
CONFIG = server.ROOT / "comfy-test.toml"
# kernels/selftest.py makes half-precision inputs of its own; the demo model is to run without a
# download and to stay out of the lists of the user's models.
ACCEPTED = {"hazards": {"hardcoded-precision"}, "warnings": {"weights"}}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A copy of what is published, and a server that has it as its only pack."""
    copy = tmp_path_factory.mktemp("published") / "ComfyUI-LiteAttention"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(server.ROOT / "tests")
        from test_packaging import shipped

        for name in shipped():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(server.ROOT / name, copy / name)
        patch.setattr(server, "ROOT", copy)
        running = server.ComfyServer(find_comfyui(), environment={"OMP_NUM_THREADS": "1"})
    with running:
        yield copy, running


def test_the_demo_runs_from_what_is_published(published):
    prompt = json.loads((server.ROOT / "demo" / "workflow_api.json").read_text(encoding="utf-8"))
    prompt["3"]["inputs"]["min_tokens"] = 128
    prompt["5"]["inputs"] |= {"width": 160, "height": 160, "length": 25}
    prompt["6"]["inputs"]["steps"] = 4
    _, running = published
    assert set(running.run(prompt)) == {"7", "9"}
    summary = running.summaries()[-1]
    assert summary["sparse_calls"] == 20 and summary["environment"]["liteattention"] != "unknown"


def test_comfy_test_finds_nothing_wrong(published, tmp_path):
    pytest.importorskip("comfy_test", reason="comfy-test is not installed (pip install -r tools/requirements.txt)")
    copy, running = published
    # Nodes of ComfyUI's own that lack a dependency are not this pack's fault.
    log = [line for line in running.log().splitlines() if copy.name in line]
    assert log, "the log lists every pack that was imported or failed to"
    (tmp_path / "server.log").write_text("\n".join(log), encoding="utf-8")
    # TMPDIR: it leaves a scratch folder behind.
    environment = {**os.environ, "COMFY_TEST_LOGS_DIR": str(tmp_path), "TMPDIR": str(tmp_path), "no_proxy": "*"}
    done = subprocess.run([sys.executable, "-m", "comfy_test", "run", "--config", str(CONFIG),
                           "--server-url", f"http://127.0.0.1:{running.port}"], cwd=copy, env=environment, timeout=180,
                          stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    for level in tomllib.loads(CONFIG.read_text(encoding="utf-8"))["test"]["levels"]:
        assert f"[{level.upper()}] PASSED" in said
    assert "(log: unavailable)" not in said, "without the server's log it sees no failed import"
    # These two levels report and never fail.
    assert "check itself failed" not in said and "Warnings check: " in said, said
    for level, accepted in ACCEPTED.items():
        assert set(re.findall(rf"^\[{level}\] ([\w-]+) -- ", said, re.MULTILINE)) <= accepted, said
