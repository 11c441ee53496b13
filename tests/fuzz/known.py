"""Findings that are not fixed yet, one line each. The fix deletes the line.

An example whose error has such a signature is counted, and is no finding.
"""

KNOWN: dict[str, str] = {}
"""By target and signature: an example, and what happens."""
