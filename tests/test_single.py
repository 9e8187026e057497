"""Single edits: undone, stored, counted."""

import pytest
import torch
from conftest import HPARAMS

from kedit.data.facts import bundled
from kedit.editors.ft import FTM
from kedit.study.single import costs, single_edits, successes


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
