"""Reading the topics back: messages to records, and records to audits and lines of text.

Every message is untrusted: only records with our schemas are decoded, within bounds.
"""
