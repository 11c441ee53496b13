"""`python -m producer` is the command `rebpf`."""

from producer.cli import main

main()
