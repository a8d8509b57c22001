"""A GGUF file as transformers sees it: config, names of the weights, tokenizer.

transformers knows most of this; where its reading of a config is incomplete (Gemma 3: rotary bases,
scaling, pattern of layers, scale of the attention; Gemma 2: soft caps and that scale; Qwen 3: head size; Llama 3:
stretched frequencies), the metadata fill it in as llama.cpp reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    Gemma2TensorProcessor,
    LlamaTensorProcessor,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from unicorn_backend.errors import CheckpointError
from unicorn_backend.formats.gguf import GgufHeader, GgufTensor, read_header
from unicorn_backend.formats.gguf_metadata import ROPE_FREQS, WIDE, rotary_of
from unicorn_backend.formats.nonsense import NONSENSE

__all__ = ["dtype_of", "named_tensors", "read_config", "read_header", "write_tokenizer"]

_SUPPORTED = (TensorProcessor, Gemma2TensorProcessor, LlamaTensorProcessor)
# Not weights of the model: rotary tables that llama.cpp stores.
_IGNORED = (ROPE_FREQS, "rope_factors_long.weight", "rope_factors_short.weight")


def read_config(header: GgufHeader) -> Any:
    """The transformers config that the metadata describe."""
    path = header.path
    fields = _fields(path, header.architecture)
    layers = _number(fields.get("block_count"), "block_count", header)
    if layers > len(header.tensors):
        raise CheckpointError(f"{path}: block_count is {layers}, with {len(header.tensors)} tensors in the file")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except NONSENSE as error:
        raise CheckpointError(f"{path}: transformers cannot read a config from its metadata: {error}") from error
    if header.architecture == "gemma3":
        return _gemma3(config, header)
    if "attention.key_length" in fields and hasattr(config, "head_dim"):
        config.head_dim = _number(fields["attention.key_length"], "attention.key_length", header)
    if header.architecture == "gemma2":
        _complete_gemma2(config, fields)
    for key, part in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_up")):
        if hasattr(config, key):
            setattr(config, key, f"blk.0.{part}.bias" in header.tensors)
    _complete_rotary(config, fields, header)
    return config


def _complete_gemma2(config: Any, fields: Mapping[str, Any]) -> None:
    """As llama.cpp reads it (src/models/gemma2.cpp)."""
    wide = config.num_hidden_layers == WIDE["gemma2"]
    config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if wide else config.head_dim
    config.attn_logit_softcapping = fields.get("attn_logit_softcapping", 50.0)
    config.final_logit_softcapping = fields.get("final_logit_softcapping", 30.0)


def _complete_rotary(config: Any, fields: Mapping[str, Any], header: GgufHeader) -> None:
    """How positions are stretched, which transformers does not read. CheckpointError for what cannot be told."""
    if header.architecture == "llama" and hasattr(config, "sliding_window"):
        config.sliding_window = None  # of a file called Mistral; transformers' default is that of the first one
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return
    kind, stored = fields.get("rope.scaling.type", "none"), header.tensors.get(ROPE_FREQS)
    if kind == "linear":
        config.rope_parameters = rope | {"rope_type": "linear", "factor": float(fields["rope.scaling.factor"])}
    found = rotary_of(stored.read(), rope["rope_theta"]) if stored is not None else rope
    if found is None or kind not in ("none", "linear") or "rope_factors_long.weight" in header.tensors:
        raise CheckpointError(
            f"{header.path}: its rotary embedding is scaled in a way that is not read from a GGUF file "
            f"(rope.scaling.type {kind!r}); put the model's config.json beside it"
        )
    if stored is not None:
        config.rope_parameters = found


def _gemma3(config: Any, header: GgufHeader) -> Any:
    """As llama.cpp reads it (src/models/gemma3.cpp)."""
    fields = _fields(header.path, "gemma3")
    settings = config.to_dict()
    pattern = fields.get("attention.sliding_window_pattern", 6)
    full = {"rope_type": "default", "rope_theta": float(fields.get("rope.freq_base", 1e6))}
    if fields.get("rope.scaling.type") == "linear":
        full |= {"rope_type": "linear", "factor": float(fields["rope.scaling.factor"])}
    local = {"rope_type": "default", "rope_theta": float(fields.get("rope.freq_base_swa", 1e4))}
    wide = config.num_hidden_layers == WIDE["gemma3"]
    settings |= {
        "layer_types": _layer_types(pattern, config.num_hidden_layers, header),
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "query_pre_attn_scalar": config.hidden_size // config.num_attention_heads if wide else config.head_dim,
        "final_logit_softcapping": fields.get("final_logit_softcapping"),
        "architectures": ["Gemma3ForCausalLM"],
    }
    return type(config).from_dict(settings)


def _layer_types(pattern: Any, layers: int, header: GgufHeader) -> list[str]:
    """pattern: every so many layers attend to everything, or a flag per layer that says "sliding"."""
    if isinstance(pattern, int) and pattern > 0:
        sliding = [(i + 1) % pattern != 0 for i in range(layers)]
    elif isinstance(pattern, list) and len(pattern) == layers:
        sliding = [bool(flag) for flag in pattern]
    else:
        raise CheckpointError(f"{header.path}: attention.sliding_window_pattern is {pattern!r} for {layers} layers")
    return ["sliding_attention" if flag else "full_attention" for flag in sliding]


def named_tensors(header: GgufHeader, config: Any) -> Mapping[str, GgufTensor]:
    """The tensors under their names in transformers. CheckpointError for one that the model does not have."""
    from unicorn_backend.quantize.skeleton import empty_model

    kind = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
    if kind not in _SUPPORTED:
        raise CheckpointError(f"{header.path}: architecture {header.architecture!r} is not supported")
    try:
        model = empty_model(config, torch.bfloat16)
        names = get_gguf_hf_weights_map(model, kind(config=config.to_dict()), header.architecture)
    except NONSENSE as error:
        raise CheckpointError(f"{header.path}: its metadata describe no model: {error}") from error
    found = {}
    for name, tensor in header.tensors.items():
        if name in _IGNORED:
            continue
        if name not in names:
            raise CheckpointError(f"{header.path}: tensor {name!r} belongs to no weight of {type(model).__name__}")
        offset = -1.0 if kind is Gemma2TensorProcessor and "norm.weight" in name else 0.0
        order = _rotary_order(name, tensor, config) if kind is LlamaTensorProcessor else None
        renamed = names[name]
        found[renamed] = dataclasses.replace(tensor, name=renamed, offset_values=offset, row_order=order)
    return found


def _rotary_order(name: str, tensor: GgufTensor, config: Any) -> torch.Tensor | None:
    """llama.cpp interleaves the two halves of each head of q and k; this undoes it."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return None
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    rows = torch.arange(tensor.shape[0])
    if len(rows) % (2 * heads):
        raise CheckpointError(f"{tensor.file}: tensor {name!r} has {len(rows)} rows, no {heads} heads of two halves")
    return rows.view(heads, -1, 2).transpose(1, 2).reshape(-1)


def dtype_of(header: GgufHeader) -> torch.dtype:
    """Dtype of the model: that of its matrices if they are all fp32, else bf16 (Gemma overflows in fp16)."""
    kinds = {tensor.type for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return torch.float32 if kinds == {GGMLQuantizationType.F32} else torch.bfloat16


def write_tokenizer(path: Path, folder: Path) -> None:
    """The tokenizer inside a GGUF file, as transformers reads it, and the ids that end a text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except NONSENSE as error:
        raise CheckpointError(f"{path}: transformers cannot read its tokenizer: {error}") from error
    tokenizer.save_pretrained(folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)


def _fields(path: Path, architecture: str) -> dict[str, Any]:
    """Metadata of the architecture, without its prefix."""
    prefix = f"{architecture}."
    fields = GGUFReader(path).fields
    return {key.removeprefix(prefix): field.contents() for key, field in fields.items() if key.startswith(prefix)}


def _number(value: Any, name: str, header: GgufHeader) -> int:
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{header.path}: {header.architecture}.{name} is {value!r}")
    return value
