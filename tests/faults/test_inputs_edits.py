"""Requests that are hard to edit, by every method on tiny models: the edit is made and undone, or fails and leaves no trace."""

import json
import math
import sys

import pytest
import torch
from conftest import CONTEXTS, HPARAMS, LASTING, build
from hypothesis import given
from hypothesis import strategies as st
from injected import cases, judged

import kedit
from kedit.data.facts import bundled, bundled_zsre
from kedit.data.requests import EditRequest
from kedit.editors import EDITORS, kind_of
from kedit.editors.retrieval import Encoder
from kedit.editors.second_moments import SecondMoments
from kedit.evaluation.success import measure, outcomes
from kedit.model.journal import EditFailed
from kedit.model.lm import LM

SETTINGS = {
    **{method: {**given, "points" if method == "kn" else "steps": 3} for method, given in (HPARAMS | LASTING).items()},
    "control": {},
    "mend": {"layers": [2, 3], "rank": 4, "steps": 1, "accumulate": 1, "validate": 1},
    "serac": {"steps": 0},
    "ike": {"k": 8},
    "rag": {},
    "ultraedit": {"layers": [2], "lr": 1e-3, "warmup": 12},
    "locft": {"layer": 2, "epochs": 3, "lr": 0.05},
}
FEW = {split: bundled(split)[:24] for split in ("train", "validation")}


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """Few training facts, one sentence encoder, trained parts apart from those of others."""
    encoder = Encoder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        instead = {
            "Encoder": lambda device: encoder,
            "bundled": FEW.get,
            "bundled_zsre": lambda split: bundled_zsre(split)[:24],
        }
        for module in {sys.modules[kind_of(method).__module__] for method in EDITORS}:
            for name in instead.keys() & vars(module).keys():
                patch.setattr(module, name, instead[name])
        yield


@pytest.fixture(scope="module")
def editors(tokenizer):
    """An editor by (method, architecture, begin token or none), made once."""
    made = {}
    keys = torch.randn(4, 400, 48, generator=torch.Generator().manual_seed(1))
    moments = {layer: keys[layer].T @ keys[layer] / 400 for layer in range(4)}

    def editor(method, architecture, begin):
        if (key := (method, architecture, begin)) not in made:
            lm = LM(build(architecture, len(tokenizer)), tokenizer, architecture, begin)
            statistics = SecondMoments(lm, moments=moments)
            made[key] = kedit.editor(
                method, lm, hparams=SETTINGS[method], statistics=statistics, contexts=CONTEXTS[: 1 + 2 * begin]
            )
            made[key].prepare()
        return made[key]

    return editor


def state(lm: LM) -> str:
    memories = {name: memory.entries for name, memory in lm.memories.items()}
    weights = {name: tensor.numpy().tobytes() for name, tensor in lm.model.state_dict().items()}
    return f"{hash(tuple(weights.items()))} {json.dumps(memories, default=torch.Tensor.tolist)}"


def tried(editor, request: EditRequest, finite: bool = True) -> bool:
    """Edit, ask, undo; whether the edit was made. Everything else that may happen is an assertion."""
    lm = editor.lm
    unedited, before = state(lm), measure(lm, [request])
    try:
        edit = editor.apply(request)
    except EditFailed:
        assert state(lm) == unedited
        assert not lm.journal.edits
        return False
    assert (state(lm) != unedited) == (editor.edits and "skipped" not in edit.info)
    after = measure(lm, [request])
    json.dumps(after)
    outcomes(after, before)
    if finite:
        assert all(tensor.isfinite().all() for tensor in lm.model.state_dict().values())
        assert all(math.isfinite(item["new"]) and math.isfinite(item["true"]) for item in before)
    edit.undo()
    assert state(lm) == unedited
    assert json.dumps(measure(lm, [request])) == json.dumps(before)  # where nan is nan
    return True


def long(lm: LM, room: int) -> str:
    """A prompt with its subject, the begin token and a target of one token, that leaves so much room in the window."""
    most = lm.window if lm.window < 1000 else 512
    unit, rest = lm.encode(" the"), len(lm.encode("France")) + len(lm.encode(" a")) + len(lm.begin)
    return " the" * ((most - room - rest) // len(unit)) + " {}"


REQUESTS = {
    "subject first": lambda lm: EditRequest("{} has the capital", "France", "Rome", "Paris"),
    "subject alone": lambda lm: EditRequest("{}", "F", "Rome", "Paris"),
    "subject twice": lambda lm: EditRequest("France is France, and {} is", "France", "Rome", "Paris"),
    "subject is the target": lambda lm: EditRequest("The name of {} is", "France", "France", "Gaul"),
    "answered already": lambda lm: EditRequest("The name of {} is", "France", "Rome", "Paris"),
    "long target": lambda lm: EditRequest("The name of {} is", "France", "Rome and " * 30 + "Rome", "Paris"),
    "empty paraphrases": lambda lm: EditRequest(
        "The name of {} is", "France", "Rome", "Paris", ("",), (("", "Paris"),)
    ),
    "no true object": lambda lm: EditRequest("The name of {} is", "France", "Rome"),
    "right to left": lambda lm: EditRequest("שמה של {} הוא", "צרפת", "רומא", "פריז", ("בירת צרפת",)),
    "combining": lambda lm: EditRequest("The name of {} is", "Zu\u0308rich e\u0301", "Que\u0301bec", "Bern"),
    "joined": lambda lm: EditRequest("The name of {}\u200d is", "👩\u200d👩", "👧", "👦"),
    "merging": lambda lm: EditRequest("{}s live in", "American", "Rome", "Paris"),
    "no words": lambda lm: EditRequest("{}", "\u0301", "\u200b.", "?"),
    "fits the window": lambda lm: EditRequest(long(lm, 40), "France", "a", "b"),
    "beyond the window": lambda lm: EditRequest(long(lm, 0), "France", "a", "b"),
    "far beyond the window": lambda lm: EditRequest(long(lm, -600), "France", "a", "b", (long(lm, -900).format("it"),)),
    "a paraphrase beyond": lambda lm: EditRequest(
        "The name of {} is", "France", "a", "b", (long(lm, -9).format("it"),)
    ),
}


@pytest.mark.parametrize("method", EDITORS)
@pytest.mark.parametrize("what", REQUESTS)
def test_a_hard_request_is_edited_or_fails_without_a_trace(editors, method, what):
    for architecture, begin in (("gpt2", True), ("gpt2", False), ("llama", False)):
        editor = editors(method, architecture, begin)
        lm, request = editor.lm, REQUESTS[what](editor.lm)
        if what == "answered already":
            top = (
                lm.model(torch.tensor([[*lm.begin, *lm.encode(request.text)]])).logits[0, -1].topk(50).indices.tolist()
            )
            words = [word for word in map(lm.tokenizer.decode, top) if word[:1] == " " and word[1:].isalpha()]
            request = EditRequest(request.prompt, request.subject, words[0] if words else "the", "Paris")
        with judged(f"numerics: {what}"):
            made = tried(editor, request)
            if architecture == "gpt2" and what in ("beyond the window", "far beyond the window"):
                assert not made or method in ("control",), "an edit that does not fit was made"


@pytest.mark.parametrize("method", EDITORS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_a_broken_model_is_edited_or_fails_without_a_trace(editors, method, value):
    editor = editors(method, "llama", True)
    norm = editor.lm.model.model.norm.weight
    whole = norm.detach().clone()
    with judged("numerics: logits that are not finite"):
        norm[0] = value
        try:
            tried(editor, EditRequest("The name of {} is", "France", "Rome", "Paris", ("It is",)), finite=False)
        finally:
            norm.copy_(whole)


WORDS = st.one_of(
    st.text(min_size=1, max_size=8),
    st.sampled_from(["France", "Zu\u0308rich", "צרפת", "a b", "New York", "’", "0", "<|endoftext|>", "\u3000x", "{}"]),
)


@given(
    st.sampled_from(list(EDITORS)),
    st.sampled_from(["gpt2", "llama"]),
    st.booleans(),
    st.lists(WORDS, min_size=6, max_size=6),
)
@cases(25, 500)
def test_any_text_is_refused_or_edited_or_fails_without_a_trace(editors, method, architecture, begin, words):
    head, tail, subject, new, true, more = words
    with judged("numerics: texts of any characters"):
        try:
            request = EditRequest(head + "{}" + tail, subject, new, true, (more,), ((more, true),))
        except ValueError:  # named by its record where it comes from a file
            return
        tried(editors(method, architecture, begin), request)
