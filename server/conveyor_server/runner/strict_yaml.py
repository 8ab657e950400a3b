"""YAML that says what it means: one key once, every key known, every value of its kind.

Invariant: what is not asked for by name is an error that says the nearest name; keys are text as it was written, so
that a graph's `1234` or `on` is a name. Aliases are refused: a short file cannot stand for a long one.
"""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import yaml


class NotStrict(ValueError):  # noqa: N818 - it says what is so
    """What the text says that it should not, where, and what to write instead."""


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases, repeated keys, and keys that are not text."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuses an alias; otherwise as YAML has it."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call] # the stubs leave its type out
            raise yaml.MarkedYAMLError(None, None, "aliases are not taken: write it out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dict whose keys are the text that was written."""
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key is a name", key_node.start_mark)
            if key_node.value in found:
                told = f"{key_node.value!r} is there twice: keep one"
                raise yaml.MarkedYAMLError(None, None, told, key_node.start_mark)
            found[key_node.value] = self.construct_object(value_node, deep=deep)
        return found


def load(text: str) -> object:
    """What the text holds: dicts, lists, text, numbers.

    Raises:
        yaml.YAMLError: it is not YAML, or has aliases or a key twice.
        RecursionError: its parts lie too deep in each other.
    """
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader


class Mapping:
    """A mapping whose keys are asked for by name, and none is left over.

    Args:
        content: as `load` gave it.
        where: what messages call it.
    """

    def __init__(self, content: dict[str, object], where: str) -> None:
        self._content = content
        self._known: list[str] = []
        self.where = where

    @classmethod
    def of(cls, content: object, where: str) -> "Mapping":
        """NotStrict where the content is no mapping."""
        if not isinstance(content, dict):
            raise NotStrict(f"{where} takes names with what belongs to them, and {_show(content)} is there")
        return cls(content, where)

    def __contains__(self, key: str) -> bool:
        self._known.append(key)
        return key in self._content

    def get(self, key: str, default: object = None) -> object:
        """The value of a key, or the default."""
        self._known.append(key)
        return self._content.get(key, default)

    def integer(self, key: str, *, least: int, most: int | None = None) -> int:
        """The whole number under a key that has to be there."""
        return self._integer(self._needed(key), f"{self._path(key)}", least, most)

    def integers(self, key: str, *, least: int, most: int) -> list[int]:
        """The list of whole numbers under a key that has to be there."""
        value = self._needed(key)
        if not isinstance(value, list):
            raise NotStrict(f"{self._path(key)} takes a list such as [512], and {_show(value)} is there")
        return [self._integer(item, self._path(key), least, most) for item in value]

    def text(self, key: str, default: str | None = None) -> str:
        """The text under a key, which has to be there if there is no default."""
        value = self._needed(key) if default is None else self.get(key, default)
        if not isinstance(value, str) or not value:
            raise NotStrict(f"{self._path(key)} takes a name, and {_show(value)} is there: put it into quotes")
        return value

    def flag(self, key: str) -> bool:
        """True or false under a key; false where it is not there."""
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise NotStrict(f"{self._path(key)} takes true or false, and {_show(value)} is there")
        return value

    def choice(self, key: str, choices: Sequence[str]) -> str:
        """One of the choices, under a key; the first where it is not there."""
        value = self.get(key, choices[0])
        if value not in choices:
            raise NotStrict(f"{self._path(key)} takes {' or '.join(choices)}, and {_show(value)} is there")
        return str(value)

    def mapping(self, key: str) -> "Mapping | None":
        """The mapping under a key; None where it is not there."""
        return Mapping.of(self._content[key], self._path(key)) if key in self else None

    def items_of(self, key: str) -> Iterator[tuple[str, object]]:
        """Names and values of the mapping under a key; none where it is not there."""
        inner = self.mapping(key)
        return iter(()) if inner is None else iter(inner._content.items())

    def mappings(self, key: str, *, optional: bool = False) -> Iterator[tuple[str, "Mapping"]]:
        """Names and mappings of the mapping under a key."""
        if not optional:
            self._needed(key)
        for name, value in self.items_of(key):
            yield name, Mapping.of(value, f"{self._path(key)}.{name}")

    def list_of_mappings(self, key: str) -> Iterator["Mapping"]:
        """The mappings of the list under a key; none where it is not there."""
        value = self.get(key, [])
        if not isinstance(value, list):
            raise NotStrict(f"{self._path(key)} takes a list, and {_show(value)} is there")
        for index, item in enumerate(value):
            yield Mapping.of(item, f"{self._path(key)}[{index}]")

    def end(self) -> None:
        """NotStrict where a key is left that nobody asked for."""
        for key in self._content:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, n=1)
                known = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(dict.fromkeys(self._known))}"
                raise NotStrict(f"{self.where} has {key!r:.80}, which is not known; {known}")

    def _needed(self, key: str) -> object:
        if key not in self:
            raise NotStrict(f"{self._path(key)} is missing")
        return self._content[key]

    def _path(self, key: str) -> str:
        return key if self.where == "the file" else f"{self.where}.{key}"

    @staticmethod
    def _integer(value: object, where: str, least: int, most: int | None) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise NotStrict(f"{where} takes whole numbers, and {_show(value)} is there")
        if value < least or (most is not None and value > most):
            raise NotStrict(f"{where} is {value}: it is to be {least} or more" + (f", to {most}" if most else ""))
        return value


def _show(value: object) -> str:
    return "nothing" if value is None else f"{value!r:.80}"
