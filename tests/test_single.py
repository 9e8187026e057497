"""Single edits: undone, stored, counted; scans name what is wrong with a setting."""

import pytest
import torch
from conftest import HPARAMS

from kedit import KeditError
from kedit.data.facts import bundled
from kedit.editors.ft import FTM
from kedit.study.single import costs, scan, single_edits, successes


def test_single_edits_are_undone_and_made_once(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path))
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    requests = bundled("validation")[:3]
    first = list(single_edits(llama, "ft-m", requests, HPARAMS["ft-m"]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.model.state_dict().items())
    assert [len(record["after"]) for record in first] == [1 + len(r.paraphrases) + len(r.neighbours) for r in requests]
    values = [item["value"] for item in successes(first)["reliability"]]
    assert values == [record["after"][0]["new"] > record["after"][0]["true"] for record in first]
    assert costs(first)["failed"] == 0 < costs(first)["seconds"]
    monkeypatch.setattr(FTM, "_apply", lambda *_: pytest.fail("made again"))
    assert list(single_edits(llama, "ft-m", requests, HPARAMS["ft-m"])) == first


@pytest.mark.parametrize("setting", ["layer=3", "layer", "layer="])
def test_a_scan_wants_lists(setting):
    with pytest.raises(KeditError, match=r"layer=\[3,5,7\]"):
        scan("rome", [setting], 20, "smollm2-135m-instruct")
