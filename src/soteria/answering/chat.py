"""Messages in a tokenizer's chat template, which is a program that came with the model: it may refuse, loop or fail.

In: a tokenizer and messages. Out: the text that the model reads. Templates are rendered in a process of their own,
with bounds on time and size, and on a fixed date: an answer must not depend on the day on which it was asked for.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from soteria.errors import UserError

DATE = "2024-07-26"  # what templates that say the date say; Llama 3's own default
ASKING_ROLES = ("system", "user")  # whose texts a prompt must hold: templates may cut what assistants said

ENDED = "the process was ended"


def chat_text(tokenizer, messages: list[dict], *, add_generation_prompt: bool = True, **values: object) -> str:
    """Messages in the tokenizer's chat template, without thinking where the template knows of it.

    Contents are given as texts or, where the template then leaves any out, as lists of parts, as multimodal models'
    templates want them. Raises UserError if the template fails, takes too long, or leaves out what is asked.
    """
    template, name = _template_of(tokenizer), tokenizer.name_or_path
    values = {"enable_thinking": False, "add_generation_prompt": add_generation_prompt} | values
    values = {**tokenizer.special_tokens_map, **values}
    in_parts = [each | {"content": [{"type": "text", "text": each["content"]}]} for each in messages]
    asked, reasons = [each["content"] for each in messages if each["role"] in ASKING_ROLES], []
    for form in (messages, in_parts):
        reply = _worker.ask({"template": template, "messages": form, "values": values, "date": DATE})
        if "text" in reply and all(_holds(reply["text"], each) for each in asked):
            return reply["text"]
        if reply.get("error") == ENDED:  # and would be again
            raise UserError(f"the chat template of {name!r} takes too much time or memory; ask without it")
        reasons.append(" ".join(reply.get("error", "it leaves out what is asked").split())[:200])
    raise UserError(
        f"the chat template of {name!r} cannot be used ({reasons[0]}); repair it, in chat_template.jinja or "
        "tokenizer_config.json, or ask without it"
    )


def _template_of(tokenizer) -> str:
    """The tokenizer's chat template, or the default one of several. Raises UserError where there is none."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        if "default" not in found:
            raise UserError(
                f"{tokenizer.name_or_path!r} has several chat templates ({', '.join(sorted(found))}) and none is named "
                "default; keep the one to use in its tokenizer_config.json"
            )
        found = found["default"]
    if not found:
        raise UserError(f"{tokenizer.name_or_path!r} has no chat template; ask without it")
    return found


def _holds(text: str, part: str) -> bool:
    """Whether a part is in a text, however white its space is: templates strip and wrap it."""
    return " ".join(part.split()) in " ".join(text.split())


class _Worker:
    """The process that renders templates; it is started when it is needed, and again after a template ended it."""

    def __init__(self):
        self._forget()
        os.register_at_fork(after_in_child=self._forget)  # a fork must not read its parent's replies

    def _forget(self) -> None:
        self._process, self._lock = None, threading.Lock()

    def ask(self, request: dict) -> dict:
        """The reply to a request, in `template_worker`'s form."""
        with self._lock:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", Path(__file__).with_name("template_worker.py")],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,  # Ctrl-C is this process's own to handle
                    env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
            process = self._process
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:  # interrupted halfway: the next request must not read this one's reply
                self._end()
                raise
            if not line.endswith("\n"):
                self._end()
                return {"error": ENDED}
            return json.loads(line)

    def _end(self) -> None:
        process, self._process = self._process, None
        process.kill()
        process.communicate()


_worker = _Worker()
