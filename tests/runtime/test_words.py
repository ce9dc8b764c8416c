"""The texts of a run in other languages: the tables are whole, and finished English sentences are found again."""

import json
import re

import pytest
import texts

from liteattention.runtime import RunSummary, StepReport, TimeSaved
from liteattention.runtime.reasons import CROSS_ATTENTION, DENSE_FASTER, NOT_VIDEO, REASONS, WARMUP
from liteattention.runtime.rules import ErrorBudget
from liteattention.runtime.words import Words, words

SCRIPTS = {"zh": "[\u4e00-\u9fff]", "ja": "[\u3040-\u30ff\u4e00-\u9fff]", "ko": "[\uac00-\ud7a3]"}
UNCHANGED = {"SageAttention 3", "{count} {reason}", "{share} ({source})", ", ", " and "}
NAMES = r"[A-Za-z]\w*_\w+|LiteAttention|Model (?:Sparse Attention|Attention Backend)|INT8|\d+(?:\.\d+)?(?!})"
"""What every language writes alike: names of inputs and nodes, numbers."""


def table(language):
    path = texts.ROOT / "locales" / language / "summary.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", SCRIPTS)
def test_the_tables_have_every_text_of_the_source_and_nothing_else(language):
    there, wanted = set(table(language)), texts.run_texts()
    assert not wanted - there and not there - wanted, "python tools/locales.py lists them"


def test_the_source_is_read_as_it_is_written():
    found = texts.run_texts()
    assert len(found) > 150 and {reason.hint for reason in REASONS if reason.hint} <= found
    for text in ("on: {share} of attention skipped", "fewer than {0} tokens", "head_dim {0} not supported",
                 "continue_from: {0}; the masks start anew", "layer {0}: {1}", "steps 1-{0} of {1} dense",
                 "Triton is not installed; for torch {0} on Windows run: {1} -m pip install {2}"):
        assert text in found, text


@pytest.mark.parametrize("language", SCRIPTS)
def test_translations_keep_placeholders_names_and_numbers(language):
    for english, translated in table(language).items():
        assert texts.placeholders(english) == texts.placeholders(translated), english
        assert english in UNCHANGED or re.search(SCRIPTS[language], translated), english
        assert sorted(re.findall(NAMES, english, re.A)) == sorted(re.findall(NAMES, translated, re.A)), english


@pytest.mark.parametrize("language", SCRIPTS)
def test_every_sentence_is_found_again_with_what_fills_it(language):
    say = words(language)
    for english, translated in table(language).items():
        if "{0}" in english:
            values = [f"value{n}" for n in range(len(texts.placeholders(english)))]
            assert say.told(english.format(*values)) == translated.format(*values)


def test_what_fills_a_sentence_is_translated_too():
    say = Words({"{0}, set by a node": "N({0})", "none reached: {0}": "R[{0}]", "layer {0}: {1}": "L{0}-{1}",
                 "no memory": "M", "another": "A", "{name} here": "{name} H"})
    assert say.told("none reached: another, set by a node") == "R[N(A)]"
    assert say.told("layer double 0: no memory") == "Ldouble 0-M"
    assert say.told("a text {with} braces") == "a text {with} braces"
    assert say("{name} here", name="{0}") == "{0} H" and say("no such {x}", x=1) == "no such 1"


@pytest.mark.parametrize("language", ["en", "fr", "", "zh\0"])
def test_a_language_without_a_table_is_english(language):
    say = words(language)
    assert say("skipped {share}", share="3%") == "skipped 3%" and say.told("warm-up step") == "warm-up step"


@pytest.mark.parametrize("language", SCRIPTS)
def test_a_run_and_its_steps_are_told_in_the_language_and_logged_in_english(language):
    run = RunSummary(
        plan="steps 1-2 of 20 dense, from step 19 dense again", rule="error_budget 0.3", steps_done=20, total_steps=20,
        forward_passes=20, sparse_calls=700, tiles_computed=60, tiles_total=100, dense_tiles=5,
        dense_calls={CROSS_ATTENTION: 800, WARMUP: 40, NOT_VIDEO: 2, DENSE_FASTER: 60},
        skipped_per_step=[], layers={"double 0": [0.1]}, mask_bytes=2**26, tokens=32760, seconds=70.0,
        saved=TimeSaved(50.0, 60.0, "the clock"), backend="triton backend on cuda:0", fallback="PyTorch's attention",
        break_evens=[{"density": 0.8, "source": "table"}], notes=["no memory for the skip mask; the layer stays dense"],
        advice=["make the video shorter or smaller", ErrorBudget(0.3).bolder()])
    report = StepReport(3, 20, 0.5, 0.1, 0, "sparse", run.saved)
    english = re.compile(r"[a-z]{3,} [a-z]{2,} [a-z]{2,}")
    for text in ("\n".join(run.lines(language)), run.report(language), "\n".join(report.lines(language))):
        assert re.search(SCRIPTS[language], text) and not english.search(text), text
        assert all(re.search(SCRIPTS[language], line) for line in text.split("\n"))
    assert english.search(run.text()) and not re.search(SCRIPTS[language], run.text() + json.dumps(run.to_dict()))
    assert sorted(re.findall(r"\d+(?:\.\d+)?", run.report(language))) == sorted(
        re.findall(r"\d+(?:\.\d+)?", run.report())), "every number is there"
