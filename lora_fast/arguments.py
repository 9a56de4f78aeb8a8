"""What the commands' arguments are made of."""

import argparse


def whole_number(text: str) -> int:
    """An integer of 1 or more; argparse.ArgumentTypeError for any other text."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of 1 or more")
    return int(text)


def whole_numbers(text: str) -> list[int]:
    """Different integers of 1 or more, separated by commas, in order; argparse.ArgumentTypeError for any other text."""
    words = text.split(",")
    if not all(word.isdecimal() and int(word) >= 1 for word in words) or len(set(map(int, words))) < len(words):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected different whole numbers of 1 or more, as in 1,2,4")
    return sorted(map(int, words))
