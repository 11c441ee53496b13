"""`python -m producer` is the command `rebpf`."""

from producer.cli.main import main

main()
