"""Causal language models and tokenizers from Transformers without a network, and log-probabilities of any model."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from traceback import walk_tb
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.integrations.in_forward import LossInForward, LossOfPairs, Sealed, logps_of

PAD, EOS = "<pad>", "</s>"
LOADERS = {"from_pretrained", "create_model_from_path"}  # Transformers' and TRL's


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


def pad_token_id(tokenizer: Any) -> int:
    """What to pad with; padding is masked, so any id serves where the tokenizer names none."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


# -- from a causal language model to sequence log-probabilities ----------------------------------------------------

SCALE_FIELDS = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")  # of a model's config


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """
    Raises:
        ValueError: the model called ``name`` could not be loaded, which its readers say in many ways, often without it.
    """
    try:
        yield
    except Exception as error:
        if LOADERS.isdisjoint(frame.f_code.co_name for frame, _ in walk_tb(error.__traceback__)):
            raise
        raise ValueError(f"model {name!r} cannot be loaded: {' '.join(str(error).split()) or repr(error)}") from error


@dataclass(frozen=True)
class Head:
    """What a model makes of ``z = scale * (hidden @ weight.T + bias)``: z, or ``softcap * tanh(z / softcap)``.

    ``find_head`` looks at what a model does rather than at its name.
    """

    scale: float = 1.0
    softcap: float | None = None

    def of(self, z: Tensor) -> Tensor:
        z = self.scale * z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class HiddenAndHead(NamedTuple):
    """All that logits are made of; ``weight`` is the embedding itself where a model ties them."""

    hidden: Tensor  # (S, T, D), row t predicts token t + 1
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    head: Head


def check_causal(model: Any) -> None:
    """
    Raises:
        ValueError: the model is an encoder-decoder, or has no language-model head.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a causal (decoder-only) language model, got {name}, an encoder-decoder")
    if model.get_output_embeddings() is None:
        raise ValueError(f"model must have a language-model head, got {name}: load it with AutoModelForCausalLM")


@torch.no_grad()
def find_head(model: Any) -> Head:
    """How ``model`` turns its last hidden states into logits, found by one forward on two tokens.

    The head's output is replaced by known numbers, and what the model makes of them is compared with what its config's
    scale and softcap would. Call it before the model is wrapped or sharded.

    Raises:
        ValueError: no causal language model. NotImplementedError: its logits are made in another way.

    Example:
        >>> find_head(small_llama(300, hidden_size=32, num_layers=1, max_length=8, pad_id=0))
        Head(scale=1.0, softcap=None)
    """
    check_causal(model)
    with _left_sharded(model):
        return _found_head(model)


def _found_head(model: Any) -> Head:
    name, layer = type(model).__name__, model.get_output_embeddings()
    # Not an adapter around a matrix: it has a weight, too, and gives the same while it is untrained.
    is_matrix = isinstance(layer, torch.nn.Linear) and layer.weight.is_floating_point() and layer.weight.dim() == 2
    if not is_matrix or layer.weight.is_meta:
        raise NotImplementedError(f"the head of {name} is no plain matrix in memory: use the logits path")
    known = torch.linspace(-60, 60, layer.weight.shape[0], device=layer.weight.device, dtype=layer.weight.dtype)
    seen: list[tuple[Tensor, Tensor]] = []

    def replace(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append((inputs[0], output))
        return known.expand_as(output)

    ids = torch.zeros(1, 2, dtype=torch.long, device=layer.weight.device)
    was_training, handle = model.training, layer.register_forward_hook(replace)
    try:
        model.eval()
        logits = model(input_ids=ids, use_cache=False).logits[0, -1].double()
        handle.remove()
        hidden = _last_hidden_states(model, _plain_forward(model), {"input_ids": ids})
    except Exception as error:
        raise NotImplementedError(f"{name} cannot be tried on two tokens ({error!r}): use the logits path") from error
    finally:
        handle.remove()
        model.train(was_training)
    if len(seen) != 1 or seen[0][0].dtype != hidden.dtype or not torch.equal(seen[0][0], hidden):
        raise NotImplementedError(f"the head of {name} does not read its last hidden states: use the logits path")
    if not torch.equal(seen[0][1], torch.nn.functional.linear(hidden, layer.weight, layer.bias)):
        raise NotImplementedError(f"the head of {name} is more than its matrix: use the logits path")
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    stated = [float(value) for field in SCALE_FIELDS if (value := getattr(config, field, None))]
    tolerance = 60 * 4 * torch.finfo(layer.weight.dtype).eps
    for scale in [1.0, *stated, *(1 / value for value in stated)]:
        head = Head(scale, softcap)
        if torch.allclose(head.of(known.double()), logits, rtol=tolerance, atol=tolerance):
            return head
    raise NotImplementedError(f"{name} changes its logits in a way that its config does not say: use the logits path")


@contextlib.contextmanager
def _left_sharded(model: Any) -> Iterator[None]:
    """A forward without a backward leaves the parameters of FSDP2's root whole: an optimizer that is made after it
    would hold these in place of the shards, and train nothing of the embeddings and the head, without an error."""
    try:
        yield
    finally:
        fsdp2 = sys.modules.get("torch.distributed.fsdp")  # where nobody imported it, nothing is sharded by it
        for module in model.modules():
            if fsdp2 is not None and isinstance(module, fsdp2.FSDPModule):
                module.reshard()


def head_or_none(model: Any) -> Head | None:
    """`find_head`, and None for a model that must take the logits path."""
    try:
        return find_head(model)
    except NotImplementedError:
        return None


@torch.no_grad()
def has_balancing_loss(model: Any) -> bool:
    """Whether a model with experts computes their balancing loss, found by one forward on two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    with _left_sharded(model):
        outputs = model(input_ids=ids, output_router_logits=True, use_cache=False)
    return getattr(outputs, "aux_loss", None) is not None


def hidden_and_head(model: Any, head: Head, **inputs: Any) -> HiddenAndHead:
    """The last hidden states of a batch and the head's parameters, without logits.

    Args:
        model: a causal language model of Transformers (inside a PEFT model: its base model).
        head: what `find_head` found.
        inputs: input_ids, attention_mask and whatever else the model takes, without labels.

    Example:
        >>> model = small_llama(300, hidden_size=32, num_layers=1, max_length=8, pad_id=0)
        >>> rows = hidden_and_head(model, find_head(model), input_ids=torch.tensor([[5, 6, 7]]))
        >>> rows.hidden.shape, rows.weight is model.model.embed_tokens.weight
        (torch.Size([1, 3, 32]), True)
    """
    return _with_head(model, head, _last_hidden_states(model, _plain_forward(model), inputs))


def _with_head(model: Any, head: Head, hidden: Tensor) -> HiddenAndHead:
    layer = model.get_output_embeddings()
    return HiddenAndHead(hidden, layer.weight, getattr(layer, "bias", None), head)


def _last_hidden_states(model: Any, forward: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    inputs = {"use_cache": False, **inputs}
    has_images = any(name.startswith("pixel_") and value is not None for name, value in inputs.items())
    if model.base_model is not model and not has_images:
        return model.base_model(**inputs).last_hidden_state
    # Images may be met outside its base; Llama 4's parts have other names.
    return _run_without_head(model, forward, inputs)[0]


def _run_without_head(model: Any, forward: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """(the head's input, the outputs) of ``forward``, in which the head gives one column in place of logits."""
    layer, kept = model.get_output_embeddings(), []

    def keep(hidden: Tensor) -> Tensor:
        kept.append(hidden)
        return hidden[..., :1]

    replaced = layer.__dict__.get("forward")
    layer.forward = keep
    try:
        outputs = forward(model, **inputs)
    finally:
        del layer.forward
        if replaced is not None:
            layer.forward = replaced
    return kept[0], outputs


def add_sequence_logps(
    model: Any,
    head: Head | None,
    *,
    shift_labels: bool = True,
    backend: str = "auto",
    max_extra_bytes: int | str = "auto",
) -> None:
    """Let ``model(..., labels=labels, sequence_logps=True)`` return (S,) log-probabilities of the labels, and
    ``model(..., labels=labels, loss_of_pairs=LossOfPairs(...))`` the group-robust loss, a `LossInForward`.

    They are computed inside the model's forward, so that wrappers (DDP, FSDP, PEFT, autocast) see one forward and
    gather and synchronise what they must. Without these the forward is as before. Beside ``sequence_logps`` it takes
    ``token_weights``, as `sequence_logps` does, ``return_metrics=True``, which makes it return (logps, `TokenMetrics`)
    from the same pass, and ``sealed=True``: what it returns comes `Sealed`, where FSDP's mixed precision would round it
    (and without a gradient under FSDP). With ``output_router_logits=True`` a model with experts returns their balancing
    loss, too, as the last of the tuple; see `has_balancing_loss`.

    Args:
        model: a causal language model, before it is wrapped. Once is enough; again changes the options.
        head: what `find_head` found, for the linear path; None for the logits path.
        shift_labels: True for labels as Transformers has them, a copy of input_ids with -100 where nothing counts: they
            are shifted here, so that position t predicts ``labels[:, t + 1]``. False where ``labels[:, t]`` is what
            position t is to predict, as `sequence_logps` has it by default. A loss of pairs has an option of its own.
        backend, max_extra_bytes: of `linear_sequence_logps` or `sequence_logps`; a loss of pairs has its own.

    Example:
        >>> model = small_llama(300, hidden_size=32, num_layers=1, max_length=8, pad_id=0)
        >>> add_sequence_logps(model, find_head(model))
        >>> ids = torch.tensor([[5, 6, 7], [5, 8, 9]])
        >>> model(input_ids=ids, labels=ids, sequence_logps=True).shape
        torch.Size([2])
        >>> import grpo_kernels as gk
        >>> groups = gk.GroupWeights(num_groups=1, estimator="group_mean", step_size=0.1)
        >>> loss_fn = gk.LinearGroupRobustLoss(groups, shift_labels=True, reference_free=True)
        >>> found = model(input_ids=ids, labels=ids, loss_of_pairs=LossOfPairs(loss_fn, torch.tensor([0])))
        >>> found.output.pair_losses.shape
        torch.Size([1])
    """
    check_causal(model)
    plain_forward = _plain_forward(model)
    options: dict[str, Any] = {"shift_labels": shift_labels, "backend": backend}

    @functools.wraps(plain_forward)
    def forward(
        self: Any,
        *args: Any,
        sequence_logps: bool = False,
        sealed: bool = False,
        loss_of_pairs: LossOfPairs | None = None,
        **kwargs: Any,
    ) -> Any:
        if not sequence_logps and loss_of_pairs is None:
            return plain_forward(self, *args, **kwargs)
        labels, token_weights = kwargs.pop("labels"), kwargs.pop("token_weights", None)
        with_metrics = kwargs.pop("return_metrics", False)
        # Not model.forward, which may be this one in another's autocast by now: that must not be entered again.
        rows, aux_loss = _rows_and_balancing_loss(self, plain_forward, head, args, {"use_cache": False, **kwargs})
        if loss_of_pairs is not None:
            of_pairs = loss_of_pairs.of(rows, labels)
            return LossInForward(of_pairs[0].loss, aux_loss, Sealed(of_pairs))
        of_linear = {"max_extra_bytes": max_extra_bytes}
        found = logps_of(rows, labels, with_metrics, of_linear, token_weights=token_weights, **options)
        if aux_loss is not None:
            found = (*found, aux_loss) if isinstance(found, tuple) else (found, aux_loss)
        return Sealed(found) if sealed else found

    forward.plain_forward = plain_forward  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)  # a method, so that copy.deepcopy binds the copy's to the copy


def _rows_and_balancing_loss(
    model: Any, forward: Callable[..., Any], head: Head | None, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[Tensor | HiddenAndHead, Tensor | None]:
    """(logits, or what they are made of; the experts' balancing loss where ``output_router_logits`` asks for it)."""
    asked = inputs.get("output_router_logits")
    rows: Tensor | HiddenAndHead
    if head is None:
        outputs = forward(model, *args, **inputs)
        rows = outputs.logits
    elif asked:
        hidden, outputs = _run_without_head(model, forward, inputs)
        rows = _with_head(model, head, hidden)
    else:
        return _with_head(model, head, _last_hidden_states(model, forward, inputs)), None
    if not asked:
        return rows, None
    aux_loss = getattr(outputs, "aux_loss", None)
    if aux_loss is None:
        raise NotImplementedError(f"{type(model).__name__} computes no balancing loss of its experts")
    return rows, aux_loss


def _plain_forward(model: Any) -> Callable[..., Any]:
    """The forward without what `add_sequence_logps` has put around it; takes the model first."""
    return getattr(model.forward, "plain_forward", None) or _unbound(model.forward)


def _unbound(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The function that takes the model first, also where another library has put a plain function in the model."""
    return getattr(forward, "__func__", None) or (lambda _, *args, **kwargs: forward(*args, **kwargs))
