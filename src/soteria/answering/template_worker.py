"""Renders chat templates in a process of its own, where what a template may cost has a bound.

Run as a script by `soteria.answering.chat`. In: a request a line, as JSON: `template`, `messages` and `values`. Out: a
reply a line: `text`, or `error`, why there is none. A template that takes too much time or memory ends the process.
"""

import contextlib
import json
import random
import resource
import sys
import time
from datetime import date

from transformers.utils import chat_template_utils

MOST_SECONDS, MOST_BYTES, MOST_CHARACTERS = 5, 2**31, 10**7  # of the processor, of memory, of a prompt


def render(request: dict) -> dict:
    """The reply to a request."""
    _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + MOST_SECONDS)
    random.seed(0)  # a template may draw; then it draws the same each time
    try:
        template = request["template"]
        compiled = chat_template_utils._compile_jinja_template(template)
        compiled.globals["strftime_now"] = date.fromisoformat(request["date"]).strftime
        texts, _ = chat_template_utils.render_jinja_template(
            [request["messages"]], chat_template=template, **request["values"]
        )
    except MemoryError:
        sys.exit(1)
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as error:  # templates, which are programs, raise what they like
        return {"error": f"{type(error).__name__}: {error}"}
    if len(texts[0]) > MOST_CHARACTERS + 10 * len(str(request["messages"])):
        return {"error": f"it makes {len(texts[0])} characters of this"}
    return {"text": texts[0]}


def _limit(what: int, most: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already, or the system has none
        resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


def main() -> None:
    _limit(resource.RLIMIT_AS, MOST_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin:
        print(json.dumps(render(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
