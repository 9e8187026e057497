"""Writes the items of the mini suite: running it reproduces the JSONL files byte for byte.

mini_bbh and mini_gsm8k are generated here. The other items were written by hand and live in their
JSONL files; for those with choices this script only puts the choices in a seeded order, every block
of k items having its answer once in each of the k places, so running it again changes nothing.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "kedit" / "evaluation" / "benchmarks" / "mini"
Item = dict[str, Any]
Rng = random.Random


# ---- choices ----------------------------------------------------------------------------------
def choose(right: str, wrong: list[str]) -> Item:
    """The fields of a multiple-choice item, before `place` has ordered them."""
    return {"choices": [right, *wrong], "answer": 0}


def window(rng: Rng, ring: list[str], at: int, low: int, high: int) -> Item:
    """`ring[at]` among four neighbours of `ring[low]` to `ring[high]`, its rank random."""
    start = rng.randint(max(low, at - 3), min(at, high - 3))
    four = range(start, start + 4)
    return choose(ring[at % len(ring)], [ring[i % len(ring)] for i in four if i != at])


def place(task: str, items: list[Item]) -> list[Item]:
    """Order the choices of every item: the answer's place is balanced, the rest is shuffled."""
    rng, places = random.Random(task), []
    for item in items:
        right = item["choices"][item["answer"]]
        wrong = sorted(c for c in item["choices"] if c != right)
        places = places or rng.sample(range(len(wrong) + 1), len(wrong) + 1)
        at = places.pop()
        rng.shuffle(wrong)
        item |= {"choices": [*wrong[:at], right, *wrong[at:]], "answer": at}
    return items


# ---- mini_bbh: one function a kind, all four-way, as text to be completed -----------------------
# fmt: off
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]
COLOURS = ["red", "blue", "green", "black", "white", "yellow", "brown", "pink"]
NAMES = [
    "Anna", "Ben", "Carl", "Dora", "Emma", "Fred", "Gina", "Henry", "Jane", "Kate", "Leo", "Mary",
    "Nina", "Paul", "Rosa", "Tom",
]
GROUPS = {
    "fruits": ["apples", "pears", "plums", "lemons", "bananas"],
    "animals": ["dogs", "cats", "horses", "goats", "rabbits"],
    "tools": ["hammers", "saws", "drills", "axes", "shovels"],
}
WORDS = [
    "apple", "bread", "chair", "dress", "eagle", "flower", "grape", "house", "island", "jacket",
    "kettle", "lemon", "mirror", "night", "orange", "paper", "queen", "river", "snow", "table",
    "uncle", "voice", "water", "yellow",
]
THINGS = [
    "apples", "books", "coins", "shells", "cards", "stamps", "eggs", "pens", "marbles", "buttons",
]
# fmt: on
ORDERS = [
    ("older", "oldest", "youngest"),
    ("taller", "tallest", "shortest"),
    ("faster", "fastest", "slowest"),
    ("richer", "richest", "poorest"),
]
COMPASS = ["north", "east", "south", "west"]
TURNS = {"right": 1, "around": 2, "left": 3}
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def counting(rng: Rng) -> Item:
    """How many of one group, with something else in between."""
    group, other = rng.sample(sorted(GROUPS), 2)
    things = [*rng.sample(GROUPS[group], 2), rng.choice(GROUPS[other])]
    counts = [rng.randint(2, 5) for _ in things]
    parts = [f"{NUMBERS[n]} {thing}" for n, thing in zip(counts, things, strict=True)]
    rng.shuffle(parts)
    text = f"I have {parts[0]}, {parts[1]} and {parts[2]}. The number of {group} I have is"
    return {"question": text} | window(rng, NUMBERS, counts[0] + counts[1], 2, 12)


def dates(rng: Rng) -> Item:
    """The day or the month one or two steps before or after another."""
    ring = rng.choice([DAYS, MONTHS])
    unit = "day" if ring is DAYS else "month"
    first, step = rng.randrange(len(ring)), rng.choice([-2, -1, 1, 2])
    many = f"The {unit}" if abs(step) == 1 else f"Two {unit}s"
    text = f"{many} {'after' if step > 0 else 'before'} {ring[first]} is"
    return {"question": text} | window(rng, ring, first + step, first - 3, first + 3)


def deduction(rng: Rng) -> Item:
    """One end of an order given in pairs."""
    a, b, c, d = rng.sample(NAMES, 4)
    more, most, least = rng.choice(ORDERS)
    end, right = rng.choice([(most, a), (least, d)])
    text = f"{a} is {more} than {b}. {b} is {more} than {c}. {c} is {more} than {d}."
    text += f" The {end} of them is"
    return {"question": text} | choose(right, [n for n in (a, b, c, d) if n != right])


def navigation(rng: Rng) -> Item:
    """The heading after a turn."""
    start, turn = rng.randrange(4), rng.choice(sorted(TURNS))
    verb = rng.choice(["face", "look", "walk", "drive"])
    right = COMPASS[(start + TURNS[turn]) % 4]
    text = f"You {verb} {COMPASS[start]} and turn {turn}. Now you {verb}"
    return {"question": text} | choose(right, [c for c in COMPASS if c != right])


def letters(rng: Rng) -> Item:
    """The one of four words that begins with a letter."""
    words = rng.sample(WORDS, 4)
    while len({word[0] for word in words}) < 4:
        words = rng.sample(WORDS, 4)
    right = rng.choice(words)
    text = f"Of {', '.join(words[:3])} and {words[3]}, the word that begins with {right[0]} is"
    return {"question": text} | choose(right, [w for w in words if w != right])


def sequence(rng: Rng) -> Item:
    """The next number of an arithmetic progression."""
    step, first = rng.choice([-5, -3, -2, -1, 1, 2, 3, 4, 5, 10]), rng.randint(1, 9)
    first += max(0, -5 * step)
    shown, right = [first + i * step for i in range(4)], first + 4 * step
    wrong = {right + step, right - step, right + 1, right - 1, right + 2} - {right}
    text = f"Continue: {', '.join(map(str, shown))},"
    return {"question": text} | choose(str(right), [str(w) for w in rng.sample(sorted(wrong), 3)])


def brackets(rng: Rng) -> Item:
    """The bracket that closes the innermost open one."""
    opened = rng.sample(sorted(BRACKETS), rng.randint(2, 4))
    shut = [BRACKETS[b] for b in reversed(opened[1:])][: rng.randint(0, len(opened) - 1)]
    right = BRACKETS[opened[len(opened) - 1 - len(shut)]]
    text = f"Close the brackets: {' '.join(opened + shut)}"
    return {"question": text} | choose(right, [b for b in BRACKETS.values() if b != right])


def pattern(rng: Rng) -> Item:
    """The next element of a pattern of two or three colours that repeats itself."""
    parts = rng.sample(COLOURS, rng.randint(2, 3))
    *shown, right = [parts[i % len(parts)] for i in range(rng.randint(6, 8))]
    others = rng.sample([c for c in COLOURS if c not in parts], 4 - len(parts))
    text = f"Continue: {', '.join(shown)},"
    return {"question": text} | choose(right, [c for c in parts + others if c != right])


def bbh() -> list[Item]:
    """Fifteen items of each kind."""
    kinds = [counting, dates, deduction, navigation, letters, sequence, brackets, pattern]
    return place("mini_bbh", generate("mini_bbh", 15, kinds))


# ---- mini_gsm8k: two-step story sums ----------------------------------------------------------
GAIN = ["finds {} more", "buys {} more", "gets {} more", "wins {} more"]


def add_add(rng: Rng) -> Item:
    """Some, then more, then more again."""
    a, b, c = (rng.randint(2, 9) for _ in range(3))
    name, things, gains = rng.choice(NAMES), rng.choice(THINGS), rng.sample(GAIN, 2)
    text = f"{name} has {a} {things}. {name} {gains[0].format(b)}, then {gains[1].format(c)}."
    steps = f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}"
    return story(text, name, things, steps, a + b + c)


def times_add(rng: Rng) -> Item:
    """So many each, then more."""
    a, b, c = rng.randint(2, 5), rng.randint(2, 5), rng.randint(2, 9)
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    text = f"{name} has {a} boxes with {b} {things} each. {name} {rng.choice(GAIN).format(c)}."
    steps = f"{a} * {b} = {a * b}, {a * b} + {c} = {a * b + c}"
    return story(text, name, things, steps, a * b + c)


def story(text: str, name: str, things: str, steps: str, total: int) -> Item:
    """The item that asks for the total; exemplars answer with the steps."""
    question = f"{text} How many {things} does {name} have now?"
    return {"question": question, "steps": steps, "answer": str(total)}


def gsm8k() -> list[Item]:
    """Sixty items of each kind."""
    return generate("mini_gsm8k", 60, [add_add, times_add])


# ---- all --------------------------------------------------------------------------------------
def generate(task: str, each: int, kinds: list[Callable[[Rng], Item]]) -> list[Item]:
    """`each` different items of every kind, taking turns, so that any prefix is a fair sample."""
    rng, items, seen = random.Random(task), [], set()
    while len(items) < each * len(kinds):
        make = kinds[len(items) % len(kinds)]
        item = make(rng)
        if item["question"] not in seen:
            seen.add(item["question"])
            items.append({"id": len(items) + 1, "kind": make.__name__} | item)
    return items


def read(path: Path) -> list[Item]:
    """The items of a file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(path: Path, items: list[Item]) -> None:
    """One item a line."""
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), "utf-8", newline="\n")


def main(folder: Path = FOLDER) -> None:
    """Write all files but those of mini_triviaqa and mini_toxigen, which need no ordering."""
    write(folder / "mini_bbh.jsonl", bbh())
    write(folder / "mini_gsm8k.jsonl", gsm8k())
    for task in ("mini_mmlu", "mini_csqa", "mini_truthfulqa"):
        items = read(folder / f"{task}.jsonl")
        if task == "mini_truthfulqa":  # MC1: the best true answer against the popular false one
            for item in items:
                item.update(choose(item["correct_answers"][0], item["incorrect_answers"][:1]))
        write(folder / f"{task}.jsonl", place(task, items))


if __name__ == "__main__":
    main()
