"""Parts of a model's forward pass: layers and head apart, and first layers that models share."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import numpy as np

from pruning_utils import models, runtime
from pruning_utils.engine import held_configurations, wrappers
from pruning_utils.engine.later import nn, torch

# float32 logits that are alive at a time: 128 MiB.
LOGITS_AT_ONCE = 2**25


@contextlib.contextmanager
def replaced(module: object, name: str, value: object) -> Iterator[None]:
    """Let an attribute of one object, or of a module of Python, be something else for a while."""
    before = {key: value for key, value in vars(module).items() if key == name}
    vars(module)[name] = value
    try:
        yield
    finally:
        del vars(module)[name]
        vars(module).update(before)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside; every module has its own mode back afterwards.

    Mixtures of experts do not collect the logits of their routers, which takes masks of a shape of
    its own, and layers that are run. Models return outputs with names. Attributes of modules that
    became tensors, such as the state of a recurrent layer, have their former values back.
    """
    with contextlib.ExitStack() as undo:
        undo.enter_context(named_outputs(model))
        for config in _configurations(model):
            if getattr(config, "output_router_logits", False):
                undo.enter_context(replaced(config, "output_router_logits", False))
        for module in model.modules():
            undo.callback(_give_back, module, dict(vars(module)))
            undo.callback(setattr, module, "training", module.training)
            # In evaluation mode 4-bit layers on a CPU pack their weights: they are slower then, and
            # cannot be trained afterwards.
            module.training = bool(getattr(module, "support_avx512bf16_for_cpu", False))
        yield


@contextlib.contextmanager
def named_outputs(model: nn.Module) -> Iterator[None]:
    """Outputs have names, although the configuration may ask for tuples."""
    with contextlib.ExitStack() as undo:
        for config in _configurations(model):
            if not getattr(config, "return_dict", True):
                undo.enter_context(replaced(config, "return_dict", True))
        yield


@contextlib.contextmanager
def fixed_draws() -> Iterator[None]:
    """What torch draws inside is the same each time.

    What it draws afterwards, on a CPU or on CUDA, is left alone.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


def _give_back(module: nn.Module, before: dict[str, Any]) -> None:
    """Give attributes that are tensors now, and were not these, what they had before, if any."""
    for name, value in list(vars(module).items()):
        if isinstance(value, torch.Tensor) and before.get(name) is not value:
            if name in before:
                setattr(module, name, before[name])
            else:
                delattr(module, name)


def _configurations(model: nn.Module) -> list[Any]:
    """A model's configuration, and that of its decoder where it has one of its own."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return []
    text = config.get_text_config(decoder=True)
    return [config] if text is config else [config, text]


@contextlib.contextmanager
def greedily(model: nn.Module) -> Iterator[None]:
    """Let a model write its likeliest tokens, whatever its own settings of generation say.

    They may hold a penalty for what is repeated, or beams, which would hide that it falls into
    loops.
    """
    from transformers import GenerationConfig

    ends = ("bos_token_id", "eos_token_id", "pad_token_id")
    own = model.generation_config
    plain = GenerationConfig(do_sample=False, **{name: getattr(own, name, None) for name in ends})
    with replaced(model, "generation_config", plain):
        yield


@contextlib.contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """No weight requires gradients inside; those that did do so again afterwards."""
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in trainable:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in trainable:
            weight.requires_grad_(True)


def run_backbone(
    model: nn.Module, batch: torch.Tensor, **inputs: object
) -> tuple[nn.Module | None, Any]:
    """Run the decoder layers on token ids ``(B, T)``, and not the head.

    Args:
        model: A causal language model, with adapters if need be.
        batch: Token ids of shape ``(B, T)``.
        **inputs: Further arguments of the model's forward.

    Returns:
        The module that the head is applied to, and its output, whose ``last_hidden_state`` has the
        shape ``(B, T, D)``; ``(None, None)`` where layers and head cannot be told apart.
    """
    causal = causal_model(model)
    if "logits_to_keep" not in inspect.signature(causal.forward).parameters:
        return None, None
    outputs = {}

    def keep(module: nn.Module, given: object, output: object) -> None:
        """Called after the forward of each candidate."""
        outputs[module] = output

    # Most models call their base model. OPT calls the decoder inside it, Llama 4 has it under
    # another name, and where it takes pictures, in a causal language model inside it.
    decoder = causal.get_decoder()
    candidates = (
        causal.base_model,
        decoder,
        getattr(causal, "model", causal),
        getattr(decoder, "model", causal),
    )
    with contextlib.ExitStack() as undo:
        for module in set(candidates) - {causal}:
            undo.enter_context(module.register_forward_hook(keep))
        # The head is applied afterwards, to what is asked for. For the last token of each row alone
        # it may cost five times what all layers do.
        head = model.get_output_embeddings()
        undo.enter_context(replaced(head, "forward", lambda states: states[..., :1]))
        model(batch, logits_to_keep=1, **{"use_cache": False, **inputs})
    for module in candidates:
        output = outputs.get(module)
        states = getattr(output, "last_hidden_state", None)
        if states is not None and states.shape[:2] == batch.shape:
            return module, output
    return None, None


def head_logits(
    model: nn.Module, backbone: nn.Module, output: Any, states: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Logits of final states, a few at a time, by the architecture's own code around the head.

    Args:
        model: The model that :func:`run_backbone` ran.
        backbone: The module that it returned.
        output: That module's output.
        states: Final states of shape ``(m, D)``.

    Yields:
        float32 logits of shape ``(n, V)`` of the next n states, at most :data:`LOGITS_AT_ONCE`.
    """
    n_tokens = max(1, LOGITS_AT_ONCE // wrappers.vocabulary_size(model))
    for part in states.split(n_tokens):
        known = type(output)(**{**output, "last_hidden_state": part[None]})
        with replaced(backbone, "forward", lambda *_, known=known, **__: known):
            tokens = torch.zeros(1, len(part), dtype=torch.long, device=part.device)
            yield model(tokens, use_cache=False).logits[0].float()


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes token ids: where its embedding lies, or is brought in to run.

    Of a model that has shapes but no values it is the device of such.
    """
    embedding = model.get_input_embeddings()
    if embedding.weight.device.type != "meta":
        return embedding.weight.device
    hooks = [hook for module in model.modules() for hook in _loading_hooks(module)]
    return torch.device(hooks[0].execution_device) if hooks else embedding.weight.device


def refuse_other_gpu(model: nn.Module) -> None:
    """Refuse to train a model on another GPU than the first, to which the Trainer would move it.

    Raises:
        ValueError: If its weights are on another.
    """
    device = input_device(model)
    if device.type == "cuda" and device.index:
        raise ValueError(
            f"the model must be on the first GPU that torch sees to be trained, got {device}: let "
            "CUDA_VISIBLE_DEVICES name that GPU alone"
        )


def refuse_wrong_numbers(model: nn.Module) -> None:
    """Refuse a model some of whose layers were removed without numbering the others anew.

    Raises:
        ValueError: If a layer bears a number that the cache has no place for.
    """
    try:
        layers = models.decoder_layers(model)
    except ValueError:
        return  # of what has no list of layers none was removed
    held_configurations.refuse_numbers_beyond(layers)


def refuse_missing_weights(
    model: nn.Module, *, offloaded: bool = True, with_head: bool = False
) -> None:
    """Refuse a model with weights that are not there: what is computed without them is no result.

    Args:
        model: The model that is to run.
        offloaded: Whether weights are taken that lie in main memory or on a disk until hooks of
            accelerate bring them in for a forward pass. Where the weights themselves are asked for,
            they are not.
        with_head: Whether it is to predict tokens, for which a backbone alone does not suffice.

    Raises:
        ValueError: If a parameter or buffer is on the device ``meta``; the first one is named. Also
            for what is no model, is inside something else, or lacks a head that is needed.
    """
    wrappers.refuse_wrapped(model, with_head=with_head)
    # Of each module, whether a hook on it or above it brings in all that it holds.
    brought: dict[str, bool] = {}
    for name, module in model.named_modules():
        hooks = _loading_hooks(module) if offloaded else []
        above = brought.get(name.rpartition(".")[0], False)
        brought[name] = above or any(hook.place_submodules for hook in hooks)
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        missing = [key for key, tensor in own if tensor.device.type == "meta"]
        if missing and not hooks and not brought[name]:
            raise ValueError(
                f"the model's weights must be in memory, but {name}.{missing[0]} is on the device "
                "meta: it was never loaded, or is offloaded; load the model onto one device"
            )


def _loading_hooks(module: nn.Module) -> list:
    """Hooks of accelerate that bring a module's weights in before its forward pass."""
    hook = getattr(module, "_hf_hook", None)
    return [part for part in getattr(hook, "hooks", [hook]) if getattr(part, "offload", False)]


def refuse_other_states(model: nn.Module, states: Sequence, input_ids: torch.Tensor) -> None:
    """Refuse what layers pass on where that is not one state for each token of the text.

    Some models put a prompt of their own before the text, others pass on several streams. The
    states at the places of the tokens are not those of the tokens then.

    Args:
        model: The model that has run, for the message.
        states: What its layers were given, or returned.
        input_ids: Token ids ``(B, T)``.

    Raises:
        ValueError: If one is no tensor of shape ``(B, T, D)``.
    """
    for state in states:
        shape = tuple(getattr(state, "shape", ()))
        if shape[:-1] != input_ids.shape:
            raise ValueError(
                f"the layers of {type(model).__name__} must pass on one state for each token, "
                f"(batch, seq_len) = {tuple(input_ids.shape)}, but theirs are of shape {shape}"
            )


def as_mask(mask: object, shape: torch.Size) -> torch.Tensor:
    """An attention mask as a tensor.

    Args:
        mask: 1 at real tokens and 0 at padding, or True and False: a tensor, or anything that NumPy
            makes an array of.
        shape: That of the token ids.

    Returns:
        int64 tensor of that shape on the CPU.

    Raises:
        ValueError: If the mask has another shape, or holds anything else.
    """
    allowed = f"attention_mask must hold 0 and 1 in the shape {tuple(shape)} of input_ids"
    try:
        # What torch does not take of NumPy's: other kinds, and arrays that run backwards.
        is_tensor = isinstance(mask, torch.Tensor)
        tensor = torch.as_tensor(mask if is_tensor else _as_floats(mask)).cpu()
        tensor = tensor.to_dense() if tensor.is_sparse else tensor
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{allowed}, got {type(mask).__name__}: {error}") from error
    if tensor.shape != shape or not bool(((tensor == 0) | (tensor == 1)).all()):
        raise ValueError(
            f"{allowed}, got shape {tuple(tensor.shape)}, values {tensor.unique().tolist()[:4]}"
        )
    return tensor.long()


def _as_floats(mask: object) -> np.ndarray:
    """float64 copy of what NumPy makes an array of; texts are no numbers."""
    array = np.array(mask)
    if array.dtype.kind not in "biufO":
        raise TypeError(f"its values are {array.dtype}")
    return array.astype(np.float64)


def causal_model(model: nn.Module) -> nn.Module:
    """The causal language model itself, which adapters wrap."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def states_in(output: Any) -> torch.Tensor:
    """The hidden states in what a layer returns: them alone, or the first of several parts."""
    return output[0] if isinstance(output, tuple | list) else output


def with_states(output: Any, states: torch.Tensor) -> Any:
    """What a layer returns, with other hidden states."""
    return (states, *output[1:]) if isinstance(output, tuple | list) else states


def joined_rows(outputs: Sequence[Any]) -> Any:
    """What a layer returns for all sequences, of what it returned for parts of them, in order.

    Some layers return more than their states for each sequence, and the next one takes it.
    """
    flat = [torch.utils._pytree.tree_flatten(output) for output in outputs]
    n_rows = [len(states_in(output)) for output in outputs]
    joined = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        lengths = [len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
        joined.append(torch.cat(leaves) if lengths == n_rows else leaves[0])
    return torch.utils._pytree.tree_unflatten(joined, flat[0][1])


def refuse_handed_on(arguments: tuple, before: Any, model: nn.Module) -> None:
    """Refuse layers that take more than states from the layer before, where a layer is to be left
    out.

    Args:
        arguments: All arguments of a layer but the states, nested as they are.
        before: What the layer before it returned; None: it is the first.
        model: The model, for the message.

    Raises:
        ValueError: If a tensor that was returned beside the states is among the arguments, or what
            an earlier layer has left for later ones.
    """
    beside = [*before[1:]] if isinstance(before, tuple | list) else []
    handed_on = {
        id(leaf)
        for leaf in torch.utils._pytree.tree_leaves(beside)
        if isinstance(leaf, torch.Tensor)
    }
    leaves = torch.utils._pytree.tree_leaves(arguments)
    if _holds_what_was_left(leaves) or any(id(leaf) in handed_on for leaf in leaves):
        raise ValueError(
            f"layers of {type(model).__name__} hand on more than their states, so that no layer "
            "can be left out within a pass: remove it with surgery.drop_layers, and measure the "
            "losses of what is left"
        )


def _holds_what_was_left(leaves: Sequence[object]) -> bool:
    """Whether a mapping among a layer's arguments has something in it.

    Gemma 3n, Gemma 4 and others hand one to all layers: some put their keys and values there, and
    later ones take them instead of their own.
    """
    return any(isinstance(leaf, MutableMapping) and len(leaf) > 0 for leaf in leaves)


def refuse_left_for_later(arguments: tuple, n_rows: int, batch_size: int, model: nn.Module) -> None:
    """Refuse to run a layer on a part of the sequences where layers leave something for later ones.

    What is left is that of the last part then, whichever part takes it.

    Args:
        arguments: All arguments of a layer but the states, nested as they are.
        n_rows: Number of all sequences.
        batch_size: Number of sequences in a part.
        model: The model, for the message.

    Raises:
        ValueError: If there are several parts, and a layer has left something.
    """
    if batch_size < n_rows and _holds_what_was_left(torch.utils._pytree.tree_leaves(arguments)):
        raise ValueError(
            f"layers of {type(model).__name__} take keys and values of earlier ones, so that all "
            f"samples must run at once: batch_size must be at least {n_rows}, got {batch_size}"
        )


def refuse_named_states(given: Sequence, model: nn.Module) -> None:
    """Refuse layers whose states are not their first argument.

    Raises:
        ValueError: If the model calls a layer without an argument that has no name.
    """
    if not given:
        raise ValueError(
            f"{type(model).__name__} must hand each layer one tensor of states as its first "
            "argument, but hands on several by name: its layers cannot be run apart"
        )


class Unclear(Exception):
    """A layer's argument may hold something for each sequence, or fit their number by chance."""


def arguments_alone(model: nn.Module, input_ids: torch.Tensor) -> list[list]:
    """For each layer the arguments beside the states, flat, that it gets for the first sequence."""
    found: list[list] = []

    def keep(layer: nn.Module, given: tuple, named: dict) -> None:
        """Called before the forward of each layer."""
        found.append(torch.utils._pytree.tree_leaves((given[1:], named)))

    with contextlib.ExitStack() as undo, evaluation_mode(model), torch.no_grad():
        for layer in models.decoder_layers(model):
            undo.enter_context(layer.register_forward_pre_hook(keep, with_kwargs=True))
        model(input_ids[:1], use_cache=False)
    return found


def arguments_of_rows(arguments: tuple, rows: slice, n_rows: int, alone: list | None) -> tuple:
    """A layer's arguments for some of the sequences that it was called with.

    Args:
        arguments: All arguments but the states, nested as they are.
        rows: The sequences that are wanted.
        n_rows: Number of all sequences.
        alone: The arguments for one sequence, from :func:`arguments_alone`. By their sizes those
            that hold something for each sequence are known. None: not looked at yet.

    Returns:
        The arguments, nested in the same way; those that hold something for each sequence are cut.

    Raises:
        Unclear: If ``alone`` is None and an argument may have to be cut.
    """
    leaves, structure = torch.utils._pytree.tree_flatten(arguments)
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
            continue
        if n_rows == 1 or len(leaf) % n_rows:
            continue
        if alone is None:
            raise Unclear
        # There may be several rows for each sequence, one for each head for instance.
        each = len(alone[place])
        if len(leaf) == n_rows * each:
            leaves[place] = leaf[rows.start * each : rows.stop * each]
    return torch.utils._pytree.tree_unflatten(leaves, structure)


def in_parts(
    model: nn.Module, own: Callable, n_rows: int, batch_size: int, alone: list | None
) -> Callable:
    """A layer's forward on a few rows at a time that keeps only its input for the way back.

    Args:
        model: The model, for messages.
        own: The layer's own forward.
        n_rows: Sequences that the layer is called with.
        batch_size: Sequences in a part.
        alone: What :func:`arguments_of_rows` needs to know of the layer.
    """

    def forward(*given: Any, **named: object) -> object:
        """The layer on each part, and its outputs joined."""
        refuse_named_states(given, model)
        states, *others = given
        outputs = []
        for start, part in zip(range(0, n_rows, batch_size), states.split(batch_size), strict=True):
            refuse_left_for_later((others, named), n_rows, batch_size, model)
            more, by_name = arguments_of_rows(
                (others, named), slice(start, start + len(part)), n_rows, alone
            )
            outputs.append(
                torch.utils.checkpoint.checkpoint(own, part, *more, use_reentrant=False, **by_name)
            )
        return joined_rows(outputs)

    return forward


class SharedLayers:
    """First layers that several models have in common, run once for each batch they all see.

    Outputs of the layers are kept in memory, up to a number of bytes; what does not fit is computed
    again.

    Args:
        depths: Numbers of first layers that later models share; outputs are kept there only.
        most_bytes: Bytes to keep, at most.
    """

    def __init__(self, depths: Sequence[int], *, most_bytes: int = 4 * 2**30):
        self.depths = set(depths)
        self.room = most_bytes
        # By digest of the inputs, then by depth.
        self.kept: dict[str, dict[int, Any]] = {}

    @contextlib.contextmanager
    def used_by(self, model: nn.Module, n_shared: int) -> Iterator[None]:
        """Take the outputs of the model's first ``n_shared`` layers from what is kept.

        Missing ones are computed, and kept for the next model.
        """
        layers = models.decoder_layers(model)
        backbone = models.backbone(causal_model(model))

        def begin(module: nn.Module, given: tuple, named: dict) -> None:
            """Called before the layers run."""
            self._begin(given, named, n_shared)

        with contextlib.ExitStack() as undo:
            undo.enter_context(backbone.register_forward_pre_hook(begin, with_kwargs=True))
            for depth, layer in enumerate(layers[:n_shared], start=1):
                undo.enter_context(replaced(layer, "forward", self._forward(layer.forward, depth)))
            yield

    def _begin(self, given: tuple, named: dict, n_shared: int) -> None:
        """Look up what is known of a batch, and the depth up to which its layers can be skipped."""
        self.known: dict[int, Any] | None = None
        self.depth = 0
        # Skipped layers would leave holes in a key-value cache.
        if named.get("use_cache"):
            return
        values = [*given, *named.values()]
        # Masks may come one for each kind of layers.
        values += [mask for value in values if isinstance(value, dict) for mask in value.values()]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        by_place = {str(place): tensor for place, tensor in enumerate(tensors)}
        self.known = self.kept.setdefault(runtime.tensor_digest(by_place), {})
        self.depth = max((depth for depth in self.known if depth <= n_shared), default=0)

    def _forward(self, own: Callable, depth: int) -> Callable:
        """What stands for the forward of the layer that ends at this depth."""

        def forward(*given: object, **named: object) -> object:
            """The layer's output, or, where it is skipped, that of the last layer skipped."""
            if self.known is not None and depth <= self.depth:
                return self.known[self.depth]
            output = own(*given, **named)
            parts = output if isinstance(output, tuple) else (output,)
            size = sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
            if self.known is not None and depth in self.depths and size <= self.room:
                self.known[depth] = output
                self.room -= size
            return output

        return forward
