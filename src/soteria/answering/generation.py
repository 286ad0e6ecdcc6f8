"""Answers of a model to a set of questions (step 3.2), greedy unless they are asked for as the original release did.

In: a loaded model and questions. Out: texts in the questions' order, or a finished `AnswerColumn`.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext

import torch
from tqdm import tqdm

from soteria.answering.chat import chat_text
from soteria.answering.columns import AnswerColumn
from soteria.answering.decoding import decode, first_token_log_probs, pad_token, plan_batches, token_budget
from soteria.answering.engines import Asked, Engine
from soteria.answering.progress import AnswerProgress
from soteria.answering.questions import MAX_NEW_TOKENS, RELEASE, question_prompt
from soteria.answering.thinking import split_thinking, texts_of
from soteria.errors import UserError
from soteria.languages import Language
from soteria.models.encoding import check_known
from soteria.models.loading import LoadedModel, describe_model
from soteria.models.memory import TokenBudget
from soteria.models.processes import Processes


def prompt_text(
    loaded: LoadedModel, question: str, language: Language, chat_template: bool, preset: str | None = None
) -> str:
    """What a model reads before it answers, with the special tokens of the chat template if that is used.

    A template that can switch thinking off does. Raises UserError if the tokenizer lacks the chat template.
    """
    if preset == RELEASE:
        return language.instruction + question
    if not chat_template:
        return question_prompt(question, language)
    if not loaded.tokenizer.chat_template:
        raise UserError(f"{loaded.name!r} has no chat template; leave out --chat_template")
    return chat_text(loaded.tokenizer, chat_messages(question, language))


def chat_messages(question: str, language: Language) -> list[dict[str, str]]:
    """What goes into a chat template."""
    return [{"role": "user", "content": f"{language.instruction}\n\n{question}"}]


def all_inputs(
    loaded: LoadedModel, questions: list[str], language: Language, chat_template: bool, preset: str | None = None
) -> list[list[int]]:
    """The token ids of each question's prompt.

    Raises UserError if the tokenizer lacks the chat template or the questions' letters, or, naming the row, if one
    leaves no room to answer.
    """
    context, inputs = loaded.context_length, []
    check_known(loaded.tokenizer, loaded.name, questions)
    for row, question in enumerate(questions):
        prompt = prompt_text(loaded, question, language, chat_template, preset)
        inputs.append(loaded.encode(prompt, add_special_tokens=not chat_template))
        if context is not None and len(inputs[-1]) >= context:
            raise UserError(
                f"row {row} is a question of {len(inputs[-1])} tokens, but {loaded.name!r} reads at most {context}; "
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
    progress: AnswerProgress | None = None,
) -> Iterator[dict[int, str]]:
    """Greedy answers as {row: answer}, batch by batch, without the batches whose rows are all in `done`.

    Where a model thinks, an answer holds that too, in tags (`split_thinking`).
    The memory to use is that of `batch_size` of the longest inputs with full-length answers. An answer depends neither
    on its batch nor on the order, and ends at the latest where the model's context does. `processes` share the batches.
    """
    lengths, context = list(map(len, inputs)), loaded.context_length
    room = TokenBudget(token_budget(lengths, batch_size, max_new_tokens), "try a smaller --max_new_tokens")

    def continue_batch(rows: list[int]) -> dict[int, str]:
        limits = [max_new_tokens if context is None else min(max_new_tokens, context - lengths[row]) for row in rows]
        prompts = [inputs[row] for row in rows]
        if progress is not None:
            progress.begin(limits)
        told = {"told": progress.step} if progress is not None else {}
        texts = texts_of(loaded.tokenizer, prompts, decode(loaded, prompts, limits, room, **told))
        return {row: text.strip() for row, text in zip(rows, texts, strict=True)}

    done = set(done)
    batches = [rows for rows in plan_batches(lengths, batch_size, max_new_tokens) if not done.issuperset(rows)]
    yield from (processes.map if processes else map)(continue_batch, batches)


def generate_as_configured(
    loaded: LoadedModel,
    inputs: list[list[int]],
    max_new_tokens: int,
    done: Collection[int] = (),
    processes: Processes | None = None,
    progress: AnswerProgress | None = None,
) -> Iterator[dict[int, str]]:
    """Answers as `generate` gives them, decoded by transformers under the model's own generation config.

    One question at a time, with its row as the seed of torch: a sampled answer depends on no other.
    """
    context = loaded.context_length

    @torch.inference_mode()
    def answer(row: int) -> dict[int, str]:
        torch.manual_seed(row)
        ids = torch.tensor([inputs[row]], device=loaded.model.device)
        limit = max_new_tokens if context is None else min(max_new_tokens, context - ids.shape[1])
        given = {"attention_mask": torch.ones_like(ids), "pad_token_id": pad_token(loaded)}
        given |= {"num_return_sequences": 1, "return_dict_in_generate": False}  # whatever is configured, one answer
        tokens = loaded.model.generate(input_ids=ids, max_new_tokens=limit, **given)[:, ids.shape[1] :].tolist()
        if progress is not None:
            progress.begin([limit])
            progress.step(len(tokens[0]), [(len(tokens[0]), limit)])
        return {row: texts_of(loaded.tokenizer, [inputs[row]], tokens)[0].strip()}

    rows = [row for row in range(len(inputs)) if row not in done]
    yield from (processes.map if processes else map)(answer, rows)


def answer_questions(
    loaded: LoadedModel,
    questions: list[str],
    language: Language,
    *,
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    chat_template: bool = False,
) -> list[str]:
    """The model's answers to the questions, in their order, without its thinking."""
    answers: dict[int, str] = {}
    for batch in generate(loaded, all_inputs(loaded, questions, language, chat_template), batch_size, max_new_tokens):
        answers |= batch
    return [split_thinking(answers[row])[1] for row in range(len(questions))]


def from_engine(
    engine: Engine, column: AnswerColumn, language: Language, done: Collection[int]
) -> Iterator[dict[int, str]]:
    """An engine's answers to the questions that are not in `done`, asked as `generate` is."""
    questions, chats, longest = (
        column.questions.questions, column.settings["chat_template"], column.settings["max_new_tokens"],
    )  # fmt: skip
    described = describe_model(column.model)
    context, inputs = described.context_length or math.inf, all_inputs(described, questions, language, chats)
    asked = {
        row: Asked(
            inputs[row],
            prompt_text(described, question, language, chats),
            chat_messages(question, language) if chats else None,
            min(longest, context - len(inputs[row])),
        )
        for row, question in enumerate(questions)
        if row not in done
    }
    yield from engine.answers(described, asked)


def fill(
    column: AnswerColumn,
    language: Language,
    load: Callable[[], LoadedModel],
    processes: Processes,
    batch_size: int,
    engine: Engine | None = None,
    announce: Callable[[int], object] = lambda n_done: None,
) -> None:
    """Generate the answers that the column's journal lacks and write the column. `load` is called only if needed.

    With an engine, that is where the first tokens' log-probabilities are wanted: engines do not give them all.
    `announce` gets how many there are already, once nothing but the work is left to do.
    """
    journal, questions, settings = column.journal(), column.questions.questions, column.settings
    lacks_answers = len(journal.done) < len(questions)
    needs_model = (lacks_answers and not engine) or column.lacks_first_tokens
    loaded = load() if processes.agree(needs_model) else None
    preset, longest = settings.get("preset"), settings["max_new_tokens"]
    inputs = all_inputs(loaded, questions, language, settings["chat_template"], preset) if loaded else None
    with journal if processes.is_first else nullcontext():
        if processes.agree(column.is_complete()):  # by a process that was waited for
            return
        answers = processes.agree(journal.done)
        hidden = None if processes.is_first else True
        if lacks_answers and processes.is_first:
            announce(len(answers))
        n_left, shown = len(questions) - len(answers), {"desc": column.output.stem, "disable": hidden, "leave": None}
        with (
            tqdm(total=n_left, unit="answer", **shown)
            if engine
            else AnswerProgress(n_left, longest, share=processes.count, **shown)
        ) as bar:
            if engine:
                made = from_engine(engine, column, language, set(answers)) if lacks_answers else ()
            elif preset == RELEASE:
                made = generate_as_configured(loaded, inputs, longest, set(answers), processes, bar) if loaded else ()
            else:
                made = generate(loaded, inputs, batch_size, longest, set(answers), processes, bar) if loaded else ()
            for batch in made:
                fresh = {row: text for row, text in batch.items() if row not in answers}
                answers |= fresh
                if processes.is_first:
                    journal.add(fresh)
                bar.update(len(fresh) if engine else 0)
                bar.set_postfix_str(f"{len(answers)} of {len(questions)} answers", refresh=False)
        if processes.is_first:
            log_probs = first_token_log_probs(loaded, inputs, batch_size) if column.lacks_first_tokens else None
            served = engine.facts() if engine else None
            column.save([answers[row] for row in range(len(questions))], log_probs, served)
    processes.wait()
