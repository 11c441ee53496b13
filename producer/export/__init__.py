"""Exports events as Arrow, Parquet and CSV, from topics, spool files and other Avro files.

Needs the extra `rebpf[report]`. Only the commands `export` and `report` and `import rebpf` use it. It may import view,
consume and what is below.
"""
