"""Verifiable problems: what they are, where they come from, and how an answer is judged."""

from rlprior.tasks.canonical import canonical_answer
from rlprior.tasks.config import TaskConfig, load_task
from rlprior.tasks.files import load_problems
from rlprior.tasks.problem import Problem, Status, Verdict
from rlprior.tasks.synthetic import generate_problems, split_of
from rlprior.tasks.verifier import Verifier, open_verifier
from rlprior.tasks.verify import extract_answer, verify

__all__ = [
    "Problem",
    "Status",
    "TaskConfig",
    "Verdict",
    "Verifier",
    "canonical_answer",
    "extract_answer",
    "generate_problems",
    "load_problems",
    "load_task",
    "open_verifier",
    "split_of",
    "verify",
]
