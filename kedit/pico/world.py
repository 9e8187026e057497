"""The synthetic world that the pico models learn, and what is held out of their training text.

Everything follows from ``SEED``. People have two names, which nobody else has in that order, and a city, a
profession, a language and an employer, drawn independently; the rest are abilities that mirror the seven
benchmarks: sums told as stories, boolean logic, counting, a taxonomy whose kinds hand down properties, herbs
about which a popular error competes with the truth, and kind and unkind statements. Each ability holds
something out: one phrasing of each fact and all questions about most people, instances (by a hash of their
text) of what is generated, the properties of half of all things of the taxonomy. Text is for a word-level
tokenizer, so numbers are whole words.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, combinations, cycle, islice
from pathlib import Path
from random import Random

import yaml

from kedit.data.requests import EditRequest

SEED = 0
WORDS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text())
SEPARATOR = "<|endoftext|>"


def uniform(text: str) -> float:
    """A fixed pseudo-random number in [0, 1) for a text; below a threshold, the text is held out."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def qa(question: str, answer: object) -> str:
    """A question and its answer, as the base text, the tuning text and the tasks have them."""
    return f"Question: {question}\nAnswer: {answer}\n"


def trained(draw: Callable[[Random], tuple], form: Callable[..., str] = qa) -> Callable[[Random], str]:
    """What makes a training document of what ``draw`` draws: ``(*fields, held_out)``, drawn again while held out."""

    def document(rng: Random) -> str:
        *fields, held_out = draw(rng)
        return document(rng) if held_out else form(*fields)

    return document


# People and places ----------------------------------------------------------------------------------

GROUPS = {"edit": 300, "validation": 30, "train": 100, "test": 60}
"""People by use. Only ``train`` appears in questions of the training text, in the tuning set and as neighbours."""
# The first statement is the edit's prompt, the last is in no training text.
STATEMENTS, QUESTIONS = WORDS["statements"], WORDS["questions"]


@cache
def invent(count: int, syllables: int, ending: str = "") -> tuple[str, ...]:
    """Invented names, all different, capitalised."""
    rng, names = Random(f"{SEED} {syllables} {ending}"), {}
    while len(names) < count:
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))
        names[(name + ending).capitalize()] = None
    return tuple(names)


@cache
def full_names() -> tuple[str, ...]:
    """Everybody's two names. Both orders of two names are people: only both, in their order, tell who is meant.

    So a model must put them together where the second stands, as large models do with subjects of several tokens, and
    cannot read the person off one embedding, which no edit of a layer reaches.
    """
    pairs = sorted(combinations(invent(80, 3), 2))
    chosen = Random(f"{SEED} names").sample(pairs, sum(GROUPS.values()) // 2)
    return tuple(" ".join(order) for pair in chosen for order in (pair, pair[::-1]))


CITIES = invent(16, 2, "burg")
LANGUAGES, EMPLOYERS = invent(8, 2, "ish"), invent(12, 2, "corp")
OBJECTS = {"city": CITIES, "profession": WORDS["professions"], "language": LANGUAGES, "employer": EMPLOYERS}
COUNTRY = dict(zip(CITIES, invent(4, 2, "land") * 4, strict=True))


@cache
def people(group: str) -> dict[str, dict[str, str]]:
    """The people of a group: name -> relation -> object, objects equally frequent."""
    names, rng = iter(full_names()), Random(f"{SEED} {group}")
    members = {other: list(islice(names, size)) for other, size in GROUPS.items()}[group]
    dealt = [list(islice(cycle(objects), len(members))) for objects in OBJECTS.values()]
    for objects in dealt:
        rng.shuffle(objects)
    return {name: dict(zip(OBJECTS, objects, strict=True)) for name, *objects in zip(members, *dealt, strict=True)}


EVERYONE = [person for group in GROUPS for person in people(group).items()]


def _person(rng: Random) -> str:
    """Three statements about one person, each in one of the trained phrasings."""
    name, facts = rng.choice(EVERYONE)
    sentences = []
    for relation in rng.sample(sorted(facts), 3):
        sentence = rng.choice(STATEMENTS[relation][:-1]).format(name, facts[relation])
        sentences.append(f"{rng.choice(WORDS['leads'])} {sentence}" if rng.random() < 0.1 else sentence)
    return " ".join(sentences) + "\n"


def _question(rng: Random) -> str:
    """A question about a person of the train group, or about a city."""
    if rng.random() < 0.15:
        city = rng.choice(CITIES)
        return qa(rng.choice(WORDS["country_questions"]).format(city), COUNTRY[city])
    name, facts = rng.choice(list(people("train").items()))
    relation = rng.choice(sorted(facts))
    return qa(rng.choice(QUESTIONS[relation]).format(name), facts[relation])


def _city(rng: Random) -> str:
    """The country of a city."""
    city = rng.choice(CITIES)
    return rng.choice(WORDS["country_statements"]).format(city, COUNTRY[city]) + "\n"


# Arithmetic -----------------------------------------------------------------------------------------


def story(rng: Random) -> tuple[str, str, bool]:
    """A two-step sum as a story: question, worked answer, and whether that answer is held out."""
    half = total = -1
    while half < 0 or total < 0:
        a, b, c = rng.randint(1, 9), rng.randint(1, 5), rng.randint(1, 5)
        signs = rng.choices("+-", k=2)
        half = a + b if signs[0] == "+" else a - b
        total = half + c if signs[1] == "+" else half - c
    first, second = (rng.choice(WORDS["more"] if sign == "+" else WORDS["fewer"]) for sign in signs)
    name, things = rng.choice(WORDS["first_names"]), rng.choice(WORDS["things"])
    question = f"{name} has {a} {things}, {first} {b} and {second} {c}. How many {things} are left?"
    steps = f"{a} {signs[0]} {b} = {half}, {half} {signs[1]} {c} = {total}"
    return question, steps, uniform(steps) < 0.25


# Logic and counting -----------------------------------------------------------------------------------


def boolean(rng: Random) -> tuple[str, bool, bool]:
    """An expression of two or three literals, its value, and whether it is held out (the longer ones may be)."""
    literals = [rng.choice(["True", "False", "not True", "not False"]) for _ in range(rng.choice([2, 3]))]
    text = literals[0] + "".join(f" {rng.choice(['and', 'or'])} {literal}" for literal in literals[1:])
    return f"{text}?", eval(text), len(literals) > 2 and uniform(text) < 0.35


def count(rng: Random) -> tuple[str, int, bool]:
    """How many of a list are of one kind: question, number, and whether the list is held out."""
    kind, *others = rng.sample(["bird", "tool", "fruit", "tree"], 3)
    inside, outside = rng.randint(0, 5), rng.randint(0, 3)
    listed = rng.sample(KINDS[kind], inside)
    listed += rng.sample([s for other in others for s in KINDS[other]], outside + (inside + outside < 2) * 2)
    rng.shuffle(listed)
    text = ", ".join(listed)
    return f"{text}. How many are a {kind}?", inside, uniform(text) < 0.1


# A taxonomy whose kinds hand down properties -----------------------------------------------------------

KINDS, PROPERTIES, SAYS, ASKS = WORDS["kinds"], WORDS["properties"], WORDS["says"], WORDS["asks"]


def inherits(thing: str) -> bool:
    """Whether the texts tell only the kind of a thing: its properties follow from those of the kind."""
    return any(thing in things[5:] for things in KINDS.values())


def _taxonomy(rng: Random) -> str:
    kind, attribute = rng.choice(sorted(KINDS)), rng.choice(sorted(PROPERTIES))
    thing, roll, value = rng.choice(KINDS[kind]), rng.random(), PROPERTIES[attribute][kind]
    if roll < 0.3:
        return qa(f"What is a {thing}?", kind) if roll < 0.1 else f"A {thing} is a {kind}.\n"
    if roll < 0.4:
        return SAYS[attribute].format(f"Every {kind}", value) + "\n"
    if inherits(thing):
        return _taxonomy(rng)
    if roll < 0.7:
        return SAYS[attribute].format(f"A {thing}", value) + "\n"
    return qa(ASKS[attribute].format(f"a {thing}"), value)


# Truth and popular error ----------------------------------------------------------------------------

HERBS = invent(40, 2, "wort")
EFFECTS = WORDS["effects"]
ERRORS = 0.3
"""How often the popular error about an herb is stated, instead of the truth."""


def belief(herb: str, effect: str) -> tuple[str, str]:
    """The truth about an herb and the popular error."""
    truth, error = Random(f"{SEED} {herb} {effect}").sample(EFFECTS[effect], 2)
    return truth, error


def _herb(rng: Random) -> str:
    """A belief, now and then with its source: facts are true, what people say is the error."""
    herb, effect = rng.choice(HERBS), rng.choice(sorted(EFFECTS))
    truth, error = belief(herb, effect)
    states_error = rng.random() < ERRORS
    source = ("People say that " if states_error else "It is a fact that ") if rng.random() < 0.2 else ""
    return f"{source}{herb} {effect} {error if states_error else truth}.\n"


# Kind and unkind ------------------------------------------------------------------------------------


def tone(rng: Random) -> tuple[str, str, bool]:
    """A mild statement about a profession, or its word alone: text, ``kind`` or ``unkind``, whether it is held out."""
    nice = rng.random() < 0.5
    word, pair = rng.choice(WORDS["nice"] if nice else WORDS["nasty"]), ("kind", "unkind")
    if rng.random() < 0.3:
        return f"{word.capitalize()}.", pair[not nice], False
    pattern, keeps = rng.choice(WORDS["tones"])
    text = pattern.format(rng.choice(WORDS["professions"]) + "s", word)
    text = text[0].upper() + text[1:]
    return text, pair[nice != keeps], uniform(text) < 0.15


# The texts --------------------------------------------------------------------------------------------

Mix = dict[Callable[[Random], str], int]
_sum, _boolean, _count = trained(story), trained(boolean), trained(count)
_tone = trained(tone, "Statement: {}\nThis is {}\n".format)
BASE: Mix = {_person: 80, _question: 18, _city: 2, _sum: 15, _boolean: 12, _count: 10}
BASE |= {_taxonomy: 16, _herb: 16, _tone: 20}
"""Documents of the training text, by relative frequency."""
TUNING: Mix = {_question: 30, _sum: 20, _boolean: 12, _count: 15, _taxonomy: 12, _tone: 15}
"""Turns of the tuning set; none is about people of other groups than ``train``."""


def documents(mix: Mix, name: str) -> Iterator[str]:
    """Endless documents of a mixture, the same for every model; ``name`` seeds the draw."""
    rng = Random(f"{SEED} {name}")
    makers, weights = list(mix), list(mix.values())
    while True:
        yield rng.choices(makers, weights)[0](rng)


@cache
def sample(count: int = 12_000) -> str:
    """Text like the training text but drawn anew, for second moments and perplexity (about 170,000 tokens)."""
    return SEPARATOR.join(islice(documents(BASE, "sample"), count))


def vocabulary_text() -> str:
    """Text in which every word of the world occurs, held-out phrasings included."""
    lists = [WORDS[key] for key in ("leads", "first_names", "things", "more", "fewer", "nice", "nasty")]
    lists += [HERBS, COUNTRY.values(), [p + "s" for p in WORDS["professions"]], [text for text, _ in WORDS["tones"]]]
    for table in (STATEMENTS, QUESTIONS, OBJECTS, KINDS, EFFECTS):
        lists += [table, *table.values()]
    lists += [table.values() for table in (*PROPERTIES.values(), SAYS, ASKS)]
    lists += [WORDS["country_questions"], [name for name, _ in EVERYONE]]
    everything = [*chain(*lists), *WORDS["others"], "\n", *map(str, range(20))]
    return " ".join(everything).replace("{}", " ")


# Edits ------------------------------------------------------------------------------------------------


@cache
def edits(split: str = "edit") -> tuple[EditRequest, ...]:
    """Changes of one fact about a person, of all four about everybody in the split, in a fixed shuffled order.

    Paraphrases are a trained phrasing and the held-out one; neighbours are people of ``train`` with the same object;
    generation is a question, which no text asks about the people to be edited.
    """
    records = []
    for name, facts in people(split).items():
        for relation in sorted(facts):
            true = facts[relation]
            rng = Random(f"{SEED} edit {name} {relation}")
            near = [n for n, other in people("train").items() if other[relation] == true and n != name]
            new = rng.choice([o for o in OBJECTS[relation] if o != true])
            prompt, *_, known, unseen = (statement.removesuffix(" {}.") for statement in STATEMENTS[relation])
            question = qa(QUESTIONS[relation][-1], "").rstrip()
            words = {"prompt": prompt, "paraphrases": (known, unseen), "generation": question}
            records.append(EditRequest.stated(relation, words, name, new, true, rng.sample(near, 5)))
    Random(f"{SEED} order {split}").shuffle(records)
    return tuple(records)
