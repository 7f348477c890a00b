"""A file from a Hugging Face folder: all as its conversion class makes it, but for what was learned."""

from __future__ import annotations

from typing import Any

from tesseraq_gguf.converter.answers import Emit, note_fallbacks
from tesseraq_gguf.converter.deferred import array, packed
from tesseraq_gguf.converter.learned import LearnedTensors
from tesseraq_gguf.converter.plain_types import KEPT
from tesseraq_gguf.converter.plan import Plan
from tesseraq_gguf.converter.ranges import keep_within_range
from tesseraq_gguf.converter.upstream import Converter, feed
from tesseraq_gguf.types.facts import tensor_type


def from_folder(job: dict[str, Any], learned: LearnedTensors, plan: Plan | None, emit: Emit) -> Any:
    """Let the conversion class do all of it, except for what was learned and the types of the rest."""
    import gguf

    converter = Converter(job, job["type"])
    model = converter.model
    feed(job, converter, bool(learned.types))
    modify, force = model.modify_tensors, model.tensor_force_quant
    own = {converter.name(t.name): t for t in plan.tensors()} if plan else {}
    added = set[str]()
    changed = {converter.name(name): name for name in learned.vectors}

    def modify_tensors(data: Any, name: str, block: int | None) -> Any:
        if name in changed:
            return modify(learned.vector(changed[name]), name, block)
        if plan is None or name not in own:
            return modify(data, name, block)
        targets = dict.fromkeys(place.name for inside in own[name].pieces for place in plan.by_matrix[inside])
        for target in targets:
            if target not in added:  # a stack is added with its first layer
                places = plan.by_target[target]
                kind = gguf.GGMLQuantizationType(tensor_type(learned.types[places[0][0]]).id)
                model.gguf_writer.add_tensor(target, packed(learned, places), raw_dtype=kind)
                added.add(target)
        return []

    def tensor_force_quant(name: str, new_name: str, block: int | None, dimensions: int) -> Any:
        forced, asked = force(name, new_name, block, dimensions), job["types"].get(new_name)
        return gguf.GGMLQuantizationType(tensor_type(asked).id) if isinstance(forced, bool) and asked else forced

    model.modify_tensors, model.tensor_force_quant = modify_tensors, tensor_force_quant
    keep_within_range(model.gguf_writer)
    model.prepare_tensors()
    if plan is not None:
        for name, order in plan.orders(learned).items():
            model.gguf_writer.add_tensor(name, array(order), raw_dtype=gguf.GGMLQuantizationType.I32)
        for name, factors in plan.factors(learned).items():
            model.gguf_writer.add_tensor(name, array(factors), raw_dtype=gguf.GGMLQuantizationType.F32)
        model.ftype = gguf.LlamaFileType(tensor_type(learned.main_type()).file_type)
        written = [
            (name, gguf.GGMLQuantizationType(info.dtype).name.lower(), int(info.shape[-1]))
            for name, info in model.gguf_writer.tensors[0].items()
            if len(info.shape) > 1 and name.endswith(".weight") and not any(k in name for k in KEPT)
            if name not in plan.by_target
        ]
        note_fallbacks(written, emit)
    model.prepare_metadata(vocab_only=False)
    return model.gguf_writer
