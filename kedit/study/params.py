"""What a run covers: a parameter file, checked."""

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator

from kedit import ROOT, KeditError
from kedit.data import facts
from kedit.editors import kind_of, make_hparams
from kedit.editors.bounds import stated
from kedit.evaluation import MEASURES, benchmarks
from kedit.registry import unknown
from kedit.store import digest, runs_folder, write_atomic

DTYPES = {"float32": 4, "bfloat16": 2}
"""Precisions that a model may be loaded in -> bytes of a weight; edited matrices are kept in float32 beside it."""


def _each_once(values: list) -> list:
    if len(set(map(str, values))) < len(values):
        raise ValueError("something twice")
    return values


def _turn(value: Any) -> int | str:
    if value != "checkpoint" and (type(value) is not int or value < 1):
        raise ValueError("no turn")
    return value


EACH_ONCE = AfterValidator(_each_once)
NAMES = Field(min_length=1, description="a list of names, each once")
NUMBERS = Field(min_length=1, description="a list of whole numbers from 0 up, each once")
PLAIN = Field(pattern=r"^\w[\w.-]*$", description="a plain name: letters, digits, and . _ - within")
METHODS = "a list of names, or of mappings of method, variant and hparams, each method and variant once"
Number = Annotated[int, Field(ge=0)]


class _Mapping(BaseModel):
    """A mapping of the file, its values of exactly the types written here; ``description`` says what each must be."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class _AsGiven(_Mapping):
    """A mapping that is hashed and written as it was given, without defaults."""

    @model_serializer
    def _given(self) -> dict[str, Any]:
        return {key: value for key, value in self if key in self.model_fields_set}


class EditSet(_AsGiven):
    """Where the edits come from: the arguments of ``facts.load``."""

    name: str
    split: str = "edit"
    path: str | None = None


class Statistics(_AsGiven):
    """What second moments are taken over: the arguments of ``SecondMoments``."""

    text: str | None = None
    tokens: int = Field(98_304, ge=1, description="a whole number from 1 up")


class Method(_Mapping):
    """A method of the grid; ``variant`` names a run with other hyper-parameters than the method's file has.

    ``turn`` is how many edits are written in one step: a number, or those between two checkpoints.
    """

    method: str = Field(description="a method's name")
    variant: str = Field("default", description="a name of your own")
    hparams: dict[str, Any] = Field({}, description="a mapping of hyper-parameters")
    turn: Annotated[Any, AfterValidator(_turn)] = Field(1, description="a whole number from 1 up, or checkpoint")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"method": given} if isinstance(given, str) else given

    @model_serializer
    def _given(self) -> dict[str, Any]:
        """What keys and files say of it: of the turn only where it is another than 1."""
        return {key: value for key, value in self if (key, value) != ("turn", 1)}

    def __str__(self) -> str:
        return self.method if self.variant == "default" else f"{self.method} {self.variant}"


class Params(_Mapping):
    """What one run covers; the fields but the first two are the keys of ``params/<rq>/<name>.yaml``."""

    rq: Annotated[str, PLAIN]
    name: Annotated[str, PLAIN]
    models: Annotated[list[Annotated[str, Field(min_length=1)]], NAMES, EACH_ONCE]
    methods: Annotated[list[Method], EACH_ONCE] = Field(min_length=1, description=METHODS)
    edits: Annotated[list[Number], NUMBERS, EACH_ONCE, AfterValidator(lambda edits: sorted({0, *edits}))]
    benchmarks: Annotated[list[str], NAMES, EACH_ONCE]
    measures: Annotated[list[str], EACH_ONCE] = Field([], description=NAMES.description)
    edit_set: EditSet = Field(EditSet(name="bundled", split="edit"), description="a mapping of name (and split, path)")
    orders: Annotated[list[Number], NUMBERS, EACH_ONCE] = Field([0])
    limit: int | None = Field(None, ge=1, description="a number of items from 1 up, or null for all")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="float32 or bfloat16")
    statistics: Statistics = Field(
        Statistics(text="wikipedia-sample", tokens=98_304), description="a mapping of text and tokens"
    )

    @classmethod
    def read(cls, path: str | Path) -> "Params":
        """Read ``<rq>/<name>.yaml``.

        Raises:
            KeditError: naming the file, the key and the remedy.
        """
        path = Path(path)
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except OSError as error:
            available = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
            raise KeditError(f"{path}: there is no such parameter file; there are: {available}.") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise KeditError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
        if not isinstance(values, dict):
            raise KeditError(f"{path}: must be a mapping of keys to values.")
        return cls.make(path.resolve().parent.name, path.stem, values, where=str(path))

    @classmethod
    def find(cls, rq: str, name: str) -> "Params":
        """The parameters of a run by its name: a file of ``params/``, or that of a run with a name of its own.

        Raises:
            KeditError: there is no such file, or it is wrong.
        """
        committed, own = (folder / rq / f"{name}.yaml" for folder in (ROOT / "params", runs_folder()))
        return cls.read(own if own.exists() and not committed.exists() else committed)

    @classmethod
    def make(cls, rq: str, name: str, values: Mapping[str, Any], where: str = "parameters") -> "Params":
        """Check values and build the parameters.

        Raises:
            KeditError: naming the file, the key and the remedy.
        """
        try:
            json.dumps(dict(values), ensure_ascii=False, skipkeys=True, default=str).encode()
        except (ValueError, RecursionError) as error:
            raise KeditError(f"{where}: holds what cannot be written ({error}).") from error
        try:
            if wrong := [key for key in values if key not in KEYS]:
                raise unknown("key", wrong[0], KEYS)
            params = cls(rq=rq, name=name, **values)
            params._check()
        except (ValidationError, KeditError) as error:
            sentence = _sentence(error.errors()[0]) if isinstance(error, ValidationError) else error
            raise KeditError(f"{where}: {sentence}") from error
        return params

    def _check(self) -> None:
        """Whether everything named exists; an edit set that is to be fetched first is checked by a run."""
        for name in self.benchmarks:
            benchmarks.metadata(name)
        for name in self.measures:
            if name not in MEASURES:
                raise unknown("measure", name, MEASURES)
        for method in self.methods:
            if (method.hparams or method.turn != 1) and method.variant == "default":
                what = "hparams" if method.hparams else "the turn"
                raise KeditError(f"methods changes {what} of {method.method}; name the variant.")
            if method.turn != 1 and not kind_of(method.method).together():
                raise KeditError(f"{method.method} writes one edit a step; leave its turn out.")
            if wrong := sorted(set(self.edits) - set(self.steps(method))):
                raise KeditError(
                    f"edits asks for {wrong[0]}, within a turn of {method}; use multiples of {method.turn}, its turn."
                )
        self.hparams()
        try:
            at_hand = facts.at_hand(self.edit_set.name, self.edit_set.path)
        except KeditError:  # a mirror without the set: a run will say so
            at_hand = False
        if at_hand:
            self.requests(0)

    def requests(self, order: int) -> list:
        """The edits of one order, as many as the grid needs.

        Raises:
            KeditError: the edit set does not exist, cannot be had, or is too small.
        """
        try:
            records = facts.load(**self.edit_set.model_dump())
        except KeditError as error:
            raise KeditError(f"edit_set: {error}") from error
        wanted = max(self.edits)
        if wanted > len(records):
            raise KeditError(f"edits asks for {wanted}, but the edit set holds {len(records)} records.")
        return facts.ordered(records, order)[:wanted]

    def steps(self, method: Method) -> list[int]:
        """Counts of edits, from 0, between which a method of the grid writes in one step."""
        return self.edits if method.turn == "checkpoint" else list(range(0, max(self.edits) + 1, method.turn))

    @property
    def asked(self) -> list[str]:
        """Everything that is asked at a checkpoint: edit success, the benchmarks, other measures."""
        return ["edit", *self.benchmarks, *self.measures]

    @property
    def edit_set_name(self) -> str:
        """The edit set as the table shows it."""
        return self.edit_set.name

    def fingerprint(self) -> str:
        """Hash of the grid, the hyper-parameters that stand in params/methods, and the files that it names."""
        paths = [Path(path) for path in (self.edit_set.path, self.statistics.text) if path]
        named = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]
        return digest(self.model_dump(), self.hparams(), named)[:16]

    def hparams(self) -> dict[str, dict[str, Any]]:
        """Every method's hyper-parameters on every model, as they stand.

        Raises:
            KeditError: a method has none for a model, or they are wrong.
        """
        given = {}
        for model, method in product(self.models, self.methods):
            hparams = make_hparams(kind_of(method.method), model, method.hparams)
            given[f"{method.method} ({method.variant}) on {model}"] = stated(hparams)
        return given

    def values(self) -> dict[str, Any]:
        """What a parameter file of this run says, defaults included."""
        return self.model_dump(exclude={"rq", "name"})

    def write(self) -> Path:
        """Write the parameter file of a run that has none in ``params/``, among the runs, where ``find`` looks."""
        path = runs_folder() / self.rq / f"{self.name}.yaml"
        write_atomic(path, yaml.safe_dump(self.values(), sort_keys=False, default_flow_style=None).encode())
        return path


KEYS = [key for key in Params.model_fields if key not in ("rq", "name")]
"""The keys of a parameter file."""
MAPPINGS: dict[str, type[_Mapping]] = {"methods": Method, "edit_set": EditSet, "statistics": Statistics}
"""Those whose values are mappings, or lists of them."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{twice[0]} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # as in YAML 1.2, where 5e-1 is a number
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+\.?\d*)([eE][-+]?\d+)\Z"), list("-+.0123456789")
)


def _sentence(error: Mapping[str, Any]) -> str:
    """What is wrong with a value, and what it must be."""
    location: Sequence[int | str] = error["loc"]
    names = [part for part in location if isinstance(part, str)]
    key = ".".join(names)
    if error["type"] == "extra_forbidden":
        return str(unknown("key", key, [f"{names[0]}.{name}" for name in MAPPINGS[names[0]].model_fields]))
    about, form = names[0], Params.model_fields[names[0]].description
    if len(names) > 1 and (inner := MAPPINGS[about].model_fields[names[1]].description):
        about, form = f"{about}.{names[1]}", inner
    if error["type"] == "missing":
        return f"key {key!r} is missing; {about} must be {form}."
    verb = "holds" if isinstance(location[-1], int) else "is"
    return f"{key} {verb} {reprlib.repr(error['input'])}; it must be {form}."
