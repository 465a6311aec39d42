"""What a task takes: computing, and bytes over whatever leads to the model and the store."""

from dataclasses import dataclass

# What is read of a block, and which part of it; costs say "own" of what a job's units have.
File = tuple[str, str]


@dataclass(frozen=True)
class Cost:
    """What a task takes.

    Attributes:
        seconds: of computing, and of what each file takes however small it is.
        read, written: bytes, over whatever leads to the model and the store.
        files: what others may read too, and how many of the bytes read it is.
        ahead: bytes of those read that are read while the worker computes.
    """

    seconds: float = 0.0
    read: float = 0.0
    written: float = 0.0
    files: tuple[tuple[File, float], ...] = ()
    ahead: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.seconds + other.seconds,
            self.read + other.read,
            self.written + other.written,
            self.files + other.files,
            self.ahead + other.ahead,
        )

    def computing(self, reading: float) -> float:
        """Seconds of computing that are left when reading, which took so long, is over."""
        share = self.ahead / self.read if self.read else 0.0
        return max(0.0, self.seconds - share * reading)
