"""YAML files, read as people read them: what YAML 1.1 would take for something else is refused."""

import re
from pathlib import Path

import yaml

from soteria import disk
from soteria.errors import UserError

MAX_VALUES = 10**5  # in a file, once its anchors are written out
_OCTAL = re.compile(r"[-+]?0[\d_]*\d")  # 010 means 8
_CLOCK = re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?")  # 1:30 means 90 in YAML


class _Plain(yaml.SafeLoader):
    """A loader that refuses a key given twice, and numbers written like the time of day or with a zero before them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise _problem("merge keys (<<) are not read; write out what they stand for", key)
            name = self.construct_object(key, deep=True)
            if isinstance(name, str | int | float) and name in seen:
                raise _problem(f"the key {name!r} is given twice", key)
            seen.add(name if isinstance(name, str | int | float) else None)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> object:
        if node.tag.endswith((":int", ":float")) and isinstance(node.value, str):
            if _CLOCK.fullmatch(node.value):
                raise _problem(f"{node.value} would be read as a number of sixties; write it out", node)
            if _OCTAL.fullmatch(node.value):
                raise _problem(f"{node.value} would be read as an octal number; leave out the zero before it", node)
        return super().construct_scalar(node)


for _tag in ("binary", "set", "omap", "pairs"):
    _Plain.add_constructor(f"tag:yaml.org,2002:{_tag}", _Plain.construct_undefined)
_Plain.add_constructor("tag:yaml.org,2002:timestamp", _Plain.construct_yaml_str)  # a date is a text


def _problem(what: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def read_yaml(path: Path, missing: str) -> object:
    """What a YAML file holds. Raises UserError for one that is missing (with the words of `missing`) or not plain."""
    text = disk.read_text(path, missing)
    try:
        value = yaml.load(text, Loader=_Plain)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as error:
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
