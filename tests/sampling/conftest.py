"""The small model and its tokenizer, as the tests of models have them."""

from tests.models.conftest import model, tokenizer, tokenizer_directory

__all__ = ["model", "tokenizer", "tokenizer_directory"]
