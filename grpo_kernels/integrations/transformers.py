"""Causal language models and tokenizers from Transformers, made or loaded without a network."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAD, EOS = "<pad>", "</s>"


def require() -> Any:
    """The transformers module, or an error that names the extra to install."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("this needs transformers and tokenizers: pip install 'grpo-kernels[train]'") from error
    transformers.utils.logging.disable_progress_bar()  # `train` has its own
    return transformers


def byte_level_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer learned from ``texts``; any UTF-8 text encodes. At least 256 bytes + 2 specials."""
    transformers = require()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def small_llama(vocab_size: int, *, hidden_size: int, num_layers: int, max_length: int, pad_id: int) -> Any:
    """A Llama with random weights from torch's current seed."""
    transformers = require()
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // 32),
        num_key_value_heads=max(1, hidden_size // 32),
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=pad_id,
    )
    return transformers.LlamaForCausalLM(config)


def load_local(directory: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a directory written by ``save_pretrained``; nothing is downloaded.

    Raises:
        ValueError: it is no directory, or its tokenizer has no end-of-sequence token.
    """
    transformers = require()
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"model must be a local directory, got {str(directory)!r}")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {str(directory)!r} must have an end-of-sequence token, it has none")
    return model, tokenizer


def pad_token_id(tokenizer: Any) -> int:
    """What to pad with; padding is masked, so any id serves where the tokenizer names none."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
