"""Findings in code that is about to be mended: one line each, to be deleted with the mending.

An example whose error has such a signature is counted, and is no finding.
"""

KNOWN: dict[str, str] = {}
"""By target and signature: an example, and what happens."""
