"""Step 3.2: greedy answers of a model to a set of questions.

Knows models and text; knows nothing of judging.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext

from tqdm import tqdm

from soteria.answering.columns import AnswerColumn
from soteria.answering.decoding import decode, first_token_log_probs, plan_batches, token_budget
from soteria.answering.questions import chat_message, question_prompt
from soteria.errors import UserError
from soteria.languages import Language
from soteria.models.loading import LoadedModel
from soteria.models.memory import Rows
from soteria.models.processes import Processes

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


def all_inputs(loaded: LoadedModel, questions: list[str], language: Language, chat_template: bool) -> list[list[int]]:
    """The token ids of each question. Raises UserError for one that leaves no room for an answer, by its row."""
    inputs = [model_inputs(loaded, question, language, chat_template) for question in questions]
    room = loaded.context_length
    for row, ids in enumerate(inputs):
        if room is not None and len(ids) >= room:
            raise UserError(
                f"row {row} is a question of {len(ids)} tokens, but {loaded.name!r} reads {room} at most; "
                "shorten it or leave it out"
            )
    return inputs


def generate(
    loaded: LoadedModel,
    inputs: list[list[int]],
    batch_size: int,
    max_new_tokens: int,
    done: Collection[int] = (),
    processes: Processes | None = None,
) -> Iterator[dict[int, str]]:
    """Greedy continuations, batch by batch, as {row: answer}; batches whose rows are all in `done` are left out.

    `batch_size` says how much memory may be taken: that of so many of the longest inputs with whole answers. Shorter
    ones share a batch with more. An answer depends neither on its batch nor on its order; it ends where the model's
    context does. `processes` share the batches out.
    """
    lengths, context = list(map(len, inputs)), loaded.context_length
    room = Rows(token_budget(lengths, batch_size, max_new_tokens), "try a smaller --max_new_tokens")

    def continue_batch(rows: list[int]) -> dict[int, str]:
        limits = [max_new_tokens if context is None else min(max_new_tokens, context - lengths[row]) for row in rows]
        tokens = decode(loaded, [inputs[row] for row in rows], limits, room)
        texts = loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return {row: text.strip() for row, text in zip(rows, texts, strict=True)}

    batches = [rows for rows in plan_batches(lengths, batch_size, max_new_tokens) if not set(rows) <= set(done)]
    yield from (processes.map if processes else map)(continue_batch, batches)


def answer_questions(
    loaded: LoadedModel,
    questions: list[str],
    language: Language,
    *,
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    chat_template: bool = False,
) -> list[str]:
    """The model's answer to each question, in their order."""
    answers: dict[int, str] = {}
    for batch in generate(loaded, all_inputs(loaded, questions, language, chat_template), batch_size, max_new_tokens):
        answers |= batch
    return [answers[row] for row in range(len(questions))]


def fill(
    column: AnswerColumn, language: Language, load: Callable[[], LoadedModel], processes: Processes, batch_size: int
) -> None:
    """Answer what the column's journal lacks, and write the column. `load` gives the model, if it is needed."""
    journal, questions, settings = column.journal(), column.questions.questions, column.settings
    needs_model = len(journal.done) < len(questions) or column.lacks_first_tokens
    loaded = load() if processes.agree(needs_model) else None
    inputs = all_inputs(loaded, questions, language, settings["chat_template"]) if loaded else None
    with journal if processes.is_first else nullcontext():
        answers = processes.agree(journal.done)
        with tqdm(
            total=len(questions),
            initial=len(answers),
            desc=column.output.stem,
            unit="answer",
            leave=None,
            disable=None if processes.is_first else True,
        ) as progress:
            made = generate(loaded, inputs, batch_size, settings["max_new_tokens"], set(answers), processes)
            for batch in made if loaded else ():
                fresh = {row: text for row, text in batch.items() if row not in answers}
                answers |= fresh
                if processes.is_first:
                    journal.add(fresh)
                progress.update(len(fresh))
        if processes.is_first:
            if column.lacks_first_tokens:
                column.save_first_tokens(first_token_log_probs(loaded, inputs, batch_size))
            column.save([answers[row] for row in range(len(questions))])
            column.forget_journal()
    processes.wait()
