"""Models: where their files are (`source`), and their decoder blocks, loaded one at a time (`decoder`)."""

from tesseraq_gguf.models.decoder import Decoder, LoadedBlock
from tesseraq_gguf.models.source import ModelSource, resolve_model

__all__ = ["Decoder", "LoadedBlock", "ModelSource", "resolve_model"]
