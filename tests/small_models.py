"""Every causal architecture of Transformers, as small as it can be built: ``model_of(name)``."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'grpo-kernels[train]'"
)
NAMES: dict[str, str] = importlib.import_module(
    "transformers.models.auto.modeling_auto"
).MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Set where a config has such a field; in each family's own words.
SIXTEEN = ("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "moe_intermediate_size", "embedding_size")
SIXTEEN += ("shared_expert_intermediate_size", "hidden_dim", "moe_shared_expert_intermediate_size", "sliding_window")
EIGHT = ("head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
TWO = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "n_layer", "n_layers", "n_head", "n_heads")
TWO += ("num_layers", "num_heads", "decoder_layers", "decoder_attention_heads", "encoder_layers", "num_experts_per_tok")
TWO += ("encoder_attention_heads", "top_k_experts")
FOUR = ("num_local_experts", "num_experts", "n_routed_experts")
SMALL = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "first_k_dense_replace": 1}
SMALL |= {"n_group": 1, "topk_group": 1, "max_position_embeddings": 64, "n_positions": 64}
SMALL |= dict.fromkeys(SIXTEEN, 16) | dict.fromkeys(EIGHT, 8) | dict.fromkeys(TWO, 2) | dict.fromkeys(FOUR, 4)
SMALL |= dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 24)
FIELDS: dict[str, dict[str, Any]] = {  # what a family needs beside
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "mamba2": {"num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 32},
    "zaya": {"num_experts_per_tok": 1},
    "nemotron": {"num_key_value_heads": 2},
    "ministral": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "deepseek_v2": {"topk_method": "greedy", "n_group": None, "topk_group": None, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 60,
        "layer_types": ["full_attention"] * 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "prophetnet": {"num_encoder_layers": 1, "num_decoder_layers": 1},
    "reformer": {"axial_pos_embds": False, "num_hashes": 1, "attn_layers": ["local", "local"]},
}
LARGEST = 3_000_000  # parameters


def small_config(name: str) -> Any:
    """The config of a model type; what can't be set is left as it is."""
    model_class = class_of(name)
    usual = model_class.config_class()
    options = {
        field: value
        for field, value in SMALL.items()
        if getattr(usual, field, None) is not None and not _is_computed(usual, field)
    }
    for field in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = getattr(usual, field, None)
        if isinstance(kinds, list) and len(kinds) > 1 and not _is_computed(usual, field):
            options[field] = (list(dict.fromkeys(kinds)) * 2)[:2]  # a layer of each of two kinds
    if hasattr(usual, "is_decoder"):
        options["is_decoder"] = True
    options |= FIELDS.get(name, {})
    if "num_decoder_layers" in options:  # ProphetNet counts them apart
        options.pop("num_hidden_layers", None)
    return model_class.config_class(**options)


def class_of(name: str) -> Any:
    class_name = NAMES[name]
    return getattr(transformers, class_name if isinstance(class_name, str) else class_name[0])


def _is_computed(config: Any, field: str) -> bool:
    found = getattr(type(config), config.attribute_map.get(field, field), None)
    return isinstance(found, property) and found.fset is None


def model_of(name: str) -> Any:
    """In float32, evaluating, with weights as large as a trained model's.

    Raises whatever a config says that cannot be made so small.
    """
    config, model_class = small_config(name), class_of(name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{name} has {size} parameters")
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (4, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
