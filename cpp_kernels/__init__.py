"""C sources of the tensor types and the patches that hook them into llama.cpp; installed as data, see README.md."""
