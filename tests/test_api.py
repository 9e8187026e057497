"""What stands at the top of the package: many edits at once, any edit undone, text, folders, benchmarks, runs."""

import contextlib
import copy
import io
import re

import numpy as np
import pytest
import torch
from conftest import CONTEXTS, HPARAMS, REQUEST
from derivation import derive
from test_editors import bits, make, same
from test_second_derivation import NEAR, STORED, derived, locating, rows, share  # noqa: F401 - a fixture
from transformers import AutoModelForCausalLM

import kedit
from kedit import KeditError
from kedit.data.requests import EditRequest
from kedit.editors import memit
from kedit.evaluation import benchmarks, harness
from kedit.model.forward import activations
from kedit.model.journal import Edit, EditFailed

MIRROR = kedit.ROOT.parent / "shared" / "data" / "hub"
MANY = [EditRequest("The capital city of {}", subject, "Rome", "Paris", id=subject) for subject in ("Spain", "Peru")]
SUMMARY = re.compile(r"<\w+ .{5,200}>")


@pytest.fixture
def pico():
    return kedit.load("pico-0.1m")


# Many at once ---------------------------------------------------------------------------------------


def dense(method, net):
    """The update of each layer by two requests at once, the requests' keys and moments as the derivation has them."""
    both, moments = [derive.request(STORED, name) for name in "AB"], {i: STORED[f"in_moment{i}"] for i in range(4)}
    if method != "alphaedit":
        found = derive.memit(net, both, [1, 2], 0.7, moments, derive.ZS, pmet=method == "pmet")[0]
    else:  # the derivation's batches are of one
        z = np.array([derive.z_search(net, one, [("block", 2)], **derive.ZS)[0][0] for one in both]).T
        bases = {layer: derive.null_basis(moments[layer], 0.4) for layer in (1, 2)}

        def system(layer, keys):
            basis = bases[layer]
            inside = basis.T @ keys
            return basis @ np.linalg.solve(inside @ inside.T + 0.5 * np.eye(len(inside)), inside)

        found = derive.spread(net, both, z, [1, 2], "block", float, system)
    return [found[f"left{layer}"] @ found[f"rightT{layer}"].T for layer in (1, 2)]


@pytest.mark.parametrize("method", ["memit", "pmet", "alphaedit"])
def test_a_batch_is_one_update_of_each_matrix(derived, monkeypatch, method):  # noqa: F811
    editor, _ = locating(method, derived, monkeypatch)
    edit = editor.apply([EditRequest(REQUEST.prompt, REQUEST.subject, "Rome", "Paris", id=name) for name in "AB"])
    written = [change for change in edit.changes if change.module]
    assert [change.right.shape[1] for change in written] == [2, 2]
    for change, update in zip(written, dense(method, derive.Net(STORED)), strict=True):
        assert share((change.left.double() @ change.right.double().T).numpy(), update) < NEAR
    assert [one["loss"] > 0 for one in edit.info["each"]] == [True, True]
    if method == "memit":
        stored = [STORED[f"out_memit2_left{n}"] @ STORED[f"out_memit2_rightT{n}"].T for n in (1, 2)]
        for change, update in zip(written, stored, strict=True):
            assert share((change.left.double() @ change.right.double().T).numpy(), update) < NEAR
    for layer in (1, 2) if method == "alphaedit" else ():  # what is held from now on are both keys, as edited
        after = [activations(derived, rows(name), [layer], "key")[layer].double() for name in "AB"]
        held = torch.stack([entry["keys"][layer - 1] for entry in editor.memory.entries])
        torch.testing.assert_close(held, torch.stack([(k[0] + k[1:].mean(0)) / 2 for k in after]))


@pytest.mark.parametrize("method", HPARAMS)
def test_many_requests_are_one_edit_that_is_undone_saved_and_replayed_whole(method, llama, statistics):
    editor = make(method, llama, statistics)
    before = bits(llama)
    edit = editor.apply(MANY)
    after = bits(llama)
    assert llama.journal.edits == [edit]
    assert (edit.request, llama.journal.count, len(edit.info["each"])) == (["Spain", "Peru"], 2, 2)
    saved = edit.to_bytes()
    edit.undo()
    assert same(llama, before)
    assert not same(llama, after)
    llama.journal.replay(again := Edit.from_bytes(saved))
    assert same(llama, after)
    assert again.request == ["Spain", "Peru"]
    llama.journal.reset()
    if not isinstance(editor, memit.MEMIT):
        for request in MANY:
            editor.apply(request)
        assert same(llama, after), "the same as one after another"


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_of_many_requests_all_are_written_or_none(method, llama, statistics):
    editor = make(method, llama, statistics)
    first = editor.apply(REQUEST)
    before = bits(llama)
    with pytest.raises(EditFailed, match="'ci' merges"):
        editor.apply([*MANY, EditRequest("The capital {}ty of", "ci", "Rome", "Paris")])
    assert same(llama, before)
    assert llama.journal.edits == [first]
    with pytest.raises(KeditError, match="list of requests is empty"):
        editor.apply([])


def test_one_request_in_a_list_is_the_same_edit(llama, statistics):
    alone, listed = (make("memit", llama, statistics).apply(asked) for asked in (REQUEST, [REQUEST]))
    assert alone.info.keys() == listed.info.keys()
    assert listed.request == ""


# Undo -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rome", "alphaedit", "ft-m", "kn"])
def test_any_edit_is_undone_as_if_it_had_not_been_written(method, llama, statistics):
    editor = make(method, llama, statistics)
    edits = [editor.apply(request) for request in (*MANY, REQUEST)]
    saved = [edit.to_bytes() for edit in edits]
    edits[1].undo()
    assert llama.journal.edits == [edits[0], edits[2]]
    left = bits(llama)
    with pytest.raises(KeditError, match="no longer"):
        edits[1].undo()
    llama.journal.reset()
    for data in (saved[0], saved[2]):
        llama.journal.replay(Edit.from_bytes(data))
    assert same(llama, left)


def test_an_edit_that_later_ones_build_on_is_not_undone(llama, statistics):
    editor = make("grace", llama, statistics)
    edits = [editor.apply(request) for request in MANY]
    before = bits(llama)
    with pytest.raises(KeditError, match=r"later ones by grace build on it; undo those first"):
        edits[0].undo()
    assert same(llama, before)
    edits[1].undo()
    edits[0].undo()
    assert not llama.journal.edits


# Text and folders -----------------------------------------------------------------------------------


def test_a_model_writes_on_greedily(pico):
    ids = torch.tensor([[*pico.begin, *pico.encode("The capital of")]])
    plain = pico.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    written = pico.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    assert pico.generate("The capital of", tokens=8) == written
    for wrong in (0, pico.window):
        with pytest.raises(KeditError, match="tokens from 1 up and below the window"):
            pico.generate("The", tokens=wrong)


def test_a_memory_is_asked_when_a_model_writes(llama, statistics):
    before = llama.generate(REQUEST.text, tokens=1)
    make("grace", llama, statistics).apply(REQUEST)
    assert llama.generate(REQUEST.text, tokens=1) == " Rome" != before


@pytest.mark.parametrize("method", ["rome", "alphaedit"])
def test_a_saved_model_is_the_edited_one_to_the_bit(method, llama, statistics, tmp_path):
    make(method, llama, statistics).apply(REQUEST)
    folder = llama.save(tmp_path / "some" / "edited")
    assert [path.name for path in folder.parent.iterdir()] == ["edited"]
    plain = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    for again in (kedit.load(str(folder)).model, plain):
        assert all(torch.equal(again.state_dict()[name], bit) for name, bit in llama.model.state_dict().items())
    assert kedit.load(str(folder)).generate(REQUEST.text) == llama.generate(REQUEST.text)
    with pytest.raises(KeditError, match="is there already"):
        llama.save(folder)


def test_edits_in_a_memory_are_never_left_out_of_a_saved_model(llama, statistics, tmp_path):
    edit = make("grace", llama, statistics).apply(REQUEST)
    for save in (llama.save, llama.model.save_pretrained, copy.deepcopy(llama.model).save_pretrained):
        with pytest.raises(KeditError, match="edits by grace are in a memory, not in the weights"):
            save(tmp_path / "edited")
    assert not list(tmp_path.iterdir())
    edit.undo()
    other = copy.deepcopy(llama.model)
    torch.nn.init.ones_(other.model.norm.weight)
    other.save_pretrained(tmp_path / "other")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "other", local_files_only=True)
    assert saved.model.norm.weight.eq(1).all(), "a copy writes its own weights"
    llama.save(tmp_path / "plain")


# Benchmarks and runs ----------------------------------------------------------------------------------


def test_a_bundled_benchmark_is_asked_as_in_a_run(pico):
    found = kedit.evaluate(pico, "pico_mmlu", limit=6)
    assert found.items == harness.evaluate(pico, "pico_mmlu", 6)
    assert found.score == np.mean([item["value"] for item in found.items])
    assert repr(found) == f"<Evaluation pico_mmlu: acc {found.score:.3f}, 6 items>"


def test_exemplars_are_as_many_as_asked_for_and_later_ones_as_before(pico, monkeypatch):
    read, lengths = harness.loglikelihoods, []
    monkeypatch.setattr(
        harness, "loglikelihoods", lambda lm, pairs: lengths.append(len(pairs[0][0])) or read(lm, pairs)
    )
    for shots in (0, 1, None, 0, None):
        kedit.evaluate(pico, "mini_mmlu", limit=1, num_fewshot=shots)
    none, one, all_five, *again = lengths
    assert none < one < all_five
    assert again == [none, all_five]
    with pytest.raises(KeditError, match="mini_mmlu cannot be asked with 99 exemplars"):
        kedit.evaluate(pico, "mini_mmlu", limit=1, num_fewshot=99)


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("mini_mmlu", {"limit": 0}, "limit is 0; it must be a whole number from 1 up"),
        ("mini_mmlu", {"num_fewshot": 1.5}, "num_fewshot is 1.5"),
    ],
)
def test_wrong_numbers_are_one_sentence(pico, name, given, sentence):
    with pytest.raises(KeditError, match=sentence):
        kedit.evaluate(pico, name, **given)


@pytest.mark.slow
@pytest.mark.skipif(not MIRROR.exists(), reason="the mirror of the hub is not here")
def test_any_task_of_lm_evals_own(pico, monkeypatch):
    import lm_eval

    monkeypatch.setenv("KEDIT_MIRROR", str(MIRROR))
    found = kedit.evaluate(pico, "commonsense_qa", limit=5, num_fewshot=1)
    about, tasks = benchmarks.find("commonsense_qa", 1)
    drawn = benchmarks.draw("commonsense_qa", 5, (about, tasks))
    with contextlib.redirect_stderr(io.StringIO()):
        reader = harness.SharedPrefixLM(pico)
        expected = lm_eval.evaluate(reader, tasks, samples=drawn, bootstrap_iters=0)["results"]["commonsense_qa"]
    assert (found.metric, len(found.items)) == ("acc", 5)
    assert found.score == expected["acc,none"]
    with pytest.raises(KeditError, match=r"'comonsense_qa' cannot be asked .*one of kedit's or of lm-eval's"):
        kedit.evaluate(pico, "comonsense_qa")


@pytest.mark.slow
def test_a_run_from_python(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path))
    given = {
        "models": ["pico-0.1m"],
        "methods": ["control"],
        "benchmarks": ["pico_mmlu"],
        "edits": [0, 1],
        "limit": 2,
        "orders": [0],
    }
    results = kedit.run("rq3/pico", workers=1, **given)
    assert {cell.benchmark for cell in results.cells} == {"edit", "pico_mmlu"}
    (folder,) = (path for path in (tmp_path / "rq3").iterdir() if path.is_dir())
    assert folder.name == results.params.name.removesuffix("/")
    assert folder.name.startswith("pico-")
    with pytest.raises(KeditError, match="no such parameter file"):
        kedit.run("rq3/nothing")


# Names ------------------------------------------------------------------------------------------------


def test_facts_by_name():
    assert kedit.load_facts("bundled", "train")[0].paraphrases
    with pytest.raises(KeditError, match="did you mean 'bundled'"):
        kedit.load_facts("bundeld")


def test_everything_public_is_listed_and_there():
    assert {"load", "editor", "evaluate", "load_facts", "run", "EditRequest", "LM", "__version__"} <= set(dir(kedit))
    assert all(getattr(kedit, name) is not None for name in dir(kedit))


def test_what_is_printed_is_a_line(llama, statistics):
    editor = make("alphaedit", llama, statistics)
    edit = editor.apply(MANY)
    for shown in (llama, editor, edit, REQUEST, *MANY):
        assert SUMMARY.fullmatch(repr(shown)), repr(shown)
    assert "2 edits" in repr(llama)
    assert "Rome" in repr(REQUEST)


def test_what_is_slow_is_announced(llama, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("Some words about the capital city of France. " * 60)
    moments = kedit.editors.SecondMoments(llama, str(text), 200)
    with caplog.at_level("INFO"):
        kedit.editor("memit", llama, hparams=HPARAMS["memit"], statistics=moments, contexts=CONTEXTS).prepare()
    assert re.search(r"second moments of layers \[1, 2\] of llama, once: about [\d.]+ minutes", caplog.text)


@pytest.mark.slow
def test_the_five_lines(smollm2, monkeypatch):
    """Those of the module's first docstring and of the README, as they stand, on a model loaded once."""
    monkeypatch.setattr(kedit.model.lm, "load", lambda name: smollm2)
    before = bits(smollm2)
    lines = [line.strip() for line in kedit.__doc__.splitlines() if line.startswith("    ")]
    readme = re.search(r"## In Python\n\n```python\n(.*?)```", (kedit.ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = [line.split("  #")[0] for line in readme.splitlines() if line.strip()]
    assert code[:5] == lines
    exec("\n".join(lines), {})
    assert same(smollm2, before)
