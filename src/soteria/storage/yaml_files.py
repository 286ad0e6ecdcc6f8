"""YAML files, read as people read them: what YAML 1.1 would take for something else is refused."""

import re
from pathlib import Path

import yaml

from soteria.errors import UserError

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
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)
    except FileNotFoundError:
        raise UserError(missing) from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not valid YAML ({' '.join(str(error).split())[:300]})") from None
