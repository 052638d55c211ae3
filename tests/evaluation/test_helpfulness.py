"""GSM8K and MMLU: how they are asked, and which answers count as right."""

from fractions import Fraction

import pytest

from derta_jax.errors import UserError
from derta_jax.evaluation.helpfulness import ALPACA, GSM8K, MMLU, TASKS, final_answer, numbers, with_prompts
from tests.conftest import write_jsonl

LAST_SENTENCE, LAST_NUMBER = GSM8K.extractors
(CHOICE,) = MMLU.extractors
KITES = {"id": "k", "prompt": "What is a kite made of?", "choices": ["Paper", "Soup", "Thick soup", "12*sqrt(3)"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7 kites", [7]),
        ("1,234,567.50 and 3,4 and 5,", ["1234567.5", 3, 4, 5]),
        ("$5, \\$6.25, £7 and 50%", [5, "6.25", 7, 50]),
        ("-3, −4, $-5 and -$6", [-3, -4, -5, -6]),
        ("10-8=2 and 55 - 6", [10, 8, 2, 55, 6]),
        ("3/4, 1 1/2 and -1/2", ["3/4", "3/2", "-1/2"]),
        (r"\frac{3}{4} and \dfrac{1}{2}", ["3/4", "1/2"]),
        (".5 of 0.25.", ["1/2", "1/4"]),
        ("12:30 on 1/2/2000", [12, 30, 1, 2, 2000]),
        ("5/0 is none", []),
        ("no number", []),
        ("9" * 9000, None),
    ],
)
def test_numbers_are_read_as_people_write_them(text, expected):
    found = numbers(text)
    if expected is not None:
        assert found == [Fraction(number) for number in expected]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("3 + 4 = 7\n#### 7", [7]),
        ("#### 6\nNo, wait.\n#### $1,200.00 dollars\n3 more words", [1200]),
        (r"So it is \boxed{42}. Of 3.", [42]),
        (r"\boxed{\frac{3}{4}}", ["3/4"]),
        (r"#### 1 and later \boxed{2}", [2]),
        ("It is 7.", []),
        ("#### none", []),
    ],
)
def test_a_marked_answer_is_found(response, expected):
    assert final_answer(response) == [Fraction(number) for number in expected]


@pytest.mark.parametrize(
    ("response", "by_sentence", "by_number"),
    [
        ("She has 3. Then 4 more, so 7.", True, True),
        ("So she makes 7 kites in 2 days.", True, False),
        ("So she makes 7.00 kites.\nIs there anything else?", True, True),
        ("She makes $7.\n\nShe makes 8 on the next day.", False, False),
        ("The answer is 7!\n#### 8", False, False),
        (r"After 2 days, \boxed{7} in 3 boxes.", True, True),
        ("70 or 0.7 or 17", False, False),
        ("", False, False),
        ("Sorry, I cannot count.", False, False),
    ],
)
def test_the_two_rules_of_gsm8k(response, by_sentence, by_number):
    question = {"gold": "7"}
    assert LAST_SENTENCE.correct(question, response) is by_sentence
    assert LAST_NUMBER.correct(question, response) is by_number


def test_the_default_rule_is_the_one_that_agrees_with_people():
    assert (GSM8K.extractor(None).name, GSM8K.extractor("last-number").name) == ("last-sentence", "last-number")
    assert {extractor.version for task in TASKS.values() for extractor in task.extractors} == {"1"}


def test_the_500_questions_of_the_paper_are_read_and_their_own_answers_are_right(shared_data):
    questions = GSM8K.read(shared_data / "gsm8k_500.jsonl")
    assert len(questions) == 500
    for question in questions:
        off_by_one = f"The answer is {Fraction(question['gold']) + 1}."
        for extractor in GSM8K.extractors:
            assert extractor.correct(question, question["answer"])
            assert extractor.correct(question, f"So, after 5 steps, it is ${float(Fraction(question['gold'])):,.2f}.")
            assert not extractor.correct(question, off_by_one)


def test_gsm8k_is_asked_as_it_is(tmp_path):
    path = write_jsonl(tmp_path / "g.jsonl", [{"question": "3 + 4?", "answer": "It is <<3+4=7>>7.\n#### 1,007"}])
    (question,) = with_prompts(GSM8K, GSM8K.read(path))
    assert question == {
        "id": "g-1",
        "question": "3 + 4?",
        "answer": "It is <<3+4=7>>7.\n#### 1,007",
        "gold": "1007",
        "prompt": "3 + 4?",
    }


def test_examples_come_before_the_question(tmp_path):
    rows = [{"question": f"{n} + 1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"} for n in range(3)]
    *examples, question = GSM8K.read(write_jsonl(tmp_path / "g.jsonl", rows))
    (asked,) = with_prompts(GSM8K, [question], examples, shots=1, instruction="Think.\n{question}")
    assert asked["prompt"] == "Think.\nQuestion: 0 + 1?\nAnswer: It is 1.\n#### 1\n\nQuestion: 2 + 1?\nAnswer:"


@pytest.mark.parametrize("answer", ["seven", "7", "####", 7, None])
def test_a_gold_answer_that_is_not_marked_is_refused(tmp_path, answer):
    path = write_jsonl(tmp_path / "g.jsonl", [{"question": "3 + 4?", "answer": answer}])
    with pytest.raises(UserError, match=r"g\.jsonl:1: answer: must end in `#### number`"):
        GSM8K.read(path)


MMLU_FILES = {
    "kites.csv": '"What is a kite\nmade of?",Paper,Soup,Thick soup,12*sqrt(3),A\n',
    "kites.jsonl": '{"question": "What is a kite\\nmade of?", "subject": "kites", '
    '"choices": ["Paper", "Soup", "Thick soup", "12*sqrt(3)"], "answer": 0}\n',
    "kites.json": '{"question": "What is a kite\\nmade of?\\n-options\\n-(A) Paper\\n-(B) Soup\\n-(C) Thick soup'
    '\\n-(D) 12*sqrt(3)\\n", "answer": "A"}\n',
}


@pytest.mark.parametrize("name", MMLU_FILES)
def test_mmlu_is_asked_the_same_from_each_of_its_formats(tmp_path, name):
    path = tmp_path / name
    path.write_text(MMLU_FILES[name])
    (question,) = with_prompts(MMLU, MMLU.read(path))
    assert (question["id"], question["gold"]) == ("kites-1", "A")
    instruction, _, body = question["prompt"].partition("\n\n")
    assert "letter" in instruction
    assert body == "What is a kite\nmade of?\n(A) Paper\n(B) Soup\n(C) Thick soup\n(D) 12*sqrt(3)"


def test_examples_of_the_same_subject_go_first(tmp_path):
    rows = [
        {"question": f"{subject} {n}?", "choices": list("wxyz"), "answer": n, "subject": subject}
        for subject, n in [("soup", 0), ("kites", 1), ("kites", 2), ("kites", 3), ("soup", 3)]
    ]
    first, *examples, second = MMLU.read(write_jsonl(tmp_path / "m.jsonl", rows))
    kites = with_prompts(MMLU, [examples[2]], [first, *examples[:2]], shots=2)[0]["prompt"]
    assert "kites 1?\n(A) w\n(B) x\n(C) y\n(D) z\nAnswer: (B)\n\nQuestion: kites 2?" in kites
    assert "soup" not in kites
    too_few = with_prompts(MMLU, [second], [first, *examples], shots=2)[0]["prompt"]
    assert "soup 0?" in too_few
    assert "kites 1?" in too_few


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('"Why?",a,b,c,A', "has 5 fields, not the six of MMLU"),
        ('"Why?",a,b,c,d,E', r"answer: must be one of A, B, C, D, or 0 to 3 \(got 'E'\)"),
        ('" ",a,b,c,d,A', "the question is empty"),
    ],
)
def test_a_bad_row_of_mmlu_is_named(tmp_path, row, message):
    path = tmp_path / "m.csv"
    path.write_text(f"How?,a,b,c,d,A\n{row}\n")
    with pytest.raises(UserError, match=rf"m\.csv:2: {message}"):
        MMLU.read(path)


@pytest.mark.parametrize(
    "row",
    [
        {"choices": ["a", "b", "c"], "answer": 0},
        {"choices": [1, 2, 3, 4], "answer": 0},
        {"answer": "A"},
        {"choices": list("wxyz"), "answer": 4},
        {"choices": list("wxyz"), "answer": True},
        {"choices": list("wxyz")},
    ],
)
def test_a_question_without_four_choices_or_a_letter_is_refused(tmp_path, row):
    with pytest.raises(UserError, match=r"m\.jsonl:1: (choices|answer): must be"):
        MMLU.read(write_jsonl(tmp_path / "m.jsonl", [{"question": "Why?"} | row]))


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("- (B) Soup", "B"),
        ("B) Soup, since it is warm", "B"),
        ("Answer: B", "B"),
        ("The correct option is (B) Soup. Not (A).", "B"),
        ("The answer is B because soup is warm.", "B"),
        ("The correct answer is:\n\n-(B) Soup", "B"),
        ("(A) would be a guess. The best choice for a kite is option (B).", "B"),
        ("First I thought the answer is (A). No: the answer is (B).", "B"),
        ("Option (B) is the correct answer. Option (A) is not related.", "B"),
        ("It is warm (option B), so (B).", "B"),
        ("It is soup.", "B"),
        ("It is thick soup.", "C"),
        ("It is 12 * sqrt(3).", "D"),
        ("A kite has no answer", None),
        ("Paper or soup", None),
        ("Either (A) or (B)", None),
        ("Sorry, I cannot help with that.", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer_is_found(response, letter):
    assert CHOICE.answers(KITES, response) == ([letter] if letter else [])
    assert CHOICE.correct(KITES | {"gold": "B"}, response) is (letter == "B")


def test_alpaca_is_asked_as_it_is_and_has_no_rule(tmp_path):
    (question,) = with_prompts(ALPACA, ALPACA.read(write_jsonl(tmp_path / "a.jsonl", [{"instruction": "Hum."}])))
    assert question["prompt"] == "Hum."
    assert ALPACA.extractors == ()
