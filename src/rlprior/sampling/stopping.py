"""Strings that end a response: of which rows has a token just completed one."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class StopStrings:
    """Reads rows of tokens as they are drawn, and remembers which have ended.

    Args:
        strings: what ends a response, none of them empty.
        decode: text of token ids.
    """

    def __init__(self, strings: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self._strings = tuple(strings)
        self._decode = decode
        self._last_characters = {string[-1] for string in strings}
        # a character is at most four tokens of bytes; one more, since some tokenizers drop the space before the first
        self._max_tail = 4 * max(len(string) for string in strings) + 1
        self._drawn: dict[int, list[int]] = {}
        self._texts: dict[int, str] = {}
        self.ended: set[int] = set()

    def read(self, rows: Sequence[int], token_ids: Sequence[int]) -> list[bool]:
        """Whether each row's new token completes a string."""
        return [self._completes(row, token_id) for row, token_id in zip(rows, token_ids, strict=True)]

    def _completes(self, row: int, token_id: int) -> bool:
        drawn = self._drawn.setdefault(row, [])
        drawn.append(token_id)
        if not self._may_end(token_id):
            return False
        tail = self._decode(drawn[-self._max_tail :])
        if any(string in tail for string in self._strings):
            self.ended.add(row)
        return row in self.ended

    def _may_end(self, token_id: int) -> bool:
        """Whether a token holds the last character of a string, or part of a character, which shows as U+FFFD or as nothing."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._decode([token_id])
        return not text or "\ufffd" in text or any(last in text for last in self._last_characters)


def cut_at_stop(text: str, strings: Sequence[str]) -> str:
    r"""`text` before the first of the strings in it.

    >>> cut_at_stop(" 4\nQ: 2+3\nA: 5", ["\nQ:", "\n\n"])
    ' 4'
    """
    places = [place for string in strings if (place := text.find(string)) >= 0]
    return text[: min(places)] if places else text
