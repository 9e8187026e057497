"""A model in parts on several devices edits, reads and answers as one that is whole; the devices are simulated."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import ARCHITECTURES, CONTEXTS, HPARAMS, LAYERS, build
from devices import Devices

import kedit
from kedit.data.facts import bundled, bundled_zsre
from kedit.data.requests import EditRequest
from kedit.editors import ike, mend, serac
from kedit.editors.second_moments import SecondMoments
from kedit.evaluation import damage, success
from kedit.model.journal import Edit
from kedit.model.lm import LM

REQUESTS = [
    EditRequest(
        "The capital of {} is", subject, "Rome", "Paris", paraphrases=("The seat of government of {} is",), id=subject
    )
    for subject in ("France", "Spain")
]


class Placed(AlignDevicesHook):
    """What accelerate's ``dispatch_model`` hooks to every module; the weights are said to be there, not sent."""

    def init_hook(self, module):
        return module


def in_parts(lm, devices):
    """The model with its upper half, and its head unless that is its embedding, on a second device."""
    model, base, blocks = lm.model, lm.model.base_model_prefix, lm.anatomy.name(lm.anatomy.blocks)
    halves = {f"{blocks}.{n}": f"cpu:{n * 2 // LAYERS}" for n in range(LAYERS)}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    children = [name for name, _ in model.get_submodule(base).named_children() if f"{base}.{name}" != blocks]
    others = {name: f"cpu:{int(name in ('norm', 'ln_f', 'final_layer_norm'))}" for name in children}
    head = lm.anatomy.name(lm.anatomy.head)
    places = halves | {f"{base}.{name}": place for name, place in others.items()}
    places[head] = "cpu:0" if tied else "cpu:1"
    model.hf_device_map = places
    for part, place in places.items():
        for module in model.get_submodule(part).modules():
            add_hook_to_module(module, Placed(place, skip_keys="past_key_values"))
    add_hook_to_module(model, Placed("cpu:0", io_same_device=True, skip_keys="past_key_values"))
    with devices:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            devices.put(tensor, next(place for part, place in places.items() if name.startswith(part + ".")))
        return LM(model, lm.tokenizer, lm.name)


SETTINGS = {
    **{method: {**hparams, "points" if method == "kn" else "steps": 4} for method, hparams in HPARAMS.items()},
    "mend": {"layers": [1, 2], "rank": 8, "steps": 1, "accumulate": 2},
    "serac": {"steps": 1},
    "ike": {"k": 8, "spread": False, "scope": 0.65},
    "rag": {"scope": 0.65},
    "ultraedit": {"layers": [1, 2], "lr": 1e-3, "warmup": 4},
    "locft": {"layer": 2, "lr": 0.03, "epochs": 4},
}


@pytest.fixture(autouse=True)
def little_to_learn(tmp_path, monkeypatch):
    """Few facts to train on and to show, and no text but a page."""
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    for module in (mend, serac, ike):
        monkeypatch.setattr(module, "bundled", lambda split: bundled(split)[:24])
    monkeypatch.setattr(serac, "bundled_zsre", lambda split: bundled_zsre(split)[:24])


def run(lm, method, statistics, text):
    """Edits, one of them replayed from its bytes; what is said of them, and the damage."""
    editor = kedit.editor(method, lm, hparams=SETTINGS[method], statistics=statistics(lm), contexts=CONTEXTS)
    saved = editor.apply(REQUESTS[0]).to_bytes()
    lm.journal.reset()
    lm.journal.replay(Edit.from_bytes(saved))
    editor.apply(REQUESTS[1])
    said = success.measure(lm, REQUESTS)
    lm.journal.edits[-1].undo()
    return said, success.measure(lm, REQUESTS), damage.measure(lm, text, passages=2, skip=0)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", SETTINGS)
def test_a_model_in_parts_does_as_a_whole_one(method, architecture, tokenizer, moments, tmp_path):
    text = tmp_path / "page.txt"
    text.write_text("The capital of France is Paris, and Lyon is a city on a river there. " * 100)
    whole = LM(build(architecture, len(tokenizer)), tokenizer, architecture)
    expected = run(whole, method, lambda lm: SecondMoments(lm, moments=moments), str(text))
    devices = Devices()
    lm = in_parts(LM(build(architecture, len(tokenizer)), tokenizer, architecture), devices)
    with devices:
        assert {str(devices.of(weight)) for weight in lm.model.parameters()} == {"cpu:0", "cpu:1"}
        placed = {layer: devices.put(moment.clone(), "cpu") for layer, moment in moments.items()}
        found = run(lm, method, lambda lm: SecondMoments(lm, moments=placed), str(text))
    assert devices.crossings > 100
    assert found == expected


def test_the_simulation_refuses_what_devices_would():
    with Devices() as devices:
        left, right = torch.ones(2, device="cpu:0"), torch.ones(2, device="cpu:1")
        assert [str(one.device) for one in (left, right, left + 1, torch.ones(2))] == ["cpu:0", "cpu:1", "cpu:0", "cpu"]
        for wrong in (lambda: left + right, lambda: left @ torch.ones(2), lambda: left.numpy()):
            with pytest.raises(RuntimeError):
                wrong()
        assert (left + right.to(left)).sum() == 4
        assert left[torch.tensor([0])].device == left.device
        assert devices.crossings == 1
