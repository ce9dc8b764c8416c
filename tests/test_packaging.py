"""What the registry gets, and that every stated default and number is the shipped one."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pathspec import PathSpec

from liteattention.kernels import mask_nbytes
from liteattention.runtime import LiteAttentionConfig, Threshold, reasons

ROOT = Path(__file__).resolve().parent.parent
tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tracked():
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.split()


def shipped():
    """What `comfy node publish` zips: tracked files that .comfyignore, read as comfy-cli reads it, does not match."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    ignored = PathSpec.from_lines("gitwildmatch", [line.strip() for line in lines if line.strip()])
    return [f for f in tracked() if not ignored.match_file(f)]


def test_the_registry_gets_the_pack_and_nothing_else():
    files = shipped()
    folders = {f.split("/")[0] for f in files if "/" in f}
    code = {"kernels", "runtime", "report", "host", "nodes"}
    assert folders == code | {"workflows", "web", "locales", "demo"}
    pages = {f for f in tracked() if f.startswith(("web/docs/", "locales/"))}
    assert len(pages) >= 10 and pages <= set(files) and "web/liteattention.js" in files
    assert {f for f in files if "/" not in f} == {"__init__.py", "README.md", "LICENSE", "CHANGELOG.md",
                                                  "pyproject.toml", ".comfyignore"}
    demo = {f for f in files if f.startswith("demo/")}
    assert demo == {f"demo/{name}" for name in ("__init__.py", "comfy_nodes.py", "pixels.py", "CARD.md",
                                                "prompts.safetensors", "model/tiny_wan_t2v.safetensors")}
    sizes = [sum((ROOT / f).stat().st_size for f in part) for part in (demo, {*files} - demo)]
    assert sizes[0] < 12 * 2**20 and sizes[1] < 1.5 * 2**20


def test_words_that_a_scanner_flags_are_in_two_published_files():
    """It reads comments and pages, too. docs/registry.md explains them to reviewers."""
    words = re.compile(r"subprocess|os\.environ|getenv|urlopen|requests\.|socket|eval\(|exec\(|__import__|pickle")
    texts = {f: (ROOT / f).read_text(encoding="utf-8") for f in shipped() if f.endswith((".py", ".md", ".toml"))}
    found = {f: set(words.findall(text)) for f, text in texts.items() if words.search(text)}
    assert found.keys() == {"kernels/system.py", "host/language.py", "host/raylight/actors.py"}
    assert found["host/language.py"] == {"socket"} and found["host/raylight/actors.py"] == {"pickle"}


def test_pyproject_has_what_the_registry_asks_for():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (ROOT / project["license"]["file"]).is_file() and project["dependencies"] == []
    assert comfy["requires-comfyui"] == ">=0.19.0" and comfy["PublisherId"] and comfy["DisplayName"]


@pytest.mark.parametrize("key, width, height", [("Icon", 400, 400), ("Banner", 1680, 720)])
def test_the_pictures_of_the_registry_are_in_the_repository(key, width, height):
    """The registry loads them from there; they are not shipped. An icon is a square of up to 400, a banner is 21:9."""
    base = PROJECT["project"]["urls"]["Repository"].replace("https://github.com/", "https://raw.githubusercontent.com/")
    url = PROJECT["tool"]["comfy"][key]
    assert url.startswith(f"{base}/main/")
    name = url.removeprefix(f"{base}/main/")
    assert name in tracked() and name not in shipped()
    picture = ElementTree.parse(ROOT / name).getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert (picture.get("width"), picture.get("height")) == (str(width), str(height))
    assert picture.get("viewBox") == f"0 0 {width} {height}"


def test_github_runs_the_test_command_everywhere_and_publishes_tags_that_pass():
    yaml = pytest.importorskip("yaml")
    folder = ROOT / ".github"
    tests, publish, form = (yaml.safe_load((folder / name).read_text(encoding="utf-8")) for name in (
        "workflows/tests.yml", "workflows/publish.yml", "ISSUE_TEMPLATE/bug_report.yml"))
    job = tests["jobs"]["tests"]
    assert {name.split("-")[0] for name in job["strategy"]["matrix"]["os"]} == {"ubuntu", "windows", "macos"}
    assert "python tests/run.py" in [step.get("run") for step in job["steps"]]
    # yaml reads the key `on` as true.
    assert publish[True] == {"push": {"tags": ["v*"]}}
    assert publish["jobs"]["publish"]["needs"] == "tests"
    assert publish["jobs"]["tests"]["uses"] == "./.github/workflows/tests.yml" and "workflow_call" in tests[True]
    asked = {item["id"]: item for item in form["body"] if "id" in item}
    assert "`stats`" in asked["stats"]["attributes"]["label"] and asked["stats"]["validations"]["required"]


def test_comfy_cli_validates_the_pack():
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", "node", "validate"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "passed" in said, said


def test_the_readme_names_the_defaults_and_commands_that_are_there():
    config = LiteAttentionConfig()
    for name, value in (("error_budget", config.rule.share), ("warmup_steps", config.warmup_steps)):
        assert f"`{name}` {value:g}" in README, name
    assert re.search(rf"\b{reasons.AUTO_MIN_TOKENS_DEFAULT}\b|\b{reasons.AUTO_MIN_TOKENS_DEFAULT:,}\b", README)
    for command in re.findall(r"(?:^|`)python (\S+\.py)", README, re.MULTILINE):
        assert (ROOT / command).is_file(), command
    for path in re.findall(r"`((?:docs|demo|benchmarks|tests|tools)/[\w./-]+\.\w+)`", README):
        assert (ROOT / path).is_file(), path
    # demo/run.py runs another file, which has the options.
    known = (ROOT / "benchmarks" / "demo_pipeline" / "run.py").read_text(encoding="utf-8")
    for options in re.findall(r"python demo/run\.py([^`\n]*)", README):
        for option in re.findall(r"--(?:no-)?[\w-]+", options):
            assert f'"--{option.removeprefix("--").removeprefix("no-")}"' in known, option


def test_pages_name_tests_commands_and_pictures_that_are_there():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "web" / "docs").glob("*.md"))]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for folder, file, function in re.findall(r"`((?:\w+/)*)(test_\w+\.py)(?:::(test_\w+))?`", text):
            found = [p for p in (ROOT / "tests" / folder.removeprefix("tests/")).rglob(file)]
            assert found, (page.name, file)
            assert not function or any(f"def {function}(" in p.read_text(encoding="utf-8") for p in found), function
        for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
            assert (page.parent / picture).is_file(), (page.name, picture)
        for linked in re.findall(r"`((?:docs|demo|benchmarks|tests|tools|kernels|host|runtime)/[\w./-]+\.\w+)", text):
            assert "/test_" in linked or (ROOT / linked).is_file(), (page.name, linked)


def test_the_help_page_explains_the_usual_reasons_by_their_own_words():
    page = " ".join((ROOT / "web" / "docs" / "LiteAttention.md").read_text(encoding="utf-8").split())
    shown = (reasons.CROSS_ATTENTION, reasons.WARMUP, reasons.DENSE_END, reasons.DENSE_BLOCK, reasons.EXTRA_PASS,
             reasons.MOVING_WINDOWS, reasons.NO_LAYER, reasons.NO_BACKEND, reasons.NO_MEMORY, reasons.KERNEL_FAILED,
             reasons.DENSE_FASTER)
    assert not {reason.text for reason in shown if reason.text not in page}
    for value in (LiteAttentionConfig().rule.share, Threshold().log2):
        assert re.search(rf"`{value:g}`[^.`]* default|default[^.`]* `{value:g}`", page), value


def test_the_stated_mask_size_is_the_computed_one():
    mb = round(40 * mask_nbytes(1, 40, 75_600, 75_600) / 2**20)
    for page in ("README.md", "docs/questions.md", "docs/troubleshooting.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        stated = re.findall(r"(?:masks?|tile)[^.]*?(\d+) MB\b[^.]*prompt", text)
        assert stated and set(stated) == {str(mb)}, page


def test_the_numbers_in_the_readme_are_those_of_the_committed_runs():
    rows = [line for line in README.splitlines() if line.startswith("|") and "benchmarks/results/" in line]
    assert rows
    for row in rows:
        run = json.loads((ROOT / re.search(r"benchmarks/results/[\w.-]+\.json", row)[0]).read_text(encoding="utf-8"))
        assert set(re.findall(r"([\d.]+) ?%", row)) == {f"{run['skipped'] * 100:.1f}"}, row
        assert set(re.findall(r"([\d.]+) dB", row)) == {f"{run['psnr_db']:.1f}"}, row


def test_the_speed_in_the_readme_is_that_of_the_committed_run():
    path = ROOT / re.search(r"`python demo/run\.py` .*`(benchmarks/results/[\w.-]+\.json)`", README)[1]
    run = json.loads(path.read_text(encoding="utf-8"))
    said = " ".join(README.split())
    own, fused, fewer = (re.search(pattern, said) for pattern in (
        r"samples ([\d.]+) times as fast as ComfyUI's own", r"it is ([\d.]+) times as fast on this CPU",
        r"in the same time, (\d+) steps, is at ([\d.]+) dB"))
    assert own[1] == f"{run['dense_seconds'] / run['seconds']:.2f}"
    assert fused[1] == f"{run['fused']['dense_seconds'] / run['fused']['seconds']:.2f}"
    assert fewer.groups() == (str(run["fewer_steps"]["steps"]), f"{run['fewer_steps']['psnr_db']:.1f}")


def test_results_name_command_and_versions():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        assert run["command"].startswith("python ") and run["torch"] and re.match(r"\d{4}-\d\d-\d\d-", path.name)
        assert "/root" not in path.read_text(encoding="utf-8") and "/work" not in path.read_text(encoding="utf-8")


def test_no_file_names_a_machine():
    for name in tracked():
        if name.endswith((".py", ".md", ".toml", ".yml", ".json", ".ini", "run")):
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not re.search(r"/(root|work|home)/\w", text) or name == "tests/test_packaging.py", name
