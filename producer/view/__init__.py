"""What `rebpf top` and `rebpf trace` show: sources of records, filters, aggregation, and the text on the screen.

Records of this host, of the topics and of files are decoded in the same way, so all views and filters take any of them.
"""
