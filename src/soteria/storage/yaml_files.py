"""YAML files, read as people read them: what YAML 1.1 would take for something else is refused."""

import re
from pathlib import Path

import yaml

from soteria import disk
from soteria.errors import UserError

MAX_VALUES = 10**5  # in a file, once its anchors are written out
_CLOCK = re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?")  # 1:30 means 90 in YAML


class _Plain(yaml.SafeLoader):
    """A loader that refuses a key given twice, and numbers written like the time of day."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if isinstance(name, str | int | float) and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key.start_mark)
            seen.add(name if isinstance(name, str | int | float) else None)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> object:
        if node.style is None and node.tag.endswith((":int", ":float")) and _CLOCK.fullmatch(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value} would be read as a number of sixties; write it out", node.start_mark
            )
        return super().construct_scalar(node)


def read_yaml(path: Path, missing: str) -> object:
    """What a YAML file holds. Raises UserError for one that is missing (with the words of `missing`) or not plain."""
    text = disk.read_text(path, missing)
    try:
        value = yaml.load(text, Loader=_Plain)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not valid YAML ({' '.join(str(error).split())[:300]})") from None
    if disk.is_deep(value) or _size(value, {}) > MAX_VALUES:
        raise UserError(f"{path} is not valid YAML: nested too deep, or its anchors repeat too much; write it flat")
    return value


def _size(value: object, known: dict[int, int]) -> int:
    """The number of values written out, anchors repeated wherever they are named."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(each, known) for each in inner)
    return known[id(value)]
