"""GSM8K and MMLU: what is asked, and whether the answer is right, by rules with a name and a version.

Held against the published scores of seven models of arXiv 2407.09121, marked by people, on the answers that its
authors released (500 a model and task), the rules are off on average by so many points (and in one direction by):

    gsm8k  last-sentence  2.0 (+1.9)        mmlu  choice  0.7 (0.0)
           last-number    5.7 (-5.4)

`choice` was written with a look at those answers, so its figure flatters it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from derta_jax.evaluation.attacks import Question
from derta_jax.evaluation.questions import PLACEHOLDER, read_questions
from derta_jax.evaluation.records import Record, collect, csv_records

LETTERS = "ABCD"


@dataclass(frozen=True)
class Extractor:
    """A rule that finds in a response what may be its answer; any change of it is a new version."""

    name: str
    version: str
    answers: Callable[[Question, str], Sequence[str]]

    def correct(self, question: Question, response: str) -> bool:
        return question["gold"] in self.answers(question, response)


@dataclass(frozen=True)
class Task:
    """`read` gives questions with `gold`, the right answer; `body` is how one is put, `worked` how an example answers.

    The first extractor is the default. Without any, there is no rule for right and wrong.
    """

    read: Callable[[Path], list[Question]]
    instruction: str
    body: Callable[[Question], str]
    worked: Callable[[Question], str]
    extractors: tuple[Extractor, ...]

    def extractor(self, name: str | None) -> Extractor:
        """By name, or the default."""
        return next(extractor for extractor in self.extractors if name in (None, extractor.name))


def with_prompts(
    task: Task,
    questions: Iterable[Question],
    examples: Sequence[Question] = (),
    shots: int = 0,
    instruction: str | None = None,
) -> list[Question]:
    """The questions as they are asked: `shots` worked examples before each, the instruction around it.

    Examples are the first, of the same `subject` where there are enough of them.
    """
    return [
        question
        | {"prompt": (instruction or task.instruction).replace(PLACEHOLDER, _put(task, question, examples, shots))}
        for question in map(dict, questions)
    ]


def _put(task: Task, question: Question, examples: Sequence[Question], shots: int) -> str:
    if not shots:
        return task.body(question)
    same = [example for example in examples if example.get("subject") == question.get("subject")]
    shown = (same if len(same) >= shots else examples)[:shots]
    worked = [f"Question: {task.body(example)}\nAnswer: {task.worked(example)}" for example in shown]
    return "\n\n".join([*worked, f"Question: {task.body(question)}\nAnswer:"])


_NUMBER = re.compile(
    r"""
    (?P<minus> (?<![\w.)\]}%]) [-−] )? \\?\$?
    (?: \\[dt]?frac \{ (?P<top> [0-9]{1,30} ) \} \{ (?P<bottom> [0-9]{1,30} ) \}
      | (?<![0-9/]) (?: (?P<whole> [0-9]{1,30} ) [ ] )? (?P<over> [0-9]{1,30} ) / (?P<under> [0-9]{1,30} ) (?![0-9/])
      | (?P<decimal> [0-9]{1,3} (?: ,[0-9]{3} ){1,10} (?![0-9]) (?: \.[0-9]{1,30} )?
                   | [0-9]{1,30} (?: \.[0-9]{1,30} )?
                   | \.[0-9]{1,30} )
    )
    """,
    re.VERBOSE,
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_HASHES = re.compile(r"####(.*)")
_SENTENCE_END = re.compile(r"\n+|(?<=[.!?])\s+")


def numbers(text: str) -> list[Fraction]:
    r"""The numbers of a text, in order and without units: 1,234.50, $5, 50%, -3, 3/4, 1 1/2, \frac{3}{4}."""
    found = []
    for match in _NUMBER.finditer(text):
        top, bottom = match["top"] or match["over"], match["bottom"] or match["under"]
        if match["decimal"]:
            value = Fraction(match["decimal"].replace(",", ""))
        elif int(bottom):
            value = Fraction(int(top), int(bottom)) + int(match["whole"] or 0)
        else:
            continue
        found.append(-value if match["minus"] else value)
    return found


def final_answer(response: str) -> list[Fraction]:
    r"""The numbers marked as the answer by the last `####` or `\boxed{}`; none where nothing is marked."""
    marked = [*_HASHES.finditer(response), *_BOXED.finditer(response)]
    return numbers(max(marked, key=lambda match: match.start())[1]) if marked else []


def numbers_of_last_sentence(_: Question, response: str) -> list[str]:
    """What is marked as the answer, else every number of the last sentence that has any."""
    sentences = (numbers(sentence) for sentence in reversed(_SENTENCE_END.split(response)))
    return [str(number) for number in final_answer(response) or next(filter(None, sentences), [])]


def last_number(_: Question, response: str) -> list[str]:
    """What is marked as the answer, else the last number."""
    return [str(number) for number in (final_answer(response) or numbers(response))[-1:]]


def read_gsm8k(path: Path) -> list[Question]:
    """JSONL with `question` and `answer`, whose last line is `#### number`."""

    def golden(question: Question) -> Question:
        gold = final_answer(answer) if isinstance(answer := question.get("answer"), str) else []
        if not gold:
            raise ValueError("answer: must end in `#### number`")
        return {**question, "gold": str(gold[-1])}

    return read_questions(path, golden)


_CALCULATION = re.compile(r"<<[^<>]*>>")

GSM8K = Task(
    read_gsm8k,
    PLACEHOLDER,
    lambda question: question["prompt"],
    lambda question: _CALCULATION.sub("", question["answer"]),
    (Extractor("last-sentence", "1", numbers_of_last_sentence), Extractor("last-number", "1", last_number)),
)

_STATED = re.compile(
    r"""
    \b (?i: answer | option | choice ) \b [^.\n]{0,80}? (?: \bis\b | : ) [-\s*"'`]* (?i: option \s* )?
    (?: \( ([A-D]) \) | ([A-D]) (?= [\s*"'`]* (?: [).,:;] | $ | \n ) | \s+ (?: because | since | as )\b ) )
    | (?: \( | (?i: option | choice ) \s+ ) ([A-D]) \b
      [^.\n]{0,80}? \b is \s+ (?: the \s+ )? (?: correct | right | best ) \b
    """,
    re.VERBOSE,
)
_OPENING = re.compile(r"[\s*\"'`-]*(?:\(([A-D])\)|([A-D])(?=[\s*\"'`]*(?:[).,:;]|$|\n)))")
_BRACKETED = re.compile(r"\(([A-D])\)")


def choice(question: Question, response: str) -> list[str]:
    """The letter that a response chooses, or nothing.

    The last that it states ("the answer is (B)"), else the one that it opens with ("B. …"), else the only one in
    brackets, else that of the only choice whose text it repeats.
    """
    if stated := _STATED.findall(response):
        return ["".join(stated[-1])]
    if opening := _OPENING.match(response):
        return [opening[1] or opening[2]]
    if len(letters := set(_BRACKETED.findall(response))) == 1:
        return list(letters)
    said = _plain(response)
    choices = map(_plain, question["choices"])
    repeated = {text: letter for letter, text in zip(LETTERS, choices, strict=True) if text in said}
    longest = [text for text in repeated if not any(text in other and text != other for other in repeated)]
    return [repeated[longest[0]]] if len(longest) == 1 else []


def _plain(text: str) -> str:
    """Words alone, in small letters, each between spaces."""
    words = re.findall(r"[^\W_]+", text.casefold())
    return f" {' '.join(words)} "


def read_mmlu(path: Path) -> list[Question]:
    """The original CSV (question, four choices, letter; no header), JSONL as on Hugging Face (`choices`, an `answer`
    that counts from 0), or the DeRTa authors' JSONL, whose questions hold their options.
    """
    if path.suffix.lower() == ".csv":
        return collect(csv_records(path), _from_mmlu_row)
    return read_questions(path, _from_mmlu_object)


def _from_mmlu_row(record: Record) -> Question:
    if len(record.value) != 6:
        raise ValueError(f"has {len(record.value)} fields, not the six of MMLU: question, four choices, letter")
    question, *choices, letter = record.value
    if not question.strip():
        raise ValueError("the question is empty")
    return _multiple_choice({"id": record.name, "prompt": question}, choices, letter)


def _from_mmlu_object(question: Question) -> Question:
    letter = question.get("answer")
    if type(letter) is int and 0 <= letter < len(LETTERS):
        letter = LETTERS[letter]
    if "choices" in question:
        return _multiple_choice(question, question["choices"], letter)
    text, _, options = question["prompt"].partition("\n-options\n")
    choices = re.split(r"(?:^|\n)-\([A-D]\) ?", options.rstrip())[1:]
    return _multiple_choice({**question, "prompt": text}, choices, letter)


def _multiple_choice(question: Mapping[str, Any], choices: Any, letter: Any) -> Question:
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(text, str) for text in choices):
        raise ValueError("choices: must be a list of four strings, or -(A) to -(D) below -options in the question")
    if not isinstance(letter, str) or letter.strip() not in [*LETTERS]:
        raise ValueError(f"answer: must be one of A, B, C, D, or 0 to 3 (got {letter!r})")
    return {**question, "choices": choices, "gold": letter.strip()}


def _with_choices(question: Question) -> str:
    choices = (f"({letter}) {text}" for letter, text in zip(LETTERS, question["choices"], strict=True))
    return "\n".join([question["prompt"], *choices])


MMLU = Task(
    read_mmlu,
    f"Which of the choices is right? Begin with its letter.\n\n{PLACEHOLDER}",
    _with_choices,
    lambda question: f"({question['gold']})",
    (Extractor("choice", "1", choice),),
)

ALPACA = Task(read_questions, PLACEHOLDER, lambda question: question["prompt"], lambda question: "", ())

TASKS = {"gsm8k": GSM8K, "mmlu": MMLU, "alpaca": ALPACA}
