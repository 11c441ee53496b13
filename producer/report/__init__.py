"""The report: what was retransmitted in a period, where and why, as HTML and PNG.

Needs the extra `rebpf[report]`. It may import export and what is below.
"""
