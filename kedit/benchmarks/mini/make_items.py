"""Writes the items of the mini suite: `python make_items.py` reproduces the JSONL files byte for byte.

mini_bbh and mini_gsm8k are generated here. The other items were written by hand and live in their
JSONL files; for those with choices this script only puts the choices in a seeded order, every block
of k items having its answer once in each of the k places, so running it again changes nothing.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Item = dict[str, Any]
Rng = random.Random
WRONG_ANSWERS = 3  # mini_truthfulqa: one true answer against this many false ones


# ---- choices ----------------------------------------------------------------------------------
def choose(right: str, wrong: list[str]) -> Item:
    """The fields of a multiple-choice item, before `place` has ordered them."""
    return {"choices": [right, *wrong], "answer": 0}


def window(rng: Rng, ring: list[str], at: int, low: int, high: int) -> Item:
    """`ring[at]` among four neighbours from `ring[low]` to `ring[high]`, its rank among them random."""
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


# ---- mini_bbh: one function a kind, all of them four-way --------------------------------------
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
COLOURS = ["red", "blue", "green", "black", "white", "yellow", "brown", "pink"]
OBJECTS = ["pen", "cup", "book", "hat", "lamp", "box", "bag", "coat", "key", "ring"]
NAMES = [
    "Anna",
    "Ben",
    "Carl",
    "Dora",
    "Emma",
    "Fred",
    "Gina",
    "Henry",
    "Jane",
    "Kate",
    "Leo",
    "Mary",
    "Nina",
    "Paul",
    "Rosa",
    "Tom",
]
GROUPS = {
    "fruits": ["apples", "pears", "plums", "lemons", "bananas"],
    "animals": ["dogs", "cats", "horses", "goats", "rabbits"],
    "tools": ["hammers", "saws", "drills", "axes", "shovels"],
}
WORDS = [
    "apple",
    "bread",
    "chair",
    "dress",
    "eagle",
    "flower",
    "grape",
    "house",
    "island",
    "jacket",
    "kettle",
    "lemon",
    "mirror",
    "night",
    "orange",
    "paper",
    "queen",
    "river",
    "snow",
    "table",
    "uncle",
    "voice",
    "water",
    "yellow",
]
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
    text = f"I have {parts[0]}, {parts[1]} and {parts[2]}. How many {group} do I have?"
    return {"question": text} | window(rng, NUMBERS, counts[0] + counts[1], 2, 12)


def dates(rng: Rng) -> Item:
    """A day or a month some steps ahead."""
    step = rng.randint(1, 3)
    if rng.random() < 0.5:
        ring, first = DAYS, rng.randrange(7)
        text = f"Today is {DAYS[first]}. Which day is it in {NUMBERS[step]} day{'s' * (step > 1)}?"
    else:
        ring, first = MONTHS, rng.randrange(12)
        text = f"It is {MONTHS[first]}. Which month is it in {NUMBERS[step]} month{'s' * (step > 1)}?"
    return {"question": text} | window(rng, ring, first + step, first, first + 6)


def deduction(rng: Rng) -> Item:
    """One end of an order given in pairs."""
    a, b, c, d = rng.sample(NAMES, 4)
    more, most, least = rng.choice(ORDERS)
    end, right = rng.choice([(most, a), (least, d)])
    text = f"{a} is {more} than {b}. {b} is {more} than {c}. {c} is {more} than {d}. Who is the {end}?"
    return {"question": text} | choose(right, [n for n in (a, b, c, d) if n != right])


def navigation(rng: Rng) -> Item:
    """The heading after one or two turns."""
    start = rng.randrange(4)
    turns = [rng.choice(sorted(TURNS)) for _ in range(rng.randint(1, 2))]
    right = COMPASS[(start + sum(TURNS[t] for t in turns)) % 4]
    text = f"You face {COMPASS[start]} and turn {', then turn '.join(turns)}. Which way do you face?"
    return {"question": text} | choose(right, [c for c in COMPASS if c != right])


def sorting(rng: Rng) -> Item:
    """The first or the last of four words in the alphabet."""
    words = rng.sample(WORDS, 4)
    end, pick = rng.choice([("first", min), ("last", max)])
    text = f"Which word comes {end} in the alphabet: {', '.join(words[:3])} or {words[3]}?"
    return {"question": text} | choose(pick(words), [w for w in words if w != pick(words)])


def sequence(rng: Rng) -> Item:
    """The next number of an arithmetic progression."""
    step, first = rng.choice([-5, -3, -2, -1, 1, 2, 3, 4, 5, 10]), rng.randint(1, 9)
    first += max(0, -5 * step)
    shown, right = [first + i * step for i in range(4)], first + 4 * step
    wrong = {right + step, right - step, right + 1, right - 1, right + 2} - {right}
    text = f"Which number comes next: {', '.join(map(str, shown))}?"
    return {"question": text} | choose(str(right), [str(w) for w in rng.sample(sorted(wrong), 3)])


def brackets(rng: Rng) -> Item:
    """The bracket that closes the innermost open one."""
    opened = rng.sample(sorted(BRACKETS), rng.randint(2, 4))
    shut = [BRACKETS[b] for b in reversed(opened[1:])][: rng.randint(0, len(opened) - 1)]
    right = BRACKETS[opened[len(opened) - 1 - len(shut)]]
    text = f"Which bracket must close next: {' '.join(opened + shut)}"
    return {"question": text} | choose(right, [b for b in BRACKETS.values() if b != right])


def colours(rng: Rng) -> Item:
    """The colour of one of four things."""
    pairs = list(zip(rng.sample(COLOURS, 4), rng.sample(OBJECTS, 4), strict=True))
    right, thing = rng.choice(pairs)
    parts = [f"a {colour} {name}" for colour, name in pairs]
    text = f"I see {', '.join(parts[:3])} and {parts[3]}. What colour is the {thing}?"
    return {"question": text} | choose(right, [c for c, _ in pairs if c != right])


def bbh() -> list[Item]:
    kinds = (counting, dates, deduction, navigation, sorting, sequence, brackets, colours)
    return place("mini_bbh", generate("mini_bbh", 15, {make.__name__: make for make in kinds}))


# ---- mini_gsm8k: two-step story sums ----------------------------------------------------------
THINGS = ["apples", "books", "coins", "shells", "cards", "stamps", "eggs", "pens", "marbles", "buttons"]
GAIN = ["finds {} more", "buys {} more", "gets {} more", "wins {} more"]
LOSS = ["gives away {}", "loses {}", "sells {}", "throws away {}"]


def story(first: str, second: str) -> Callable[[Rng], Item]:
    """A maker of sums whose two steps are `first` (+, - or *) and `second` (+ or -)."""

    def make(rng: Rng) -> Item:
        name, things = rng.choice(NAMES), rng.choice(THINGS)
        a, b, c = (rng.randint(2, 9) for _ in range(3))
        if first == "*":
            a, b = rng.randint(2, 5), rng.randint(2, 5)
        elif first == "-":
            a, b = a + b, b  # never below two
        middle = {"+": a + b, "-": a - b, "*": a * b}[first]
        if second == "-":
            c = rng.randint(1, middle - 1)
        last = middle + c if second == "+" else middle - c
        gain, gain2 = rng.sample(GAIN, 2)
        loss, loss2 = rng.sample(LOSS, 2)
        if first == "*":
            text = f"{name} has {a} boxes with {b} {things} each. "
            text += f"{name} {(gain if second == '+' else loss).format(c)}."
        else:
            text = f"{name} has {a} {things}. {name} {(gain if first == '+' else loss).format(b)}, "
            text += f"then {(gain2 if second == '+' else loss2).format(c)}."
        text += f" How many {things} does {name} have now?"
        steps = f"{a} {first} {b} = {middle}, {middle} {second} {c} = {last}"
        return {"question": text, "steps": steps, "answer": str(last)}

    return make


def gsm8k() -> list[Item]:
    return generate("mini_gsm8k", 20, {f"{a} {b}": story(a, b) for a in "+-*" for b in "+-"})


# ---- all --------------------------------------------------------------------------------------
def generate(task: str, each: int, kinds: dict[str, Callable[[Rng], Item]]) -> list[Item]:
    """`each` different items of every kind, taking turns, so that any prefix is a fair sample."""
    rng, items, seen = random.Random(task), [], set()
    while len(items) < each * len(kinds):
        kind = list(kinds)[len(items) % len(kinds)]
        item = kinds[kind](rng)
        if item["question"] not in seen:
            seen.add(item["question"])
            items.append({"id": len(items) + 1, "kind": kind} | item)
    return items


def read(task: str) -> list[Item]:
    return [json.loads(line) for line in (HERE / f"{task}.jsonl").read_text("utf-8").splitlines()]


def write(task: str, items: list[Item]) -> None:
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    (HERE / f"{task}.jsonl").write_text("".join(lines), "utf-8", newline="\n")


def main() -> None:
    write("mini_bbh", bbh())
    write("mini_gsm8k", gsm8k())
    for task in ("mini_mmlu", "mini_csqa", "mini_truthfulqa"):
        items = read(task)
        if task == "mini_truthfulqa":
            for item in items:
                item |= choose(item["correct_answers"][0], item["incorrect_answers"][:WRONG_ANSWERS])
        write(task, place(task, items))


if __name__ == "__main__":
    main()
