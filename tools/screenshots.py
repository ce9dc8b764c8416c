"""Take the pictures of docs/first-run.md and of the nodes' help pages, and the workflows' thumbnails:
python tools/screenshots.py [graph] [run] [help] [thumbnails]

In a real ComfyUI (see tools/comfyui.py) and a real browser: needs chromium, chromedriver and selenium. For all but
`graph`, the template browser and the loaded demo, the demo runs to its end, a minute on two CPU cores. Look at what
comes out before you commit it.
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
DEMO = "demo_liteattention"
FIRST_RUN = ROOT / "docs" / "images" / "first-run"
HELP = ROOT / "web" / "docs"
WORKFLOWS = ROOT / "workflows"

SHOW = """
const [type, scale, left, top] = arguments;
const made = () => {  // of a subgraph: one more, where no other node is
  const node = LiteGraph.createNode(type);
  node.pos = [5000, 1000 * app.graph.nodes.length];
  node.size[0] = Math.max(node.size[0], 280);
  app.graph.add(node);
  return node;
};
const node = app.graph.nodes.find(node => node.type === type) ?? made();
const box = [node.pos[0], node.pos[1] - 30, node.pos[0] + node.size[0], node.pos[1] + node.size[1]];
app.canvas.ds.scale = scale;
app.canvas.ds.offset = [left / scale - box[0], top / scale - box[1]];
app.canvas.setDirty(true, true);
const at = app.canvas.canvas.getBoundingClientRect();
return [at.left + left, at.top + top, (box[2] - box[0]) * scale, (box[3] - box[1]) * scale];
"""
RAYLIGHT = ["LiteAttentionRaylight", "LiteAttentionRaylightReport"]
CARDS = {  # title, line below it, runs: each as (steps, of them dense) of its samplers
    "wan2.1_1.3B_t2v_liteattention": ("Wan 2.1 1.3B", "Text to video, small cards", [[(30, 2)]]),
    "wan2.2_14B_t2v_liteattention": ("Wan 2.2 14B", "Text to video, 20 or 4 steps", [[(10, 2), (10, 0)],
                                                                                     [(2, 1), (2, 0)]]),
    "wan2.2_14B_i2v_liteattention": ("Wan 2.2 14B", "Image to video, 20 or 4 steps", [[(10, 2), (10, 0)],
                                                                                      [(2, 1), (2, 0)]]),
    "wan2.2_5B_liteattention": ("Wan 2.2 5B", "Text or image to video", [[(20, 2)]]),
    "hunyuanvideo1.5_t2v_liteattention": ("Hunyuan 1.5", "Text to video, 720p", [[(20, 2)]]),
    "ltx2.3_two_stages_liteattention": ("LTX-2.3", "Text to video with sound", [[(8, 1), (3, 0)]]),
    "minimax_h3_t2v_liteattention": ("MiniMax H3", "Text to video with sound", [[(20, 2)]]),
    "liteattention_report_and_compare": ("Report", "What it did, and what it cost", []),
    DEMO: ("Start here", "Runs anywhere, no download", []),
}
COLOURS = {"wan2.1": (62, 72, 128), "wan2.2": (92, 62, 132), "hunyuan": (32, 96, 120), "ltx": (126, 74, 52),
           "minimax": (112, 48, 84)}


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


def around(browser: Any, kind: str, scale: float) -> tuple[bytes, tuple]:
    """(screenshot, crop) of the first node of this type, away from what lies over the edges of the canvas."""
    left, top, width, height = browser.execute_script(SHOW, kind, scale, 350, 200)
    time.sleep(1.5)
    badge, room = 24 * scale, 12
    return browser.get_screenshot_as_png(), (left - room, top - badge - room, width + 2 * room,
                                             height + badge + 2 * room)


def find_the_demo(browser: Any) -> None:
    """What a newcomer sees before a run: the template browser and the demo graph."""
    browser.execute_script("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    click(browser, f"//*[text()='{PACK}']")
    time.sleep(4)
    save(browser.get_screenshot_as_png(), FIRST_RUN / "1-templates.jpg")
    click(browser, f"//h3[text()='{DEMO}']")
    until(lambda: browser.execute_script("return app.graph.nodes.some(n => n.type === 'LiteAttention')"), 30,
          "the demo graph")
    time.sleep(2)
    browser.execute_script("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    time.sleep(2)
    save(browser.get_screenshot_as_png(), FIRST_RUN / "2-loaded.jpg")


def run_the_demo(server: Any, browser: Any) -> tuple[bytes, bytes]:
    """What a newcomer sees then, up to the report; the pictures of Report and Compare."""
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
    for kind, scale, width in (("LiteAttention", 1.5, 480), ("LiteAttentionReport", 1.3, 800),
                               ("LiteAttentionCompare", 1.3, 800), ("LiteAttentionDemoModel", 1.3, 480),
                               ("LiteAttentionDemoPrompt", 1.3, 480), ("LiteAttentionDemoDecode", 1.3, 480),
                               *((name, 1.3, 480) for name in RAYLIGHT)):
        png, crop = around(browser, kind, scale)
        save(png, HELP / f"{kind}.jpg", crop, width)


def thumbnails(shown: dict[str, bytes]) -> None:
    """A square card for each workflow: the model, and which steps compute all of the attention.

    Args:
        shown: pictures to take instead of the steps, by workflow.
    """
    from PIL import Image, ImageDraw, ImageFont

    side, left = 440, 24
    for path in sorted(WORKFLOWS.glob("*.json")):
        title, line, runs = CARDS[path.stem]
        card = Image.new("RGB", (side, side), next(
            (colour for model, colour in COLOURS.items() if path.stem.startswith(model)), (24, 24, 27)))
        draw, font = ImageDraw.Draw(card), ImageFont.load_default
        if path.stem in shown:
            picture = Image.open(io.BytesIO(shown[path.stem])).convert("RGB")
            picture = picture.crop((0, 0, picture.width * 5 // 6, picture.width * 5 // 6 * 256 // side))
            card.paste(picture.resize((side, 256), Image.Resampling.LANCZOS), (0, 56))
        # The upper 56 pixels stay empty: the template browser puts a badge there.
        top = 312 if path.stem in shown else 76
        for text, y, size, grey in ((title, top + 32, 56, 255), (line, top + 84, 27, 215)):
            draw.text((left, y), text, fill=(grey,) * 3, font=font(size=size), anchor="lm")
        for number, run in enumerate(runs):
            y, total = 226 + 84 * number, sum(steps for steps, _ in run)
            text = " + ".join(str(steps) for steps, _ in run) + " steps"
            draw.text((left, y), text, fill=(215,) * 3, font=font(size=24), anchor="lm")
            width = min((side - 2 * left - 14 * (len(run) - 1)) / total, 30)
            x = float(left)
            for steps, dense in run:
                for step in range(steps):
                    fill = (255, 255, 255) if step < dense else None
                    draw.rectangle((x, y + 20, x + width - 4, y + 44), fill=fill, outline=(255,) * 3, width=2)
                    x += width
                x += 14
        if runs:
            draw.text((left, 412), "filled: all attention. empty: skips", fill=(215,) * 3, font=font(size=21),
                      anchor="lm")
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
    wanted = sys.argv[1:] or ["run", "help", "thumbnails"]
    with ComfyServer(comfy_path) as server:
        server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False})
        browser = open_frontend(server.port)
        try:
            find_the_demo(browser)
            if wanted == ["graph"]:
                return 0
            report, strip = run_the_demo(server, browser)
            if "help" in wanted:
                help_pictures(browser)
            if "thumbnails" in wanted:
                thumbnails({DEMO: strip, "liteattention_report_and_compare": report})
        finally:
            browser.quit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
