"""Notes: each once, and those about single layers gathered."""

from run_kit import in_threads, play, sampling_run

from liteattention.runtime import LayerId
from liteattention.runtime.masks import SIZE_CHANGED
from liteattention.runtime.notes import Notes


def test_a_note_is_said_once_in_the_log_and_in_the_summary(caplog):
    notes = Notes()
    for text in ("a", "b", "a"):
        notes.add(text)
    assert notes.lines() == ["a", "b"] and caplog.text.count("LiteAttention: a\n") == 1


def test_a_note_about_layers_has_its_layer_or_their_number(caplog):
    notes = Notes()
    for layer in range(40):
        notes.add("no memory", f"double {layer}")
        notes.add("no memory", f"double {layer}")
    notes.add("another size", "single 3")
    assert notes.lines() == ["40 layers: no memory", "layer single 3: another size"]
    assert caplog.text.count("no memory") == 1 and "layer double 0: no memory" in caplog.text


def test_devices_may_note_at_once(caplog):
    notes = Notes()
    in_threads(lambda i: [notes.add("x", f"{i} {j}") for j in range(50)], range(8))
    assert notes.lines() == ["400 layers: x"] and caplog.text.count("x") == 1


def test_a_size_that_changes_twice_in_a_run_is_one_note_whatever_the_layers(caplog):
    run, layers = sampling_run(6, warmup_steps=1), [LayerId("double", i, 8) for i in range(8)]
    for step, n in enumerate((384, 384, 512, 512, 640, 640)):
        play(run, 1, first=step, layers=layers, n=n, video_tokens=n)
    assert run.close().notes == [f"8 layers: {SIZE_CHANGED}"] and caplog.text.count(SIZE_CHANGED) == 1
