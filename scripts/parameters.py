"""What may be given for the parameters of a notebook, and how it is put together.

A parameter is set by its name. One value inside a mapping is set by a dotted name, such as
``healing.steps``; the notebook gets the whole mapping with that value in it.

- Values come from the notebook, then the profile's section ``all``, its section of the notebook,
  and the command line. In each of these whole values come first, and dotted names after them.
- A dotted name only replaces what is there, by a value of the type that the notebook's own has.
- A whole mapping replaces the one before it, and is looked at inside too. Most mappings hold
  settings: the notebook reads them by their keys, so each must be there with a value of its type,
  and another key would be read by nobody or fail hours later. Those of :data:`CHOSEN_KEYS` are
  keyed by names that the user chooses, so they may be given any keys, with values like theirs.
- Sections of a profile share mappings. There a mapping of settings may hold a key that another
  notebook has in its mapping of that name.
"""

from __future__ import annotations

import ast
import datetime
from collections.abc import Iterable

import yaml

# Mappings that are keyed by names that the user chooses, and what these name.
CHOSEN_KEYS = {
    "scored_on.tasks": "tasks",
    "scored_on.papers": "tasks",
    "scored_on.fewer": "evaluation texts",
    "scored_on.texts": "evaluation texts",
    "shots.tasks": "tasks",
    "healing.own_rates": "models",
    "healing.rates": "ways to train, or sets of layers and for each its ways",
    "healing.longer.ways": "sets of layers, and for each its ways, with rates in healing.rates",
    "healing.longer.seeds": "the same sets of layers",
    "healing.sources": "texts to heal on, by their labels",
    "swapped.sets": "sets of layers",
    "shapes": "shapes of a smaller model",
}
# Texts that may look like numbers or dates: a branch may be called 1.0.
TEXTS = ("model", "revision", "text.healing_source")
NOTHING = ("None", "null", "~")
# What may stand where the notebook's own value has another type: names in place of a word for them.
OTHER_TYPES: dict[str, type] = {"healing.targets": list}


class Refused(ValueError):
    """The command or a profile asks for what is not there."""


class Values:
    """Values of one notebook's parameters, and what is wrong with those that were given.

    Args:
        notebook: The notebook's name, for messages.
        defaults: Its own values.

    Attributes:
        now: Every parameter with its value.
        faults: What is wrong with values that were given, each as one message.
    """

    def __init__(self, notebook: str, defaults: dict[str, object]):
        self.notebook = notebook
        self.defaults = defaults
        self.now = dict(defaults)
        self.faults: list[str] = []

    def changes(self) -> dict[str, object]:
        """The parameters whose value is not the notebook's own."""
        return {key: value for key, value in self.now.items() if value != self.defaults.get(key)}

    def give(self, given: dict, *, known: dict[str, list[str]]) -> None:
        """Set parameters by their names, then values inside them by dotted names.

        Args:
            given: Values by name.
            known: For each mapping of settings, by its dotted name, the keys that it may have.
        """
        dotted = [key for key in given if "." in str(key)]
        for key, value in given.items():
            if key not in dotted:
                self._give_whole(key, value, known)
        for key in dotted:
            self._give_inside(key, given[key], known)

    def _give_whole(self, key: str, value: object, known: dict[str, list[str]]) -> None:
        fault = parameter_fault(self.notebook, key, self.defaults)
        if not fault:
            fault = value_fault(self.notebook, key, value, own=self.defaults[key], known=known)
        if fault:
            self.faults.append(fault)
        self.now[key] = value

    def _give_inside(self, dotted: str, value: object, known: dict[str, list[str]]) -> None:
        parameter, *path = dotted.split(".")
        fault = parameter_fault(self.notebook, parameter, self.defaults)
        if fault:
            self.faults.append(fault)
            return
        try:
            self.now[parameter] = with_value_inside(
                self.now[parameter],
                path,
                value,
                own=self.defaults[parameter],
                known=known,
                notebook=self.notebook,
                name=parameter,
            )
        except Refused as error:
            self.faults.append(str(error))


def with_value_inside(
    mapping: object,
    path: list[str],
    value: object,
    *,
    own: object,
    known: dict[str, list[str]],
    notebook: str,
    name: str,
) -> object:
    """A copy of a mapping with another value at the end of a path of keys.

    Args:
        mapping: What is to be copied.
        path: At least one key; each but the first is looked for in the value of the one before.
        value: What takes the place of the value there.
        own: The notebook's own mapping, whose value there tells the type.
        known: As for :meth:`Values.give`.
        notebook: The notebook's name, for messages.
        name: The mapping's name, for messages.

    Raises:
        Refused: If a key is not there or would be one of no mapping, or the type does not fit.
    """
    key, *deeper = path
    if not isinstance(mapping, dict):
        raise Refused(f"{notebook}: {name} is no mapping but {mapping!r}, so it has no {key}")
    fault = key_fault(notebook, name, [key], list(mapping))
    if fault:
        raise Refused(fault)
    inner = f"{name}.{key}"
    own_value = own[key] if isinstance(own, dict) and key in own else mapping[key]
    if deeper:
        value = with_value_inside(
            mapping[key], deeper, value, own=own_value, known=known, notebook=notebook, name=inner
        )
    else:
        fault = value_fault(notebook, inner, value, own=own_value, known=known)
        if fault:
            raise Refused(fault)
    return {**mapping, key: value}


def setting_keys(notebooks: Iterable[dict[str, object]]) -> dict[str, list[str]]:
    """For each mapping of settings, by its dotted name, its keys in one of these notebooks.

    Args:
        notebooks: Of each notebook its own values.
    """
    found: dict[str, list[str]] = {}
    for defaults in notebooks:
        for name, value in mappings_in(defaults):
            if not has_chosen_keys(name):
                found[name] = list(dict.fromkeys([*found.get(name, []), *value]))
    return found


def mappings_in(values: dict, name: str = "") -> list[tuple[str, dict]]:
    """All mappings among values and inside them, each with its dotted name.

    Args:
        values: Values by name.
        name: The dotted name of what holds them; "" for parameters.
    """
    found: list[tuple[str, dict]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            inner = f"{name}.{key}" if name else str(key)
            found += [(inner, value), *mappings_in(value, inner)]
    return found


def has_chosen_keys(name: str) -> bool:
    """Whether the keys of this mapping, or of one that holds it, are names that the user chooses.

    Args:
        name: Its dotted name.
    """
    return any(f"{name}.".startswith(f"{chosen}.") for chosen in CHOSEN_KEYS)


def key_fault(notebook: str, name: str, keys: Iterable, known: list) -> str:
    """The message where a mapping is given keys that it does not have; "" if it has them all."""
    unknown = [str(key) for key in keys if key not in known]
    if not unknown:
        return ""
    there = ", ".join(str(key) for key in known)
    return f"{notebook}: {name} has no {', '.join(unknown)}; it has: {there}"


def parameter_fault(name: str, key: str, defaults: dict[str, object]) -> str:
    """The message where a notebook has no such parameter; "" if it has.

    Args:
        name: The notebook's name.
        key: The parameter's name.
        defaults: The notebook's own values.
    """
    return (
        "" if key in defaults else f"{name} has no parameter {key}; it has: {', '.join(defaults)}"
    )


def value_fault(
    notebook: str, name: str, value: object, *, own: object, known: dict[str, list[str]]
) -> str:
    """The message where a value has another type than it should, or a mapping other keys.

    Args:
        notebook: The notebook's name.
        name: The dotted name of what is given.
        value: What is given.
        own: The notebook's own value, or one that it should be like.
        known: As for :meth:`Values.give`.

    Returns:
        The first thing that is wrong with it or inside it; "" if nothing is.
    """
    fault = type_fault(notebook, name, value, own)
    if fault or not isinstance(value, dict) or not isinstance(own, dict):
        return fault
    chosen = has_chosen_keys(name)
    if not chosen:
        fault = key_fault(notebook, name, value, known.get(name, list(own)))
        fault = fault or lack_fault(notebook, name, value, own)
    # What a key that the user has chosen may stand for.
    example = next((inner for inner in own.values() if inner is not None), None)
    for key, inner in value.items():
        like = own.get(key, example if chosen else None)
        fault = fault or value_fault(notebook, f"{name}.{key}", inner, own=like, known=known)
    return fault


def lack_fault(notebook: str, name: str, given: dict, own: dict) -> str:
    """The message where a whole mapping lacks keys that the notebook reads; "" if it has them."""
    lacking = [str(key) for key in own if key not in given]
    if not lacking:
        return ""
    return (
        f"{notebook}: {name} lacks {', '.join(lacking)}; a whole mapping must have every key; "
        f"{name}.KEY=VALUE sets one alone"
    )


def type_fault(name: str, key: str, value: object, default: object) -> str:
    """The message where a value has another type than the notebook's own; "" if it fits.

    None fits everything, a whole number fits where a float is, and a list where a tuple is; for a
    few names also what :data:`OTHER_TYPES` says. What a list holds must be like what the notebook's
    own holds: at its place, or where all of its own are alike, anywhere.
    """
    if value is None or default is None or isinstance(value, OTHER_TYPES.get(key, ())):
        return ""
    allowed: dict[type, tuple[type, ...]] = {
        float: (int, float),
        tuple: (list, tuple),
        list: (list, tuple),
    }
    kind = type(default)
    fits = isinstance(value, allowed.get(kind, (kind,)))
    # To Python a bool is a whole number too.
    if not fits or isinstance(value, bool) != isinstance(default, bool):
        return (
            f"{name}: {key} must be a {kind.__name__} like its default {default!r}, got {value!r}"
        )
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)) and default:
        are_alike = len({type(one) for one in default}) == 1
        for place, one in enumerate(value):
            like = default[0 if are_alike else min(place, len(default) - 1)]
            fault = type_fault(name, f"{key}[{place}]", one, like)
            if fault:
                return fault
    return ""


def twice_in(text: str) -> list[str]:
    """Keys that stand twice in a mapping of a YAML text, of which the last would silently count."""
    found: list[str] = []
    nodes = [yaml.compose(text, yaml.SafeLoader)]
    for node in nodes:
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            found += [key for place, key in enumerate(keys) if key in keys[:place]]
            nodes += [value for _, value in node.value]
    return list(dict.fromkeys(found))


def literal(name: str, text: str) -> object:
    """A value of the command line: a Python literal such as ``3e-4``, else a YAML value.

    Args:
        name: Of the parameter. What :data:`TEXTS` names is a text, whatever it looks like.
        text: The value.

    Raises:
        Refused: If it is neither.
    """
    if name in TEXTS and text not in NOTHING:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        pass
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Refused(f"{text!r} is neither a Python literal nor YAML: {error}") from error
    # To YAML 010 is eight, 1:30 ninety, and 2024-01-01 a date.
    if isinstance(found, (int, float, datetime.date)) and not isinstance(found, bool):
        raise Refused(f"{name}: write a number as Python does; {text!r} would be read as {found}")
    return found
