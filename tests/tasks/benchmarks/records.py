"""A few records of each data set, in the form that the hub has them."""

from __future__ import annotations

import textwrap
from typing import Any

from rlprior.tasks.benchmarks.logic import BBH_TASKS

Rows = list[dict[str, Any]]

_LOOP = """
inputs = [[3], [-inf]]
results = [6, -inf]
for i, (inp, exp) in enumerate(zip(inputs, results)):
    assertion({called}(*inp), exp, 1e-06)
"""
_ASSERTION = """
def assertion(out, exp, atol):
    assert out == exp
"""
_PLUS_CHECK = (
    f"{_ASSERTION}\ndef check(candidate):\n{textwrap.indent(_LOOP.format(called='candidate'), '    ')}"
)
_PLUS_LOOP = _ASSERTION + _LOOP.format(called="double")


def choices(*texts: str, labels: str = "ABCDE") -> dict[str, list[str]]:
    return {"text": list(texts), "label": list(labels[: len(texts)])}


def gpqa(number: int) -> dict[str, Any]:
    return {
        "Question": f"Which of these rocks has {number} layers?",
        "Correct Answer": f"the one with {number}",
        **{f"Incorrect Answer {wrong}": f"the one with {number + wrong}" for wrong in (1, 2, 3)},
        "High-level domain": "Physics" if number % 2 else "Biology",
        "Explanation": "It has been counted.",
    }


def mmlu_pro(category: str, number: int, worked: str = "") -> dict[str, Any]:
    return {
        "question_id": number,
        "question": f"What is {number} plus two in {category}?",
        "options": [str(number + step) for step in range(10)],
        "answer": "C",
        "answer_index": 2,
        "cot_content": worked,
        "category": category,
    }


def math(subject: str, number: int) -> dict[str, Any]:
    return {
        "problem": f"Halve ${number}$ ({subject}).",
        "level": "Level 1",
        "type": subject.title(),
        "solution": rf"We have $\boxed{{\frac{{{number}}}{{2}}}}$.",
    }


def mbpp(number: int) -> dict[str, Any]:
    return {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add_{number}(x):\r\n  return x + {number}",
        "test_list": [f"assert add_{number}({x}) == {x + number}" for x in range(3)],
        "test_setup_code": "",
        "challenge_test_list": [],
    }


HENDRYCKS = [
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
]

HUB: dict[str, dict[tuple[str | None, str], Rows]] = {
    "openai/gsm8k": {
        ("main", "train"): [
            {"question": f"Add {n} and 1.", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
            for n in (1, 2, 3)
        ],
        ("main", "test"): [{"question": "Add 999 and 1.", "answer": "999+1=<<999+1=1000>>1,000\n#### 1,000"}],
    },
    "EleutherAI/hendrycks_math": {
        (subject, split): [math(subject, number) for number in numbers]
        for subject in HENDRYCKS
        for split, numbers in (("train", (1, 3)), ("test", (5,)))
    },
    "HuggingFaceH4/MATH-500": {
        (None, "test"): [
            {**math("algebra", 7), "answer": r"\frac{7}{2}", "subject": "Algebra", "unique_id": "test/1.json"}
        ]
    },
    "math-ai/minervamath": {(None, "test"): [{"question": "How far is it, in cm?", "answer": "4.5e33"}]},
    "math-ai/amc23": {(None, "test"): [{"id": 0, "question": "How many hours?", "answer": 27.0, "url": "u"}]},
    "math-ai/aime24": {
        (None, "test"): [{"id": 60, "problem": "Find it.", "solution": r"\boxed{204}", "url": "u"}]
    },
    "math-ai/aime25": {(None, "test"): [{"id": "0", "problem": "Find it too.", "answer": "70"}]},
    "Hothan/OlympiadBench": {
        ("OE_TO_maths_en_COMP", "train"): [
            {
                "id": 1,
                "question": "Solve it.",
                "context": "Let $x$ be real.",
                "solution": ["It is so."],
                "final_answer": [r"$\frac{1}{2}$"],
                "is_multiple_answer": False,
                "subfield": "Algebra",
            },
            {
                "id": 2,
                "question": "Solve both.",
                "context": None,
                "solution": ["They are so."],
                "final_answer": ["$0$, $3$"],
                "is_multiple_answer": True,
                "subfield": "Geometry",
            },
        ]
    },
    "cais/mmlu": {
        ("all", "test"): [
            {
                "question": "Is 2 prime?",
                "subject": "number_theory",
                "choices": ["no", "yes", "it was", "so"],
                "answer": 1,
            }
        ]
    },
    "TIGER-Lab/MMLU-Pro": {
        (None, "validation"): [
            mmlu_pro(category, number, f"A: Let's think step by step. {number} + 2 is C. The answer is (C).")
            for category in ("law", "physics")
            for number in (1, 2)
        ],
        (None, "test"): [mmlu_pro("law", 5), mmlu_pro("physics", 6)],
    },
    "mandarjoshi/trivia_qa": {
        ("rc.nocontext", split): [
            {
                "question": f"Who wrote book {number}?",
                "question_id": f"q_{number}",
                "answer": {
                    "value": f"J. Author {number}",
                    "aliases": [f"Author {number}", f"J. Author {number}"],
                },
            }
            for number in numbers
        ]
        for split, numbers in (("train", (1, 2, 3)), ("validation", (4,)))
    },
    "google-research-datasets/nq_open": {
        (None, "validation"): [
            {"question": f"who painted wall {number}", "answer": [f"Painter {number}", f"P. {number}"]}
            for number in range(4)
        ]
    },
    "Idavidrein/gpqa": {
        ("gpqa_main", "train"): [gpqa(number) for number in range(4)],
        ("gpqa_diamond", "train"): [gpqa(number) for number in range(2)],
    },
    "truthfulqa/truthful_qa": {
        ("multiple_choice", "validation"): [
            {
                "question": f"Does a stone weigh {number} tons?",
                "mc1_targets": {"choices": ["Rarely", "Yes", "Always"], "labels": [1, 0, 0]},
                "mc2_targets": {"choices": ["Rarely", "No", "Yes"], "labels": [1, 1, 0]},
            }
            for number in range(4)
        ]
    },
    "Rowan/hellaswag": {
        (None, split): [
            {
                "activity_label": "Making tea",
                "ctx_a": f"Someone fills {number} pots [header] of water.",
                "ctx_b": "the water",
                "ctx": "not read",
                "endings": ["boils.", "sings [step] loudly.", "leaves.", "[title] Sleep"],
                "label": "0",
            }
        ]
        for split, number in (("train", 1), ("validation", 2))
    },
    "lighteval/siqa": {
        (None, split): [
            {
                "context": f"Kim lent {number} books.",
                "question": "Why did Kim do this?",
                "answerA": "to help",
                "answerB": "to sleep",
                "answerC": "to swim",
                "label": "1",
            }
        ]
        for split, number in (("train", 1), ("validation", 2))
    },
    "baber/piqa": {
        (None, split): [
            {"goal": f"Carry {number} eggs.", "sol1": "Use a sieve of ice.", "sol2": "Use a box.", "label": 1}
        ]
        for split, number in (("train", 1), ("validation", 2))
    },
    "allenai/winogrande": {
        ("winogrande_xl", split): [
            {
                "sentence": f"The {number} cups did not fit on the shelf because the _ was too small.",
                "option1": "cups",
                "option2": "shelf",
                "answer": "2",
            }
        ]
        for split, number in (("train", 1), ("validation", 2))
    },
    "allenai/openbookqa": {
        ("main", split): [
            {
                "id": "1",
                "question_stem": f"Ice {number} is",
                "choices": choices("hot", "cold"),
                "answerKey": "B",
            }
        ]
        for split, number in (("train", 1), ("test", 2))
    },
    "tau/commonsense_qa": {
        (None, split): [
            {
                "id": "1",
                "question": f"Where are {number} books?",
                "question_concept": "book",
                "choices": choices("sea", "library", "oven", "sky", "soup"),
                "answerKey": "B",
            }
        ]
        for split, number in (("train", 1), ("validation", 2))
    },
    "allenai/ai2_arc": {
        (subset, split): [
            {
                "id": "1",
                "question": f"Which of {number} things melts?",
                "choices": choices("ice", "stone", "smoke", labels=labels),
                "answerKey": labels[0],
            }
        ]
        for subset, labels in (("ARC-Easy", "ABC"), ("ARC-Challenge", "123"))
        for split, number in (("train", 1), ("test", 2))
    },
    "TAUR-Lab/MuSR": {
        (None, split): [
            {
                "narrative": f"A long story about {split}.",
                "question": "Who is it?",
                "choices": "['Ann', \"Bob's\"]",
                "answer_index": 1,
                "answer_choice": "Bob's",
            }
        ]
        for split in ("murder_mysteries", "object_placements", "team_allocation")
    },
    "openai/openai_humaneval": {
        (None, "test"): [
            {
                "task_id": "HumanEval/0",
                "prompt": 'def double(x):\n    """Twice x."""\n',
                "canonical_solution": "    return 2 * x\n",
                "test": "def check(candidate):\n    assert candidate(3) == 6\n",
                "entry_point": "double",
            }
        ]
    },
    "evalplus/humanevalplus": {
        (None, "test"): [
            {
                "task_id": "HumanEval/0",
                "prompt": 'def double(x):\n    """Twice x."""\n',
                "canonical_solution": "    return 2 * x\n",
                "test": _PLUS_CHECK,
                "entry_point": "double",
            }
        ]
    },
    "google-research-datasets/mbpp": {
        ("full", "prompt"): [mbpp(number) for number in range(1, 11)],
        ("full", "test"): [mbpp(11)],
    },
    "evalplus/mbppplus": {
        (None, "test"): [
            {
                "task_id": 12,
                "code": "def double(x):\n  return 2 * x",
                "prompt": "Write a function to double. https://www.example.org/double",
                "source_file": "s",
                "test_imports": [],
                "test_list": ["assert double(3) == 6", "assert double(4) == 8"],
                "test": _PLUS_LOOP,
            }
        ]
    },
    "google/IFEval": {
        (None, "train"): [
            {
                "key": 1,
                "prompt": "Write about tea without commas, in at least 5 words.",
                "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
                "kwargs": [{}, {"num_words": 5, "relation": "at least"}],
            }
        ]
    },
    "SaylorTwift/bbh": {
        (task, "test"): [
            {"input": f"Is {task} hard?", "target": "(A)"},
            {"input": f"{task}!", "target": "yes"},
        ]
        for task in BBH_TASKS
    },
}
