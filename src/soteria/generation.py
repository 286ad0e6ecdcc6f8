"""Step 3.2: greedy answers of a model to a set of questions.

Knows models and text; knows nothing of judging.
"""

from collections.abc import Callable, Iterator

import torch

from soteria.errors import UserError
from soteria.languages import Language
from soteria.models import LoadedModel
from soteria.questions import chat_message, question_prompt

MAX_NEW_TOKENS = 512


def model_inputs(loaded: LoadedModel, question: str, language: Language, chat_template: bool) -> list[int]:
    """The token ids that a question is put to a model as."""
    if not chat_template:
        return loaded.tokenizer(question_prompt(question, language)).input_ids
    if not loaded.tokenizer.chat_template:
        raise UserError(f"{loaded.name!r} has no chat template; leave out --chat_template")
    message = [{"role": "user", "content": chat_message(question, language)}]
    text = loaded.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return loaded.tokenizer(text, add_special_tokens=False).input_ids


def pad_token(loaded: LoadedModel) -> int:
    """The tokenizer's own padding token, else its end-of-text token: it is masked, so its choice changes nothing."""
    for token in (loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


@torch.inference_mode()
def generate(
    loaded: LoadedModel, inputs: list[list[int]], batch_size: int, max_new_tokens: int
) -> Iterator[dict[int, str]]:
    """Greedy continuations, batch by batch, as {row: answer}; longest inputs first: memory runs out early if at all.

    Rows are padded on the left and masked: an answer depends neither on its batch nor on its order.
    """
    pad = pad_token(loaded)
    order = sorted(range(len(inputs)), key=lambda row: -len(inputs[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        length = len(inputs[rows[0]])
        ids = torch.tensor([[pad] * (length - len(inputs[row])) + inputs[row] for row in rows])
        mask = torch.tensor([[0] * (length - len(inputs[row])) + [1] * len(inputs[row]) for row in rows])
        output = loaded.model.generate(
            input_ids=ids.to(loaded.model.device),
            attention_mask=mask.to(loaded.model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=1,
            repetition_penalty=None,
            pad_token_id=pad,
        )
        texts = loaded.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        yield {row: text.strip() for row, text in zip(rows, texts, strict=True)}


def answer_questions(
    loaded: LoadedModel,
    questions: list[str],
    language: Language,
    *,
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    chat_template: bool = False,
    done: dict[int, str] | None = None,
    report: Callable[[dict[int, str]], None] = lambda rows: None,
) -> list[str]:
    """The model's answer to each question, in their order. Rows in `done` are not asked again."""
    answers = dict(done or {})
    pending = [row for row in range(len(questions)) if row not in answers]
    inputs = [model_inputs(loaded, questions[row], language, chat_template) for row in pending]
    for batch in generate(loaded, inputs, batch_size, max_new_tokens):
        fresh = {pending[at]: text for at, text in batch.items()}
        answers |= fresh
        report(fresh)
    return [answers[row] for row in range(len(questions))]
