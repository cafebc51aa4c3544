"""What every tracker does."""

from typing import Any, Protocol


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, record: dict[str, Any]) -> None:
        """Take one record; "step" is among its keys."""

    def close(self) -> None:
        """No more records."""
