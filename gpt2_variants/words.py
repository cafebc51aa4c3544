"""Numbers with their nouns."""


def counted(number: int, noun: str) -> str:
    """`number` and `noun`, whose plural ends in s: "1 GPU", "2 GPUs", "1,024 GPUs"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
