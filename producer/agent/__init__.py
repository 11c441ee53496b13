"""The producer: builds its parts from the configuration, runs the loop, reloads, and reports.

The only package that imports all the others. Only the command line imports it.
"""
