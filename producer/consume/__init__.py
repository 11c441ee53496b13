"""Reads the topics: decodes messages, audits event numbers, and formats events as text.

Every message is untrusted: only records of our schemas are decoded, within bounds.
"""
