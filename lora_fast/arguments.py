"""What the commands' arguments are made of."""

import argparse


def whole_number(text: str) -> int:
    """An integer of 1 or more; argparse.ArgumentTypeError for any other text."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of 1 or more")
    return int(text)
