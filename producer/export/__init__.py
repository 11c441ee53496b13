"""Exports events as Arrow, Parquet and CSV, from topics, spool files and other Avro files.

Needs the extra `rebpf[report]`; nothing else imports it, but the commands `export` and `report`. It may import view,
consume and what is below.
"""
