"""The kernel's TCP counters of a network namespace."""


def parse_counters(text: str) -> dict[str, int]:
    """Parse the pairs of lines (names, values) of the protocols Tcp and TcpExt."""
    lines = [line.split() for line in text.splitlines()]
    counters: dict[str, int] = {}
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        if names[0] in ("Tcp:", "TcpExt:"):
            counters.update(zip(names[1:], map(int, values[1:]), strict=True))
    return counters
