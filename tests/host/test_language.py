"""Which language a run is told in: the frontend's setting, else the browser's languages, else English."""

import asyncio
import json
import sys
import types

import comfy.cli_args
import folder_paths
import pytest
from comfyui import find_comfyui

from liteattention.host.language import frontend_locale, language
from liteattention.tools.server import ROOT, ComfyServer


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A folder for the frontend's settings, and a server whose client's browser asks for Japanese."""
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    connection = types.SimpleNamespace(_req=types.SimpleNamespace(headers={"Accept-Language": "ja,en-US;q=0.9"}))
    instance = types.SimpleNamespace(sockets={"one": connection}, client_id="one")
    monkeypatch.setitem(sys.modules, "server", types.SimpleNamespace(
        PromptServer=types.SimpleNamespace(instance=instance)))
    (tmp_path / "default").mkdir()
    return types.SimpleNamespace(settings=tmp_path / "default" / "comfy.settings.json", server=instance,
                                 connection=connection)


def test_the_setting_goes_before_the_browser(user):
    assert language() == "ja"
    user.settings.write_text('{"Comfy.Graph.LiveSelection": true}')
    assert language() == "ja"
    user.settings.write_text('{"Comfy.Locale": "ko"}')
    assert language() == "ko"


def test_with_several_users_nobody_is_told_in_the_language_of_another(user, monkeypatch):
    user.settings.write_text('{"Comfy.Locale": "ko"}')
    monkeypatch.setattr(comfy.cli_args.args, "multi_user", True)
    assert language() == "ja"


@pytest.mark.parametrize("missing", ["client", "request", "header", "server", "settings"])
def test_where_nothing_is_known_it_is_english(user, missing, monkeypatch):
    if missing == "client":
        user.server.client_id = None
    elif missing == "request":
        del user.connection._req
    elif missing == "header":
        user.connection._req.headers = {}
    elif missing == "server":
        monkeypatch.setitem(sys.modules, "server", types.SimpleNamespace())
    else:
        user.settings.write_text("{")
    assert language() == "en"


@pytest.mark.parametrize("accepted, locale", [
    ("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("zh-TW", "zh-TW"), ("ZH-tw;q=0.5", "zh-TW"), ("ko", "ko"), ("en-GB,ja", "en"),
    ("pt-BR", "pt-BR"), ("*", ""), ("", "")])
def test_a_browser_gets_the_language_that_the_frontend_gives_it(accepted, locale):
    assert frontend_locale(accepted) == locale


async def texts_of_a_run(port, prompt, accepted):
    """What the server sends to a browser while it runs a prompt, as one text."""
    import aiohttp

    found = []
    async with aiohttp.ClientSession(headers={"Accept-Language": accepted}) as browser:
        async with browser.ws_connect(f"http://127.0.0.1:{port}/ws?clientId=browser") as connection:
            body = {"prompt": prompt, "client_id": "browser"}
            async with browser.post(f"http://127.0.0.1:{port}/prompt", json=body) as answer:
                assert answer.status == 200, await answer.text()
            async for message in connection:
                if message.type is aiohttp.WSMsgType.BINARY:
                    found.append(message.data.decode("utf-8", "replace"))
                elif message.type is aiohttp.WSMsgType.TEXT:
                    said = json.loads(message.data)
                    found.append(json.dumps(said, ensure_ascii=False))
                    if said["type"] in ("execution_error", "execution_success"):
                        return "\n".join(found)


def test_a_real_server_tells_each_user_in_their_language():
    """On the node, and in the text of Report; the log and the statistics stay English."""
    workflow = json.loads((ROOT / "demo" / "workflow_api.json").read_text(encoding="utf-8"))
    workflow["3"]["inputs"] |= {"warmup_steps": 1, "min_tokens": 128}
    workflow["5"]["inputs"] |= {"width": 128, "height": 128, "length": 17}
    workflow["6"]["inputs"]["steps"] = 4
    workflow["40"] = {"class_type": "LiteAttentionReport", "inputs": {
        "model": workflow["6"]["inputs"]["model"], "samples": ["6", 0], "layers": "", "heads": ""}}
    workflow["41"] = {"class_type": "PreviewAny", "inputs": {"source": ["40", 2]}}
    with ComfyServer(find_comfyui(), environment={"OMP_NUM_THREADS": "1"}) as running:
        said = {}
        for seed, accepted in enumerate(("ja", "en-US,en;q=0.9", "zh-CN,zh;q=0.9")):
            workflow["6"]["inputs"]["seed"] = 70 + seed
            said[accepted] = asyncio.run(texts_of_a_run(running.port, workflow, accepted))
        running.post("/settings", {"Comfy.Locale": "ko"})
        workflow["6"]["inputs"]["seed"] = 79
        said["ko"] = asyncio.run(texts_of_a_run(running.port, workflow, "ja"))
        english = [summary["headline"] for summary in running.summaries()]
    for accepted, first, live, layers in (("ja", "オン：", "ステップ 1/4", "各層の最後の実行"),
                                          ("en-US,en;q=0.9", "on: ", "step 1/4", "layers when last run"),
                                          ("zh-CN,zh;q=0.9", "已启用：", "第 1/4 步", "各层最后一次运行"),
                                          ("ko", "켜짐: ", "스텝 1/4", "레이어별 마지막 실행")):
        others = ("オン：", "on: ", "已启用：", "켜짐: ")
        assert [said[accepted].count(other) >= 2 for other in others] == [other == first for other in others]
        assert layers in said[accepted] and live in said[accepted]
    assert len(english) == 4 and all(headline.startswith("on: ") for headline in english)
