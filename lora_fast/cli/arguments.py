"""What the commands' arguments are made of."""

import argparse

import torch


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


def working_device(text: str) -> torch.device:
    """A device on which a tensor can be made; argparse.ArgumentTypeError for any other text."""
    try:
        device = torch.device(text)
        torch.zeros((), device=device).item()
    except Exception as error:  # each backend has its own way to say that it is not there
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a device that works here ({error})") from error
    return device
