"""`python -m tesseraq_gguf` is the command line."""

from tesseraq_gguf.cli.app import main

main()
