"""Ask a GGUF file from Python, with llama-cpp-python's class on our libraries. Needs the runtime.

python examples/chat.py out.gguf "What is a violin?"
"""

from __future__ import annotations

import sys

from tesseraq_gguf.runtime import Llama


def main(file: str, question: str, max_tokens: int = 60) -> None:
    """Print the answer while it comes; the file's own chat template is used."""
    llama = Llama(file, n_ctx=1024, seed=7, verbose=False)
    messages = [{"role": "user", "content": question}]
    for piece in llama.create_chat_completion(messages, max_tokens=max_tokens, temperature=0.7, stream=True):
        print(piece["choices"][0]["delta"].get("content", ""), end="", flush=True)
    print()
    llama.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
