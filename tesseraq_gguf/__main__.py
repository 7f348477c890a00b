"""`python -m tesseraq_gguf` is the command line."""

from tesseraq_gguf.cli import main

main()
