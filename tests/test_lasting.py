"""Turns of many edits, UltraEdit, RAG and LocFT-BF, each against a plain derivation."""

from dataclasses import replace

import pytest
import torch
from conftest import HPARAMS, REQUEST, build

import kedit
from kedit import KeditError
from kedit.__main__ import main
from kedit.analysis import scores, tables
from kedit.data.facts import bundled
from kedit.editors import rag, ultraedit
from kedit.editors.locft import LocFT
from kedit.editors.rag import RAG
from kedit.editors.retrieval import Encoder
from kedit.editors.ultraedit import Running, UltraEdit
from kedit.model.anatomy import matrix
from kedit.model.journal import FORMAT, Edit, EditFailed
from kedit.model.lm import LM
from kedit.model.scoring import read
from kedit.store import digest
from kedit.study.params import Params
from kedit.study.run import run, units
from kedit.study.trajectory import Line, states_of

FACTS = bundled("validation")[:6]


def weights(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], tensor) for name, tensor in other.items())


# Turns --------------------------------------------------------------------------------------------

GRID = {
    "models": ["smollm2-135m-instruct"],
    "methods": ["memit"],
    "edits": [0, 2, 4],
    "benchmarks": ["mini_mmlu"],
}


def grid(turn, edits=(0, 2, 4), method="memit", variant="many"):
    about = {"method": method, "variant": variant, "turn": turn}
    return GRID | {"methods": [about], "edits": list(edits)}


def test_a_turn_of_one_changes_no_key_and_no_fingerprint():
    """The chain of hashes by hand, and what is said of a method that says turn: 1."""
    requests, recipe = list(FACTS[:4]), {"method": "memit"}
    chain = [digest("model", "fingerprint")]
    for request in requests:
        chain.append(digest(FORMAT, chain[-1], recipe, request.key()))
    assert states_of("fingerprint", recipe, requests) == dict(enumerate(chain))
    assert states_of("fingerprint", recipe, requests, [0, 1, 2, 3, 4]) == dict(enumerate(chain))
    plain = Params.make("rq1", "x", GRID)
    said = Params.make("rq1", "x", GRID | {"methods": [{"method": "memit", "turn": 1}]})
    assert plain.model_dump()["methods"] == [{"method": "memit", "variant": "default", "hparams": {}}]
    assert said.fingerprint() == plain.fingerprint()
    assert said.values() == plain.values()
    assert [unit.count for unit in units(plain, "m", {Line(0, 0): dict(enumerate(chain))}) if not unit.is_cell] == [
        1,
        2,
        3,
        4,
    ]


def test_the_state_after_a_turn_depends_on_all_of_it_and_on_where_turns_end():
    requests, recipe = list(FACTS[:4]), {"method": "memit"}
    ones, twos, whole = (states_of("f", recipe, requests, steps) for steps in (range(5), [0, 2, 4], [0, 4]))
    assert twos.keys() == {0, 2, 4}
    assert len({ones[4], twos[4], whole[4]}) == 3
    other = [replace(requests[0], target_new="Oslo"), *requests[1:]]
    assert states_of("f", recipe, other, [0, 2, 4])[2] != twos[2]
    assert Params.make("rq1", "x", grid("checkpoint", [1, 4])).steps(Params.make("rq1", "x", grid(2)).methods[0]) == [
        0, 2, 4,
    ]  # fmt: skip
    between = Params.make("rq1", "x", grid("checkpoint", [1, 4]))
    assert between.steps(between.methods[0]) == [0, 1, 4]
    assert between.fingerprint() != Params.make("rq1", "x", grid(1, [1, 4])).fingerprint()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (grid(4, [2, 4]), "edits asks for 2, within a turn of memit many; use multiples of 4, its turn."),
        (grid(2, method="rome"), "rome writes one edit a step; leave its turn out."),
        (grid("checkpoint", method="grace"), "grace writes one edit a step; leave its turn out."),
        (grid(2, variant="default"), "methods changes the turn of memit; name the variant."),
        (grid(0), "methods.turn is 0; it must be a whole number from 1 up, or checkpoint."),
        (grid("all"), "methods.turn is 'all'; it must be a whole number from 1 up, or checkpoint."),
        (grid(True), "methods.turn is True; it must be a whole number from 1 up, or checkpoint."),
    ],
)
def test_a_wrong_turn_is_one_sentence(values, sentence):
    with pytest.raises(KeditError) as raised:
        Params.make("rq1", "x", values)
    assert str(raised.value) == f"parameters: {sentence}"


def test_a_wrong_turn_ends_with_code_2(tmp_path, capsys):
    path = tmp_path / "rq1" / "x.yaml"
    path.parent.mkdir()
    path.write_text(
        "models: [smollm2-135m-instruct]\nmethods: [{method: memit, variant: v, turn: 3}]\nedits: [4]\nbenchmarks: [mini_mmlu]\n"
    )
    assert main(["plan", str(path)]) == 2
    assert "use multiples of 3, its turn" in capsys.readouterr().err


def test_which_methods_write_together():
    kinds = {
        name: kedit.editors.kind_of(name).together()
        for name in ("memit", "pmet", "alphaedit", "ultraedit", "locft", "rome", "ft-m", "rag", "control")
    }
    assert [name for name, together in kinds.items() if together] == [
        "memit",
        "pmet",
        "alphaedit",
        "ultraedit",
        "locft",
    ]


@pytest.mark.slow
def test_a_run_in_turns(tokenizer, tmp_path, monkeypatch):
    """Steps, keys, tables of a run whose methods write by twos; a second one finds all of it."""
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    build("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The capital of France is Paris, and the movie was directed by a writer. " * 300)
    memit = HPARAMS["memit"] | {"steps": 3, "context_lengths": [[3, 2]]}
    params = Params.make("rq1", "turns", {
        "models": [str(tmp_path / "model")], "edits": [2, 4], "benchmarks": ["mini_mmlu"], "limit": 2,
        "methods": [
            {"method": "memit", "variant": "by twos", "hparams": memit, "turn": 2},
            {"method": "locft", "variant": "replay", "hparams": {"layer": 1, "replay": True, "epochs": 2}, "turn": "checkpoint"},
            {"method": "ultraedit", "variant": "one", "hparams": {"layers": [1], "lr": 1e-3, "warmup": 3}},
        ],
        "statistics": {"text": str(tmp_path / "text.txt"), "tokens": 2048},
    })  # fmt: skip
    found = run(params, workers=1)
    ids = [request.id for request in params.requests(0)]
    by = {method: [edit for edit in found.edits if edit.method == method] for method in ("memit", "locft", "ultraedit")}
    for method in ("memit", "locft"):
        assert [(edit.number, edit.request) for edit in by[method]] == [(2, ids[:2]), (4, ids[2:])]
    assert [(edit.number, edit.request) for edit in by["ultraedit"]] == list(enumerate(ids, 1))
    assert [edit.info["trained_on"] for edit in by["locft"]] == [2, 4]
    assert not any("failed" in edit.info for edit in found.edits)
    ages = {(line[1], count, age) for line, count, age, _ in scores._aged(found)}
    assert {(count, age) for method, count, age in ages if method == "memit"} == {(2, 0), (4, 0), (4, 2)}
    assert tables.journal_table(found)["edits"].tolist() == [4, 4, 4]
    again = run(params, workers=1)
    assert again.manifest["computed"] == {"edit": 0, "cell": 0}
    assert scores.table(again).equals(scores.table(found))


def test_a_failed_turn_counts_all_its_requests(caplog):
    from kedit.study.results import EditRecord, Results, failures

    edits = [
        EditRecord("m", "memit", "v", 0, 2, ["a", "b"], 9, {"failed": "x"}),
        EditRecord("m", "rome", "v", 0, 1, "a", 9, {}),
    ]
    assert failures(edits) == {"memit": 2}
    Results(None, [], edits, {}).tell_failures()
    assert "2 of 3 edits failed" in caplog.text


# UltraEdit ----------------------------------------------------------------------------------------

ULTRA = {"layers": [1, 2], "parts": ["gate", "up", "down"], "lr": 1e-4, "batch": 2, "warmup": 4}


def ultra(lm, **changes):
    return kedit.editor("ultraedit", lm, hparams={**ULTRA, **changes})


def plain_rows(lm, modules, batch):
    """Inputs and gradients of the outputs, by backward hooks, text by text, in float64: rows [h | q] for each module."""
    texts = [([*lm.begin, *lm.encode(one.text)], lm.encode(f" {one.target_new.strip()}")) for one in batch]
    tokens, rows = sum(len(target) for _, target in texts), [[] for _ in modules]
    for prompt, target in texts:
        seen = {}
        handles = [
            module.register_forward_hook(lambda m, args, out, n=n, seen=seen: seen.__setitem__(n, (args[0], out)))
            for n, module in enumerate(modules)
        ]
        embedded = lm.model.get_input_embeddings()(torch.tensor([[*prompt, *target[:-1]]])).requires_grad_()
        logits = lm.model(inputs_embeds=embedded, use_cache=False).logits[0, len(prompt) - 1 :]
        loss = -logits.log_softmax(-1)[range(len(target)), target].sum() / tokens
        gradients = torch.autograd.grad(loss, [seen[n][1] for n in range(len(modules))])
        for handle in handles:
            handle.remove()
        for n, gradient in enumerate(gradients):
            pair = seen[n][0][0, len(prompt) - 1 :], gradient[0, len(prompt) - 1 :]
            rows[n].append(torch.cat([one.detach() for one in pair], 1))
    return [torch.cat(some) for some in rows]


def densely(weight, rows, every, lr, ridge):
    """The weight after a turn, by the d_in x d_in system; the spread that of all rows of its shape so far, as they are."""
    inputs = weight.shape[1]
    normal = (rows - every.mean(0)) / (every.std(0) + 1e-7)
    h, (hh, qq) = rows[:, :inputs], normal.split([inputs, weight.shape[0]], 1)
    values = -lr * hh.square().sum(1, keepdim=True) * qq
    return weight + torch.linalg.solve(h.T @ h + ridge * torch.eye(inputs).double(), h.T @ values).T


def test_ultraedit_is_the_dense_formula(tokenizer):
    """Three turns of different size, in batches of two, in float64, with a warm-up in batches of the same size."""
    lm = LM(build("llama", len(tokenizer)).double(), tokenizer, "llama")
    modules = [part(layer) for layer in (1, 2) for part in (lm.anatomy.gate, lm.anatomy.up, lm.anatomy.down)]
    shapes = [tuple(matrix(module).shape) for module in modules]
    editor, known, turns = ultra(lm), bundled("train")[:4], [FACTS[:2], FACTS[2:5], FACTS[5:6]]
    warm = {size: [plain_rows(lm, modules, known[n : n + size]) for n in range(0, 4, size)] for size in (1, 2)}
    made = []
    for turn in turns:
        size = min(2, len(turn))
        new = [plain_rows(lm, modules, turn[n : n + size]) for n in range(0, len(turn), size)]
        made += new
        expected = []
        for index, module in enumerate(modules):
            every = torch.cat([
                part for batch in (*warm[size], *made) for part, shape in zip(batch, shapes, strict=True)
                if shape == shapes[index]
            ])  # fmt: skip
            rows = torch.cat([batch[index] for batch in new])
            expected.append(densely(matrix(module).clone(), rows, every, ULTRA["lr"], 1.0))
        before = [matrix(module).clone() for module in modules]
        edit = editor.apply(list(turn))
        for module, was, dense in zip(modules, before, expected, strict=True):
            assert (matrix(module) - dense).norm() < 1e-4 * (dense - was).norm()  # logits are in float32
        assert edit.info["relative_change"] == pytest.approx(
            [((dense - was).norm() / was.norm()).item() for was, dense in zip(before, expected, strict=True)], rel=1e-3
        )
    assert len(lm.journal.edits) == 3


def test_the_low_rank_form_is_the_dense_one(llama):
    editor, generator = ultra(llama), torch.Generator().manual_seed(0)
    rows = torch.randn(7, 80, generator=generator, dtype=torch.float64)
    totals = {"32x48": Running.of(rows)}
    left, right = editor._factors(rows[:, :48], rows[:, 48:], totals, "32x48")
    zero = torch.zeros(32, 48, dtype=torch.float64)
    dense = densely(zero, rows, rows, ULTRA["lr"], 1.0)
    assert (left @ right.T - dense).norm() < 1e-12 * dense.norm()


def test_running_statistics_are_exact():
    generator = torch.Generator().manual_seed(0)
    rows = 3 + torch.randn(50, 6, generator=generator, dtype=torch.float64)
    for products in (False, True):
        parts = [Running.of(some, products) for some in rows.split([1, 20, 1, 28])]
        total = parts[0]
        for part in parts[1:]:
            total = total.merged(part)
        assert total.count == 50
        torch.testing.assert_close(total.mean, rows.mean(0), rtol=1e-14, atol=0)
        spread = rows.T.cov() if products else rows.var(0)
        torch.testing.assert_close(total.squares / 49, spread, rtol=1e-13, atol=1e-14)


def test_ultraedit_lowers_the_loss_and_warm_up_edits_nothing(lm):
    editor, before = kedit.editor("ultraedit", lm, hparams={"layers": [1, 2], "lr": 3e-5, "warmup": 6}), weights(lm)
    editor.prepare()
    warm = editor.warm(1)
    assert same(weights(lm), before)
    assert not editor.memory.entries
    edit = editor.apply(REQUEST)
    assert edit.info["rows"] == warm["32x48"].count + 2 * edit.info["tokens"]  # of two projections
    texts = [editor._text(REQUEST)]
    assert ultraedit.read(lm, editor.modules, texts)[1] < edit.info["loss_before"]


def test_ultraedit_undoes_and_replays_its_statistics(llama):
    editor, saved, states = ultra(llama), [], []

    def state():
        totals = {
            name: [total.count, total.mean.tolist(), total.squares.tolist()]
            for name, total in editor.memory.totals.items()
        }
        return totals, weights(llama)

    def agree(one, other):
        return one[0] == other[0] and same(one[1], other[1])

    for turn in (FACTS[:2], FACTS[2:3], FACTS[3:6]):
        saved.append(editor.apply(list(turn)).to_bytes())
        states.append(state())
    llama.journal.edits[1].undo()
    without = state()
    assert without[0]["32x48"][0] == states[0][0]["32x48"][0] + states[2][0]["32x48"][0] - states[1][0]["32x48"][0]
    llama.journal.reset()
    assert not editor.memory.totals
    for number in (0, 2):
        llama.journal.replay(Edit.from_bytes(saved[number]))
    assert agree(state(), without)
    llama.journal.reset()
    for data, expected in zip(saved, states, strict=True):
        llama.journal.replay(Edit.from_bytes(data))
        assert agree(state(), expected)


def test_one_token_without_warm_up_fails_and_says_why(llama):
    before = weights(llama)
    assert len(llama.encode(" Rome")) == 1
    with pytest.raises(EditFailed, match="set warmup"):
        kedit.editor("ultraedit", llama, hparams={"layers": [1], "warmup": 0}).apply(REQUEST)
    assert same(weights(llama), before)


def test_whitened_gradients_have_no_correlation_left(llama):
    """Of all rows so far, once there are more than q is wide; until then they are scaled feature by feature."""
    editor, generator = ultra(llama, whiten=True), torch.Generator().manual_seed(0)
    mixed = torch.randn(200, 80, generator=generator).double() @ torch.randn(80, 80, generator=generator).double()
    editor.memory.add({"32x48": mixed.float()})
    mixed = mixed.float().double()
    left, _ = editor._factors(mixed[:, :48], mixed[:, 48:], editor.memory.totals, "32x48")
    hh = (mixed[:, :48] - mixed[:, :48].mean(0)) / (mixed[:, :48].std(0) + 1e-7)
    qq = left.T / (-ULTRA["lr"] * hh.square().sum(1, keepdim=True))
    assert (qq.T.cov() - torch.eye(32)).abs().max() < 1e-6
    assert qq.mean(0).abs().max() < 1e-6
    few = {"32x48": Running.of(mixed[:33]), "q32x48": Running.of(mixed[:33, 48:], products=True)}
    scaled = editor._factors(mixed[:33, :48], mixed[:33, 48:], few, "32x48")[0]
    editor.hparams = replace(editor.hparams, whiten=False)
    assert torch.equal(scaled, editor._factors(mixed[:33, :48], mixed[:33, 48:], few, "32x48")[0])


def test_a_gate_that_is_not_there_is_one_sentence(tokenizer):
    lm = LM(build("gpt2", len(tokenizer)), tokenizer, "gpt2")
    with pytest.raises(KeditError, match="ultraedit cannot edit the gate of GPT2LMHeadModel, which has none"):
        ultra(lm).apply(REQUEST)


# RAG ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    return Encoder()


@pytest.fixture(autouse=True)
def one_encoder(monkeypatch, encoder):
    monkeypatch.setattr(rag, "Encoder", lambda device: encoder)


def ids_of(lm, text):
    return (*lm.begin, *lm.encode(text))


def told(fact):
    return f"Q: {fact.text} A: {fact.target_new}\n"


def before(lm, text):
    """What is read before a text, whose own tokens are read as they are; None if it is read alone."""
    (route,) = next(iter(lm.memories.values())).routes([ids_of(lm, text)])
    if route is None:
        return None
    body = lm.encode(text)
    assert route.lm is lm
    assert list(route.ids[-len(body) :]) == body
    assert route.ids[: len(lm.begin)] == tuple(lm.begin)
    return lm.tokenizer.decode(route.ids[len(lm.begin) : -len(body)])


FAR = "Once upon a time there was"


def test_rag_tells_the_nearest_two_before_every_prompt(lm, encoder):
    editor = RAG(lm, rag.Hparams())
    editor.apply(FACTS[0])
    assert before(lm, FACTS[0].text) == told(FACTS[0])
    for fact in FACTS[1:4]:
        editor.apply(fact)
    for text in (FAR, *(fact.text for fact in FACTS)):
        similarity = [float(encoder([text])[0] @ encoder([fact.text])[0]) for fact in FACTS[:4]]
        second, first = sorted(range(4), key=similarity.__getitem__)[-2:]
        assert before(lm, text) == told(FACTS[second]) + told(FACTS[first])


def test_rag_answers_as_after_the_joined_tokens(lm):
    editor, target = RAG(lm, rag.Hparams()), lm.encode(" Rome Paris")
    editor.apply(FACTS[0])
    editor.apply(FACTS[1])
    whole = [*lm.begin, *lm.encode(told(FACTS[1]) + told(FACTS[0])), *lm.encode(FACTS[0].text)]
    logprobs = lm.model(torch.tensor([[*whole, *target]])).logits[0, len(whole) - 1 : -1].log_softmax(-1)
    expected = logprobs[range(len(target)), target].sum().item()
    (((score, _),), _) = read(lm, [(ids_of(lm, FACTS[0].text), target)], [])
    assert score == pytest.approx(expected, abs=2e-4)


def test_rag_in_scope_only(llama):
    prompts = [ids_of(llama, text) for text in (FAR, FACTS[0].text)]
    pairs = [(prompt, llama.encode(" Rome")) for prompt in prompts]
    unedited = read(llama, pairs, prompts, 4)
    editor = RAG(llama, rag.Hparams(scope=0.65))
    editor.apply(FACTS[0])
    editor.apply(next(fact for fact in bundled("train") if fact.relation != FACTS[0].relation))
    assert before(llama, FAR) is None
    assert before(llama, FACTS[0].text) == told(FACTS[0])
    scored, texts = read(llama, pairs, prompts, 4)
    assert (scored[0], texts[0]) == (unedited[0][0], unedited[1][0])
    assert scored[1] != unedited[0][1]


def test_a_fact_told_again_takes_the_place_of_the_earlier(llama):
    editor, again = RAG(llama, rag.Hparams()), replace(FACTS[0], target_new="Atlantis")
    for fact in (FACTS[0], FACTS[1], again):
        editor.apply(fact)
    assert before(llama, FACTS[0].text) == told(FACTS[1]) + told(again)
    saved = [edit.to_bytes() for edit in llama.journal.edits]
    llama.journal.edits[-1].undo()
    assert before(llama, FACTS[0].text) == told(FACTS[1]) + told(FACTS[0])
    llama.journal.reset()
    for data in saved:
        llama.journal.replay(Edit.from_bytes(data))
    assert before(llama, FACTS[0].text) == told(FACTS[1]) + told(again)


# LocFT-BF -----------------------------------------------------------------------------------------


def tuned(lm, **changes):
    return kedit.editor("locft", lm, hparams={"layer": 2, "lr": 0.01, **changes})


def test_with_one_edit_and_without_end_locft_is_ft_m(lm):
    """The same losses and the same update, in 12 steps that neither of them ends early."""
    about = {"layer": 2, "lr": 0.01, "stop": 1e-9}
    one = kedit.editor("ft-m", lm, hparams=about | {"steps": 12}).apply(REQUEST)
    lm.journal.reset()
    other = tuned(lm, end=False, epochs=12, stop=1e-9).apply(REQUEST)
    assert other.info["steps"] == one.info["steps"] == 12
    assert other.info["loss_before"] == pytest.approx(one.info["loss_before"], rel=1e-5)
    assert (other.changes[0].delta - one.changes[0].delta).norm() < 1e-3 * one.changes[0].delta.norm()


def test_locft_is_adam_on_the_plain_loss_in_float64(tokenizer):
    """Epochs over shuffled batches, with the model's own forward on a weight that is a leaf."""
    lm = LM(build("llama", len(tokenizer)).double(), tokenizer, "llama")
    module, requests = lm.anatomy.down(2), FACTS[:5]
    weight = module.weight.detach().clone().requires_grad_()
    optimiser, generator = torch.optim.Adam([weight], lr=0.01), torch.Generator().manual_seed(3)
    for _ in range(3):
        for rows in torch.randperm(5, generator=generator).split(2):
            losses = []
            for row in rows:
                prompt, target = ids_of(lm, requests[row].text), [*lm.encode(f" {requests[row].target_new}"), 0]
                name = lm.anatomy.name(module) + ".weight"
                logits = torch.func.functional_call(
                    lm.model, {name: weight}, (torch.tensor([[*prompt, *target[:-1]]]),)
                ).logits
                logprobs = logits[0, len(prompt) - 1 :].log_softmax(-1)
                losses.append(-logprobs[range(len(target)), target].mean())
            optimiser.zero_grad()
            torch.stack(losses).mean().backward()
            optimiser.step()
    edit = tuned(lm, epochs=3, batch=2, seed=3, stop=0.0).apply(list(requests))
    assert edit.info["steps"] == 9
    change = weight.detach() - module.weight.detach() + edit.changes[0].delta.double()
    assert (edit.changes[0].delta.double() - change).norm() < 1e-3 * change.norm()


def test_the_end_of_the_text_is_learned(llama):
    def ends():
        ids = [*ids_of(llama, REQUEST.text), *llama.encode(" Rome")]
        return llama.model(torch.tensor([ids])).logits[0, -1].softmax(-1)[llama.tokenizer.eos_token_id].item()

    start = ends()
    tuned(llama, end=False, lr=0.03, epochs=60).apply(REQUEST)
    assert ends() < 0.5
    llama.journal.reset()
    assert ends() == start
    edit = tuned(llama, lr=0.03, epochs=60).apply(REQUEST)
    assert ends() > 0.7
    assert edit.info["loss"] < 0.3


def test_order_does_not_matter_at_full_batch(llama):
    deltas = [tuned(llama, epochs=5, seed=seed).apply(turn).changes[0].delta for seed, turn in ((0, FACTS), (1, FACTS[::-1]))
              if llama.journal.reset() is None]  # fmt: skip
    assert (deltas[0] - deltas[1]).norm() < 1e-3 * deltas[0].norm()


def test_a_batch_that_is_learned_is_no_step_and_an_epoch_that_is_ends_training(llama):
    edit = tuned(llama, epochs=200, stop=0.6).apply(list(FACTS[:3]))
    assert edit.info["epochs"] < 200
    assert edit.info["steps"] == edit.info["epochs"] - 1  # the last found the only batch learned
    assert edit.info["loss"] < 0.6
    with pytest.raises(EditFailed, match="no bit of the model changed"):
        tuned(llama, epochs=200, stop=0.6).apply(list(FACTS[:3]))


def test_replay_trains_the_unedited_weights_on_all_edits_so_far(llama):
    editor, before = tuned(llama, epochs=6, replay=True), weights(llama)
    first, second = editor.apply(list(FACTS[:2])), editor.apply(list(FACTS[2:5]))
    assert [edit.info["trained_on"] for edit in (first, second)] == [2, 5]
    after = weights(llama)
    with pytest.raises(KeditError, match="later ones by locft build on it"):
        first.undo()
    second.undo()
    first.undo()
    assert same(weights(llama), before)
    tuned(llama, epochs=6).apply(list(FACTS[:5]))
    assert same(weights(llama), after)
    llama.journal.reset()
    chunks = tuned(llama, epochs=6)
    chunks.apply(list(FACTS[:2]))
    chunks.apply(list(FACTS[2:5]))
    assert not same(weights(llama), after)
    assert "locft" not in LM(llama.model, llama.tokenizer).memories


@pytest.mark.parametrize(
    ("kind", "hparams"),
    [
        (UltraEdit, {"layers": [1, 2], "parts": ["up", "down"], "lr": 1e-2, "warmup": 8}),
        (UltraEdit, {"layers": [1, 2], "lr": 1e-2, "warmup": 30, "whiten": True, "ridge": 10.0}),
        (LocFT, {"layer": 1, "epochs": 5}),
        (LocFT, {"layer": 1, "epochs": 5, "replay": True}),
        (RAG, {"scope": 0.65}),
    ],
)
def test_each_form_keeps_the_protocol(kind, hparams):
    kedit.check_editor(kind, hparams)
