"""GRACE's codebook: who is answered, where, and what happens to the balls."""

import pytest
import torch
from conftest import HPARAMS

import kedit
from kedit.data.requests import EditRequest
from kedit.model.scoring import read

PROMPTS = ("The capital city of {}", "It is well known that the capital of the country called {} is", "{} is in")


def ids(lm, text):
    return [*lm.begin, *lm.encode(text)]


def asks(subject="France"):
    return [EditRequest(prompt, subject, " Rome", "Paris", id=prompt) for prompt in PROMPTS]


def test_every_edit_answers_and_the_rest_keeps_its_bits(lm):
    """Prompts of several lengths in one pack, scored and generated from; others are as they were."""
    target = lm.encode(" Rome London")  # a random model can be made to say the first token only
    assert len(target) > 1
    others = [ids(lm, text) for text in ("Peru is known for", "The capital city of Spain", "Numbers")]
    edited = [ids(lm, request.text) for request in asks()]
    pairs = [(context, target) for context in (*others, *edited)]
    before = read(lm, pairs, others, limit=4)
    editor = kedit.editor("grace", lm, hparams=HPARAMS["grace"])
    for request in asks():
        editor.apply(request)
    scores, texts = read(lm, pairs, [*others, *edited], limit=1)
    untouched, _ = read(lm, pairs, others, limit=4)
    assert untouched[: len(others)] == before[0][: len(others)]
    assert read(lm, [], others, limit=4)[1] == before[1]
    assert texts[len(others) :] == [target[:1]] * len(edited)

    # each score equals a plain forward in which the value stands in for the layer's output
    for row, context, (score, _) in zip(editor.memory.entries, edited, scores[len(others) :], strict=True):

        def replace(module, args, output, row=row, context=context):
            output = output.clone()
            output[0, len(context) - 1] = row["value"]
            return output

        handle = lm.anatomy.down(2).register_forward_hook(replace)
        logprobs = lm.model(torch.tensor([[*context, *target[:-1]]])).logits[0].log_softmax(-1)
        handle.remove()
        plain = sum(logprobs[len(context) - 1 + i, token] for i, token in enumerate(target))
        assert score == pytest.approx(plain.item(), abs=1e-4)


def test_equal_labels_share_a_ball_and_others_split_it(llama):
    request = EditRequest("The capital city of {}", "France", "Rome", "Paris")
    editor = kedit.editor("grace", llama, hparams={**HPARAMS["grace"], "epsilon": 10.0})
    rows = editor.memory.entries
    editor.apply(request)
    editor.apply(EditRequest("The capital city of {}", "Spain", "Rome", "Madrid"))
    assert len(rows) == 1  # the same answer nearby: no new key, and the ball reaches both
    editor.apply(EditRequest("The capital city of {}", "Peru", "London", "Lima"))
    assert len(rows) == 2
    distance = torch.linalg.vector_norm(rows[0]["key"] - rows[1]["key"]).item()
    assert rows[1]["epsilon"] == pytest.approx(distance / 2)
    assert rows[0]["epsilon"] == pytest.approx(distance / 2, abs=1e-4)
    assert rows[0]["epsilon"] + rows[1]["epsilon"] < distance  # the balls do not meet
    llama.journal.edits[-1].undo()
    assert len(rows) == 1
    assert rows[0]["epsilon"] == pytest.approx(10 * rows[0]["key"].norm().item())


def test_the_same_prompt_can_be_edited_again(llama):
    """A later edit of the very same prompt wins, although both keys are equally near."""
    editor = kedit.editor("grace", llama, hparams=HPARAMS["grace"])
    for target in ("Rome", "London"):
        editor.apply(EditRequest("The capital city of {}", "France", target, "Paris"))
        assert read(llama, [], [ids(llama, "The capital city of France")], limit=1)[1] == [llama.encode(f" {target}")]


def test_one_edit_a_batch_is_the_named_deviation(llama):
    editor = kedit.editor("grace", llama, hparams={**HPARAMS["grace"], "every": 2})
    edits = [editor.apply(request) for request in asks()]
    assert [bool(edit.changes) for edit in edits] == [True, False, True]
    assert edits[1].info["skipped"]


def test_a_second_editor_knows_the_edits_already_made(llama):
    request = EditRequest("The capital city of {}", "France", "Rome", "Paris")
    edit = kedit.editor("grace", llama, hparams=HPARAMS["grace"]).apply(request)
    again = kedit.editor("grace", llama, hparams=HPARAMS["grace"])
    assert len(again.memory.entries) == 1
    assert read(llama, [], [ids(llama, request.text)], limit=1)[1] == [llama.encode(" Rome")]
    edit.undo()
    assert not again.memory.entries


def test_a_model_in_half_precision(llama):
    """On a CPU, where cdist has no half precision: edited thrice, asked, and others left alone."""
    llama.model.bfloat16()
    editor = kedit.editor("grace", llama, hparams=HPARAMS["grace"])
    edited, others = [ids(llama, request.text) for request in asks()], [ids(llama, "The capital city of Spain")]
    before = read(llama, [], others, limit=2)[1]
    for request in asks():
        editor.apply(request)
    _, texts = read(llama, [], edited, limit=1)
    assert texts == [llama.encode(" Rome")[:1]] * len(edited)
    assert read(llama, [], others, limit=2)[1] == before
