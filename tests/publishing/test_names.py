"""Names that programs find files by: held to what llama.cpp's source and the hub look for."""

from __future__ import annotations

import re

import gguf
import pytest
from small_gguf import small_gguf

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.gguf_files.inspection import inspect
from tesseraq_gguf.publishing.names import base_name, check_names, read_tag, resolved, stem_of, tag_of
from tesseraq_gguf.runtime import ensure_source
from tesseraq_gguf.types.facts import TENSOR_TYPES
from tesseraq_gguf.types.mixes import MIXES

LEARNED = [t.name for t in TENSOR_TYPES.values() if t.family or t.is_float]


def _tag(path):
    return tag_of(open_gguf(path), inspect(path))


def _labels():
    """What the hub looks for in names: file types of llama.cpp."""
    names = [re.sub("^(MOSTLY|ALL)_", "", kind.name) for kind in gguf.LlamaFileType] + [name.upper() for name in MIXES]
    return re.compile("|".join(sorted(names, key=len, reverse=True)))


def test_llama_cpp_looks_for_tags_as_we_do():
    source = (ensure_source().llama_cpp / "common" / "download.cpp").read_text(encoding="utf-8")
    assert 're_tag("[-.]([A-Z0-9_]+)$", std::regex::icase)' in source
    assert 'std::regex pattern(t + "[.-]", std::regex::icase)' in source


@pytest.mark.parametrize("type", LEARNED)
def test_every_type_has_a_tag_that_is_found(type, tmp_path):
    tag = _tag(small_gguf(tmp_path / "m.gguf", type))
    name = f"Model-1B-{tag}.gguf"
    listed = re.search(r"[-.]([A-Z0-9_]+)$", name.removesuffix(".gguf"), re.IGNORECASE)
    assert listed
    assert listed[1] == tag
    assert resolved(tag, [name, "Model-1B-Q8_K_OTHER.gguf"]) == [name]
    assert read_tag(tag) == tag
    label = _labels().search(name)
    if TENSOR_TYPES[type].custom:
        assert label is None  # the hub takes it for no other type
        assert tag == type.upper()
    else:
        assert label
        assert tag.startswith(label[0])


def test_tags_of_all_types_are_told_apart():
    tags = [name.upper() for name in LEARNED]
    names = {tag: f"M-{tag}.gguf" for tag in tags}
    clash = {tag for tag in tags if resolved(tag, list(names.values())) != [names[tag]]}
    assert clash == {"F16"}  # a part of BF16


def test_bits_are_named_where_types_were_chosen(tmp_path):
    command = "tesseraq-gguf convert M out.gguf --target-bpw 2.75"
    assert _tag(small_gguf(tmp_path / "m.gguf", "tsq2", tesseraq__command=command)) == "TSQ2_2_25BPW"
    assert _tag(small_gguf(tmp_path / "m.gguf", "tsq2", tesseraq__command="convert M o --type tsq2")) == "TSQ2"


def test_a_file_without_a_known_file_type_is_named_by_its_tensors(tmp_path):
    assert _tag(small_gguf(tmp_path / "m.gguf", "q4_0", general__file_type=9999)) == "Q4_0"
    assert _tag(small_gguf(tmp_path / "m.gguf", "q4_0", general__file_type=1024 + 15)) == "Q4_K_M"


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"general__basename": "SmolLM2", "general__size_label": "135M", "general__finetune": "It"}, "SmolLM2-135M-It"),
        ({"general__name": "Qwen3 0.6B Instruct v2"}, "Qwen3-0.6B-Instruct-v2"),
        ({"general__name": "gemma-3-270m"}, "gemma-3-270M"),
        ({"general__name": "Some one's / Model: \x1b 7B"}, "Some-one-s-Model-7B"),
        ({}, "file-of-mine"),
        ({"general__name": "…"}, "model"),
    ],
)  # fmt: skip
def test_names_begin_with_what_a_file_says_of_its_model(said, name, tmp_path):
    assert base_name(open_gguf(small_gguf(tmp_path / "file-of-mine.gguf", "q4_0", **said))) == name


def test_what_images_go_through_is_recognised(tmp_path):
    path = small_gguf(tmp_path / "p.gguf", "f16", general__architecture="clip")
    assert stem_of("M", "F16", inspect(path)) == "mmproj-M-F16"


def test_names_of_which_one_would_be_taken_for_another(tmp_path):
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    check_names({one: "M-Q2_K", other: "M-TSQ2"}, {one: "Q2_K", other: "TSQ2"})
    with pytest.raises(UsageError, match=r"Q2_K means both: give one another tag, such as --tag one\.gguf=Q2_K_OWN"):
        check_names({one: "M-Q2_K", other: "M-Q2_K"}, {one: "Q2_K", other: "Q2_K"})
    with pytest.raises(UsageError, match="F16 means both"):
        check_names({one: "M-F16", other: "M-BF16"}, {one: "F16", other: "BF16"})
    for wrong in ("Q2-K", "", "Q2 K", "Q2.K"):
        with pytest.raises(UsageError, match="must be of letters, digits and underscores"):
            read_tag(wrong)
