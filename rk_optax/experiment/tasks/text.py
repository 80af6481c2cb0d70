"""A character corpus that is generated, so that it is the same everywhere: sums in words."""

import random

import numpy as np

# fmt: off
_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"
)
# fmt: on
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def sums(seed: int) -> list[str]:
    r"""Every sum of two numbers below 100, one per line and in an order that the seed draws.

    >>> [line for line in sums(0) if line.startswith("forty-two plus seven ")]
    ['forty-two plus seven is forty-nine.\n']
    """
    lines = [f"{in_words(a)} plus {in_words(b)} is {in_words(a + b)}.\n" for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(lines)
    return lines


def in_words(number: int) -> str:
    """An integer from 0 to 199.

    >>> in_words(90), in_words(107)
    ('ninety', 'one hundred and seven')
    """
    if number >= 100:
        rest = number - 100
        return "one hundred" + (f" and {in_words(rest)}" if rest else "")
    if number < len(_SMALL):
        return _SMALL[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_SMALL[ones]}" if ones else "")


def windows(lines: list[str], alphabet: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a text into examples for next-character prediction, without its remainder."""
    index = {character: token for token, character in enumerate(alphabet)}
    tokens = np.array([index[character] for line in lines for character in line], np.int32)
    examples = (len(tokens) - 1) // length
    cut = tokens[: examples * length + 1]
    return cut[:-1].reshape(examples, length), cut[1:].reshape(examples, length)
