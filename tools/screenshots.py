"""Take the pictures of docs/first-run.md and of the nodes' help pages, and the workflows' thumbnails:
python tools/screenshots.py [help] [thumbnails]

In a real ComfyUI (see tools/comfyui.py) and a real browser: needs chromium, chromedriver and selenium. The demo graph
runs to its end, a minute on two CPU cores. Look at what comes out before you commit it.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from comfyui import find_comfyui  # noqa: E402
from environment import rerun_with_requirements  # noqa: E402

PACK = "ComfyUI-LiteAttention"
DEMO = "liteattention_tiny_demo"
FIRST_RUN = ROOT / "docs" / "images" / "first-run"
HELP = ROOT / "web" / "docs"
WORKFLOWS = ROOT / "workflows"

LOAD = """
const [graph, name, done] = arguments;
app.loadGraphData(JSON.parse(graph), true, true, name).then(() => done(null), error => done(String(error)));
"""
SHOW = """
const [types, scale, left, top] = arguments;
const nodes = types.map(type => app.graph.nodes.find(node => node.type === type));
app.graph.nodes.forEach(node => { node.mode = 0; });
const box = [Math.min(...nodes.map(n => n.pos[0])), Math.min(...nodes.map(n => n.pos[1])) - 30,
             Math.max(...nodes.map(n => n.pos[0] + n.size[0])), Math.max(...nodes.map(n => n.pos[1] + n.size[1]))];
app.canvas.ds.scale = scale;
app.canvas.ds.offset = [left / scale - box[0], top / scale - box[1]];
app.canvas.setDirty(true, true);
const at = app.canvas.canvas.getBoundingClientRect();
return [at.left + left, at.top + top, (box[2] - box[0]) * scale, (box[3] - box[1]) * scale];
"""
ADD = """
arguments[0].forEach((type, i) => {
  const node = LiteGraph.createNode(type);
  node.pos = [0, 5000 + 2000 * i];
  app.graph.add(node);
});
"""
RAYLIGHT = ["LiteAttentionRaylight", "LiteAttentionRaylightReport"]
TITLES = {  # title, line below it
    "wan2.1_t2v_liteattention": ("Wan 2.1", "Text to video, 30 steps"),
    "wan2.1_i2v_liteattention": ("Wan 2.1", "Image to video, 20 steps"),
    "wan2.2_14B_t2v_liteattention": ("Wan 2.2 14B", "Text to video, 20 steps, two models"),
    "wan2.2_14B_t2v_4steps_liteattention": ("Wan 2.2 14B", "Text to video in 4 steps"),
    "wan2.2_5B_liteattention": ("Wan 2.2 5B", "Text to video, 20 steps"),
    "hunyuanvideo1.5_t2v_liteattention": ("HunyuanVideo 1.5", "Text to video, 20 steps"),
    "ltx2_t2v_liteattention": ("LTX-2", "Text to video with sound, 20 steps"),
    "ltx2.3_two_stages_liteattention": ("LTX-2.3", "Two stages, 8 + 3 steps"),
    "minimax_h3_t2v_liteattention": ("MiniMax H3", "Text to video with sound, 20 steps"),
    "liteattention_report_and_compare": ("Report, Compare", "What it did, and what it cost"),
    DEMO: ("Tiny demo", "Runs anywhere, nothing to download"),
}


def save(png: bytes, path: Path, crop: tuple[float, float, float, float] | None = None, width: int = 1200,
         quality: int = 82) -> None:
    """A screenshot as a JPEG of at most `width` pixels; `crop` is left, top, width, height."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    if crop is not None:
        left, top, wide, high = crop
        picture = picture.crop((round(left), round(top), round(left + wide), round(top + high)))
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=quality, optimize=True)
    print(f"{path.relative_to(ROOT)}: {picture.width} x {picture.height}, {path.stat().st_size / 1024:.0f} KB")


def until(done: Callable[[], Any], seconds: float, what: str) -> Any:
    """What `done` gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (found := done()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not in {seconds} s")
        time.sleep(0.2)
    return found


def click(browser: Any, xpath: str) -> None:
    """Click what a user would, as soon as it is on the screen."""
    from selenium.webdriver.common.by import By

    def visible() -> Any:
        return next((e for e in browser.find_elements(By.XPATH, xpath) if e.is_displayed()), None)

    element = until(visible, 20, xpath)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    time.sleep(0.5)
    element.click()


def load(browser: Any, name: str) -> None:
    """A shipped graph, as if it had been dragged into the window."""
    error = browser.execute_async_script(LOAD, (WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"), name)
    if error:
        raise RuntimeError(f"{name}: {error}")
    time.sleep(1)


def around(browser: Any, types: list[str], scale: float) -> tuple[bytes, tuple]:
    """(screenshot, crop) of the first node of each of these types, away from what lies over the edges of the canvas."""
    left, top, width, height = browser.execute_script(SHOW, types, scale, 350, 200)
    time.sleep(1.5)
    badge, room = 24 * scale, 12
    return browser.get_screenshot_as_png(), (left - room, top - badge - room, width + 2 * room,
                                             height + badge + 2 * room)


def first_run(server: Any, browser: Any) -> tuple[bytes, bytes]:
    """What a newcomer sees, from the template browser to the report; the pictures of Report and Compare."""
    browser.execute_script("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    click(browser, f"//*[text()='{PACK}']")
    time.sleep(4)
    save(browser.get_screenshot_as_png(), FIRST_RUN / "1-templates.jpg")
    click(browser, f"//h3[text()='{DEMO}']")
    until(lambda: browser.execute_script("return app.graph.nodes.some(n => n.type === 'LiteAttentionDemoModel')"), 30,
          "the demo graph")
    time.sleep(2)
    browser.execute_script("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    time.sleep(2)
    save(browser.get_screenshot_as_png(), FIRST_RUN / "2-loaded.jpg")
    click(browser, "//button[@data-testid='queue-button']")
    text = """return app.graph.nodes.find(n => n.type === 'LiteAttention').widgets.find(
                  widget => widget.name === '$$node-text-preview')?.value"""
    until(lambda: "step 14/20" in str(browser.execute_script(text)), 300, "step 14")
    save(browser.get_screenshot_as_png(), FIRST_RUN / "3-running.jpg")
    until(server.summaries, 300, "the run summary")
    until(lambda: not server.get("/queue")["queue_running"], 300, "the end of the run")
    time.sleep(4)
    save(browser.get_screenshot_as_png(), FIRST_RUN / "4-done.jpg")
    outputs = next(iter(server.get("/history").values()))["outputs"]
    graph = json.loads((WORKFLOWS / f"{DEMO}.json").read_text(encoding="utf-8"))
    kinds = {node["type"]: str(node["id"]) for node in graph["nodes"]}
    pictures = [server.output_file(outputs[kinds[kind]]["images"][0]).read_bytes()
                for kind in ("LiteAttentionReport", "LiteAttentionCompare")]
    return pictures[0], pictures[1]


def help_pictures(browser: Any) -> None:
    """Each node by itself; those of the demo graph after its run, those for Raylight without one."""
    browser.set_window_size(2000, 1500)
    browser.execute_script(ADD, RAYLIGHT)
    time.sleep(1)
    for types, scale, name, width in (
            (["LiteAttention"], 1.5, "LiteAttention", 480), (["LiteAttentionReport"], 1.3, "LiteAttentionReport", 800),
            (["LiteAttentionCompare"], 1.3, "LiteAttentionCompare", 800),
            (["LiteAttentionDemoModel", "ModelSamplingSD3"], 1.3, "LiteAttentionDemoModel", 480),
            (["LiteAttentionDemoPrompt"], 1.3, "LiteAttentionDemoPrompt", 480),
            (["LiteAttentionDemoDecode"], 1.3, "LiteAttentionDemoDecode", 480),
            *(([name], 1.3, name, 480) for name in RAYLIGHT)):
        png, crop = around(browser, types, scale)
        save(png, HELP / f"{name}.jpg", crop, width)


def thumbnails(browser: Any, shown: dict[str, bytes]) -> None:
    """A square card for each workflow: its title, and the part of its graph where LiteAttention is.

    Args:
        shown: pictures to take instead, by workflow.
    """
    from PIL import Image, ImageDraw, ImageFont

    side, band = 440, 150
    browser.set_window_size(2000, 1500)
    for path in sorted(WORKFLOWS.glob("*.json")):
        if path.stem in shown:
            picture = Image.open(io.BytesIO(shown[path.stem])).convert("RGB")
            width = min(round(picture.height * side / (side - band)), picture.width)
            picture = picture.crop((0, 0, width, round(width * (side - band) / side)))
        else:
            load(browser, path.stem)
            png, (left, top, *_) = around(browser, ["LiteAttention"], 0.9)
            left, top = left - 80, top - 20
            picture = Image.open(io.BytesIO(png)).convert("RGB").crop((
                round(left), round(top), round(left) + side * 5 // 4, round(top) + (side - band) * 5 // 4))
        card = Image.new("RGB", (side, side), (24, 24, 27))
        card.paste(picture.resize((side, side - band), Image.Resampling.LANCZOS), (0, 0))
        draw, font = ImageDraw.Draw(card), ImageFont.load_default
        draw.rectangle((0, side - band, side, side - band + 4), fill=(122, 90, 160))
        # Below: the template browser puts a badge over the upper left corner.
        for text, y, size, grey in zip(TITLES[path.stem], (56, 110), (44, 22), (240, 190), strict=True):
            draw.text((24, side - band + y), text, fill=(grey,) * 3, font=font(size=size), anchor="lm")
        card.save(path.with_suffix(".jpg"), quality=80, optimize=True)
        print(f"{path.stem}.jpg: {path.with_suffix('.jpg').stat().st_size / 1024:.0f} KB")


def main() -> int:
    comfy_path = find_comfyui()
    if comfy_path is None:
        sys.exit("No ComfyUI found (COMFYUI_PATH, the one this pack is installed in, ~/ComfyUI).")
    rerun_with_requirements(comfy_path, always_venv=True)
    from load_pack import load_pack

    load_pack()
    from liteattention.tools.browser import missing, open_frontend
    from liteattention.tools.server import ComfyServer

    if missing():
        sys.exit(f"{missing()} is not installed.")
    wanted = sys.argv[1:] or ["help", "thumbnails"]
    with ComfyServer(comfy_path) as server:
        server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False})
        browser = open_frontend(server.port)
        try:
            report, strip = first_run(server, browser)
            if "help" in wanted:
                help_pictures(browser)
            if "thumbnails" in wanted:
                thumbnails(browser, {DEMO: strip, "liteattention_report_and_compare": report})
        finally:
            browser.quit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
