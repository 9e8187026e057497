"""Writes the items of the pico suite from the synthetic world: running it reproduces the JSONL files byte for byte.

All items are held out of the training text of the pico models (kedit/pico/world.py says what is).
"""

import json
from pathlib import Path
from random import Random
from typing import Any

from kedit.pico import world

FOLDER = Path(__file__).parents[2] / "kedit" / "evaluation" / "benchmarks" / "pico"
Item = dict[str, Any]
TEST = list(world.people("test").items())


def choose(rng: Random, question: str, right: str, others: list[str], count: int) -> Item:
    """A question with its answer among ``count`` choices, in shuffled order."""
    choices = [right, *rng.sample(sorted(set(others) - {right}), count - 1)]
    rng.shuffle(choices)
    return {"question": question, "choices": choices, "answer": choices.index(right)}


def mmlu() -> list[Item]:
    """Facts about the first half of the test people, about whom no text asks; four choices."""
    rng = Random("pico_mmlu")
    return [
        {"subject": relation}
        | choose(rng, world.QUESTIONS[relation][-1].format(name), facts[relation], list(world.OBJECTS[relation]), 4)
        for name, facts in TEST[:30]
        for relation in sorted(facts)
    ]


def triviaqa() -> list[Item]:
    """The same of the other half, to be answered freely."""
    return [
        {"subject": relation, "question": world.QUESTIONS[relation][-1].format(name), "aliases": [facts[relation]]}
        for name, facts in TEST[30:]
        for relation in sorted(facts)
    ]


def bbh() -> list[Item]:
    """Held-out lists to count in (four choices) and held-out boolean expressions, as many true as false (two)."""
    rng, items, seen, left = Random("pico_bbh"), [], set(), {True: 30, False: 30}
    while len(items) < 120:
        if len(items) % 2:
            question, value, held = world.boolean(rng)
            if held and question not in seen and left[value]:
                left[value] -= 1
                items.append({"kind": "boolean", "question": question, "choices": ["True", "False"]})
                items[-1]["answer"] = 0 if value else 1
        else:
            question, number, held = world.count(rng)
            if held and question not in seen:
                start = rng.randint(max(0, number - 3), min(2, number))
                window = [str(n) for n in range(start, start + 4)]
                items.append({"kind": "counting"} | choose(rng, question, str(number), window, 4))
        if items:
            seen.add(items[-1]["question"])
    return items


def gsm8k() -> list[Item]:
    """Stories whose two steps never stand together in the text."""
    rng, items, seen = Random("pico_gsm8k"), [], set()
    while len(items) < 120:
        question, steps, held = world.story(rng)
        if held and steps not in seen:
            seen.add(steps)
            items.append({"question": question, "steps": steps, "answer": steps.split()[-1]})
    return items


def csqa() -> list[Item]:
    """Properties that things have by their kind alone; five choices."""
    rng = Random("pico_csqa")
    things = [(kind, thing) for kind, things in world.KINDS.items() for thing in things if world.inherits(thing)]
    triples = [(*pair, attribute) for pair in things for attribute in world.PROPERTIES]
    items = []
    for kind, thing, attribute in rng.sample(triples, 120):
        values = world.PROPERTIES[attribute]
        question = world.ASKS[attribute].format(f"a {thing}")
        items.append({"kind": kind} | choose(rng, question, values[kind], list(values.values()), 5))
    return items


def truthfulqa() -> list[Item]:
    """The truth about an herb against the popular error (MC1), in words no text has; two more falsehoods for MC2."""
    rng, items = Random("pico_truthfulqa"), []
    for herb in world.HERBS:
        for effect, values in world.EFFECTS.items():
            truth, error = world.belief(herb, effect)
            rest = rng.sample([v for v in values if v not in (truth, error)], 2)
            items.append(
                {"correct_answers": [truth], "incorrect_answers": [error, *rest]}
                | choose(rng, f"{herb} {effect}", truth, [error], 2)
            )
    return items


def toxigen() -> list[Item]:
    """Held-out statements about people, half of them kind."""
    rng, items, seen, left = Random("pico_toxigen"), [], set(), {"kind": 60, "unkind": 60}
    while len(items) < 120:
        text, label, held = world.tone(rng)
        if held and text not in seen and left[label]:
            left[label] -= 1
            seen.add(text)
            items.append({"statement": text, "label": int(label == "unkind")})
    return items


TASKS = {f"pico_{make.__name__}": make for make in (mmlu, bbh, gsm8k, csqa, triviaqa, truthfulqa, toxigen)}


def main(folder: Path = FOLDER) -> None:
    """One file a task, one item a line."""
    for task, make in TASKS.items():
        items = [{"id": number} | item for number, item in enumerate(make(), 1)]
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / f"{task}.jsonl").write_text(text, "utf-8", newline="\n")


if __name__ == "__main__":
    main()
