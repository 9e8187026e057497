"""The search for hyper-parameters: repeated at no cost, the same by seed, on the validation split alone, and honest."""

import logging
import re
from dataclasses import replace

import pytest
import yaml
from conftest import LAYERS

from kedit import KeditError
from kedit.__main__ import main
from kedit.data import facts
from kedit.editors import kind_of, known, make_hparams
from kedit.editors.ft import FTM
from kedit.study import tune as module
from kedit.study.single import single_edits
from kedit.study.tune import Trial, drawn, tune

SETTINGS = ("layer=[0, 1, 2, 3]", "lr=[0.05, 0.01]")


@pytest.fixture
def search(llama, tmp_path, monkeypatch):
    """A small search for FT-M on the tiny Llama."""
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path))
    monkeypatch.setattr(module, "load", lambda name: llama)
    return lambda trials=3: tune("ft-m", "llama", SETTINGS, trials, 4, None, 0)


def test_repeated_it_computes_nothing_and_says_the_same(search, monkeypatch):
    first = search()
    monkeypatch.setattr(FTM, "_apply", lambda *_: pytest.fail("edited again"))
    monkeypatch.setattr("kedit.study.single.measure", lambda *_: pytest.fail("measured again"))
    assert search() == first


def test_stopped_it_goes_on(search, monkeypatch):
    made, limit, apply = [], [4], FTM._apply

    def until(self, request, edit):
        if len(made) == limit[-1]:
            raise KeyboardInterrupt
        made.append((self.hparams, request.id))
        apply(self, request, edit)

    monkeypatch.setattr(FTM, "_apply", until)
    with pytest.raises(KeyboardInterrupt):
        search()
    stopped, made[:] = [*made], []
    limit.append(None)
    search()
    assert len(stopped) == 4
    assert not set(stopped) & set(made)


def test_it_is_the_same_by_seed(search, llama, tmp_path, monkeypatch):
    first = search()
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path / "another"))
    assert search() == first
    kind = kind_of("memit")
    assert drawn(kind, llama, kind.space, 12, 0) != drawn(kind, llama, kind.space, 12, 1)
    assert drawn(kind, llama, kind.space, 12, 0)[:5] == drawn(kind, llama, kind.space, 5, 0)


def test_only_the_validation_split_is_read_and_edited(search, monkeypatch):
    read, edited, apply = [], set(), FTM.apply
    monkeypatch.setattr(facts, "load_object", lambda path: lambda split: read.append(split) or facts.bundled(split))
    monkeypatch.setattr(FTM, "apply", lambda self, request: edited.add(request.id) or apply(self, request))
    search()
    assert read == ["validation"]
    assert edited == {request.id for request in facts.bundled("validation")[:4]}


def test_the_block_is_what_was_measured(search, llama, monkeypatch):
    """It loads, is complete, and its numbers are those of the very edits that the store has under its values."""
    (block,) = yaml.safe_load(search())
    assert block["models"] == ["llama"]
    hparams = make_hparams(FTM, "nobody knows it", block["hparams"])
    monkeypatch.setattr(FTM, "_apply", lambda *_: pytest.fail("other values than those measured"))
    records = list(single_edits(llama, "ft-m", facts.bundled("validation")[:4], block["hparams"]))
    by_kind = {}
    for record in records:
        for before, after in zip(record["before"], record["after"], strict=True):
            wanted, other = ("true", "new") if after["kind"] == "locality" else ("new", "true")
            if after["kind"] != "locality" or before[wanted] > before[other]:
                by_kind.setdefault(after["kind"], []).append(after[wanted] > after[other])
    means = {kind: sum(right) / len(right) for kind, right in by_kind.items()}
    for kind, mean in means.items():
        assert f"{kind} {mean:.2f} (" in block["source"]
    assert f"harmonic mean {3 / sum(1 / mean for mean in means.values()):.2f}" in block["source"]
    for told in ("of 3 trials of 2 records", f"the model {llama.fingerprint[:12]}", "went on to 4"):
        assert told in block["source"]
    (command,) = re.findall(r"`python -m kedit (.*?)`", block["source"])
    settings = "'layer=[0, 1, 2, 3]' 'lr=[0.05, 0.01]'"
    assert command == f"tune ft-m llama {settings} --trials 3 --records 4 --set bundled --seed 0"
    assert hparams.layer in range(LAYERS)


@pytest.mark.parametrize(("best", "wins"), [(None, "default"), (0.05, 0.05), (0.01, 0.01)])
def test_the_best_wins_and_of_equals_the_default(search, monkeypatch, best, wins):
    """Reliability alone does not win; the default and a quarter of the others go on to all records."""
    asked = []

    def canned(kind, lm, hparams, requests):
        asked.append((hparams, len(requests)))
        means = [0.8, 0.8, 0.8] if hparams.lr == best else [1.0, 0.3, 1.0]
        return Trial(hparams, means, [0.0, 0.0, 0.0])

    monkeypatch.setattr(module, "tried", canned)
    (block,) = yaml.safe_load(search(trials=9))
    counts = [count for _, count in asked]
    assert counts == [2] * 9 + [4] * 3
    assert asked[0][0] == asked[9][0]
    default = make_hparams(FTM, "llama", None, module.load("llama").model.config)
    assert block["hparams"]["lr"] == (default.lr if wins == "default" else wins)
    assert ("none was better than the default" in block["source"]) == (wins == "default")


def test_what_cannot_be_measured_is_said(search, monkeypatch):
    requests = tuple(replace(request, neighbours=()) for request in facts.bundled("validation")[:4])
    monkeypatch.setattr(facts, "load", lambda name, split: requests)
    with pytest.raises(KeditError, match="locality cannot be measured on 2 records"):
        search()


@pytest.mark.parametrize("name", sorted(known()))
@pytest.mark.parametrize("layers", [4, 32])
def test_every_value_of_every_space_is_allowed(name, layers, llama, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    kind = kind_of(name)
    for key, options in kind.space.items():
        values = options(layers) if callable(options) else options
        assert len(values) > 0
        for value in values:
            base = {"layer": 0, "layers": [1], "mom2_weight": 1.0}
            needed = {one: base[one] for one in base if one in kind.Hparams.__dataclass_fields__}
            hparams = make_hparams(kind, "none", needed | {key: value})
            assert max(getattr(hparams, "layers", (getattr(hparams, "layer", 0),))) < layers


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["romme", "pico-0.4m"], "method 'romme' does not exist; did you mean 'rome'?"),
        (["rome", "pico-9m"], "model 'pico-9m'"),
        (["control", "pico-0.4m"], "method 'control' declares nothing to tune"),
        (["rome", "pico-0.4m", "--trials", "0"], "--trials is 0; it must be a whole number from 1 up."),
        (["rome", "pico-0.4m", "--records", "2"], "--records is 2; it must be a whole number from 3 up."),
        (["rome", "pico-0.4m", "--records", "9999"], "--records is 9999; the validation split of pico has "),
        (["rome", "pico-0.4m", "--seed", "-1"], "--seed is -1"),
        (["rome", "pico-0.4m", "--set", "counterfact"], "edit set with a validation split 'counterfact'"),
        (["rome", "pico-0.4m", "layer=3"], "'layer=3' is not a list of values; write such as layer=[3,5,7]."),
        (["rome", "pico-0.4m", "layer=[3"], "'layer=[3' is not a list"),
        (["rome", "pico-0.4m", "layer=[]"], "'layer=[]' is not a list"),
        (["rome", "pico-0.4m", "layr=[0]"], "unknown key 'layr'; did you mean 'layer'?"),
        (["rome", "pico-0.4m", "layer=[99]"], "layer 99 does not exist"),
        (["rome", "pico-0.4m", "lr=[-1]"], "lr is -1"),
    ],
)
def test_what_is_wrong_is_one_sentence_before_anything_is_tried(arguments, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path))
    assert main(["tune", *arguments]) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("kedit: ")]
    assert sentence in line
    assert not said.out
    assert not (tmp_path / "store").exists()
