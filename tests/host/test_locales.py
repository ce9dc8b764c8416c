"""The nodes' texts in every language: complete, of the same numbers and names as the schema, and served."""

import re
import unicodedata
from collections import Counter

import pytest
from comfyui import find_comfyui

from liteattention.tools.locales import LANGUAGES, ROOT, leaves, node_texts, read_locale
from liteattention.tools.server import ComfyServer

NODES = {"LiteAttention", "LiteAttentionReport", "LiteAttentionCompare", "LiteAttentionRaylight",
         "LiteAttentionRaylightReport",
         "LiteAttentionDemoModel", "LiteAttentionDemoPrompt", "LiteAttentionDemoDecode"}
OTHERS = LANGUAGES[1:]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:/\d+)?")
# Other languages write this one number as a digit.
AS_DIGITS = {"power of two": "power of 2"}


@pytest.fixture(scope="module")
def server():
    with ComfyServer(find_comfyui(), environment={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


def numbers(text):
    for words, digits in AS_DIGITS.items():
        text = text.replace(words, digits)
    return Counter(NUMBER.findall(text))


def english():
    return dict(leaves(read_locale("en")))


def test_the_languages_are_those_that_are_there():
    assert {path.parent.name for path in (ROOT / "locales").glob("*/nodeDefs.json")} == set(LANGUAGES)


def test_english_is_what_the_schemas_say(object_info):
    texts = node_texts(object_info)
    assert set(texts) == NODES
    assert read_locale("en") == texts, "python tools/locales.py writes it anew"


@pytest.mark.parametrize("language", OTHERS)
def test_every_text_of_the_schemas_is_there_and_nothing_else(language):
    texts = dict(leaves(read_locale(language)))
    assert set(texts) == set(english())
    assert not [keys for keys, text in texts.items() if not isinstance(text, str) or not text.strip()]


@pytest.mark.parametrize("language", OTHERS)
def test_texts_are_translated_and_labels_start_with_the_name_that_other_texts_use(language):
    script = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff\u4e00-\u9fff]", "ko": r"[\uac00-\ud7a3]"}[language]
    texts, source = dict(leaves(read_locale(language))), english()
    for keys, text in texts.items():
        if keys[-1] in ("name", "display_name"):
            assert text.startswith(source[keys]), keys
        if keys != ("LiteAttention", "display_name"):
            assert re.search(script, text), keys


@pytest.mark.parametrize("language", OTHERS)
def test_numbers_are_the_same_in_every_language(language):
    texts = dict(leaves(read_locale(language)))
    different = {keys: (numbers(text), numbers(texts[keys])) for keys, text in english().items()
                 if numbers(text) != numbers(texts[keys])}
    assert not different


@pytest.mark.parametrize("language", OTHERS)
def test_inputs_options_and_nodes_are_called_by_their_names(language, object_info):
    texts, source = read_locale(language), read_locale("en")
    known = {described["name"] for node in source.values() for described in node["inputs"].values()
             if "_" in described["name"]}
    titles = {node["display_name"] for node in source.values()}
    for node, described in source.items():
        inputs = {**object_info[node]["input"].get("required", {}), **object_info[node]["input"].get("optional", {})}
        for keys, text in leaves(described):
            options = inputs.get(keys[1], ("", {}))[1].get("options", []) if keys[0] == "inputs" else []
            options = [option["key"] if isinstance(option, dict) else option for option in options]
            translated = texts[node][keys[0]]
            for key in keys[1:]:
                translated = translated[key]
            named = {name for name in known | titles | set(options)
                     if re.search(rf"(?<![\w/]){re.escape(name)}(?!\w)", text)}
            assert not {name for name in named if name not in translated}, (node, *keys)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_holds_what_the_frontend_takes_for_a_placeholder(language):
    assert not {keys: text for keys, text in leaves(read_locale(language)) if re.search(r"[{}@|]", text)}


def test_the_server_serves_them(server):
    served = server.get("/i18n")
    for language in LANGUAGES:
        there = served[language]["nodeDefs"]
        assert {name: there[name] for name in NODES} == read_locale(language)


def pixels(label):
    """About as wide as the frontend draws it, which makes a node as wide as its labels."""
    return sum(14 if unicodedata.east_asian_width(letter) in "WF" else 6.9 for letter in label)


@pytest.mark.parametrize("language", OTHERS)
def test_labels_leave_the_node_as_wide_as_the_shipped_graphs_draw_it(language):
    """270 pixels and a few: 77 of a widget are its arrows and value, 43 lie around the labels of input and output."""
    texts = read_locale(language)["LiteAttention"]
    inputs = {key: pixels(described["name"]) for key, described in texts["inputs"].items()}
    slots = max(inputs["model"], inputs["continue_from"]) + max(pixels(x["name"]) for x in texts["outputs"].values())
    assert max(inputs.values()) + 77 <= 280 and slots + 43 <= 300, inputs


def help_page(node, language="en"):
    """As the frontend looks for it: `<node>/<locale>.md`, else `<node>.md`."""
    name = f"{node}.md" if language == "en" else f"{node}/{language}.md"
    return (ROOT / "web" / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("language", OTHERS)
@pytest.mark.parametrize("node", sorted(NODES))
def test_help_pages_are_translated_whole(node, language):
    """Pictures are named as from the folder above: the frontend resolves them there."""
    page, source, texts = help_page(node, language), help_page(node), read_locale(language)[node]
    assert page.startswith(f"# {texts['display_name']}\n")
    for alike in (r"\*\*(\w+)\*\*", r"\]\((\w+\.jpg)\)", r"https://\S+"):
        assert set(re.findall(alike, page)) == set(re.findall(alike, source)), alike
    for block in (r"^# ", r"^## ", r"^\| ", r"^- ", r"\n\n"):
        assert len(re.findall(block, page, re.M)) == len(re.findall(block, source, re.M)), block
    assert set(re.findall(r"`[^`]+`", page)) <= set(re.findall(r"`[^`]+`", source))
    assert not re.search("[\u3000-\u9fff]\n[\u3000-\u9fff]", page), "Markdown makes a space of a line break"


def test_the_server_serves_help_pages_where_the_frontend_looks(server):
    import urllib.request

    for language in OTHERS:
        url = f"http://127.0.0.1:{server.port}/extensions/ComfyUI-LiteAttention/docs/LiteAttention/{language}.md"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as answer:
            assert answer.read().decode("utf-8") == help_page("LiteAttention", language)
