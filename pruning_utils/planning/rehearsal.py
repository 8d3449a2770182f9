"""Runs of the package's own functions without numbers, which tell their memory and arithmetic.

Tensors have shapes and types here, and no values: PyTorch's fake tensors. Everything that would be
allocated is counted as it comes and goes, so that the peak is that of the code that will run, for
any architecture of transformers, and no formula has to follow it. Where code asks for a value it
gets one that no check refuses.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import QuantState
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig

from pruning_utils.engine import model_files

ACTIVATIONS, LOGITS, GRADIENTS = "activations", "logits", "gradients"
# NF4 with double quantisation (arXiv:2305.14314, Sec. 3): a scale for each block, of 8 bits, and of
# these a 32-bit scale for each larger block. Both tables of values are float32.
NF4_BLOCK, NF4_SCALES = 64, 256
NF4_VALUES, SCALE_VALUES = 16, 256
# What a check of all elements, and a search among them, find; both are real numbers.
SOUND, FAULTLESS = torch.tensor(True), torch.tensor(False)
aten = torch.ops.aten


class Tally(TorchDispatchMode):
    """Counts what tensors take while they exist, by part, and the operations of their making.

    Attributes:
        now: Bytes of all tensors that exist, by part.
        at_peak: The same when they were most.
        flops: Floating-point operations of matrix products and attention, as
            :func:`efficiency.forward_flops` counts them.

    Args:
        vocabulary: Entries of the head: what has as many in its last dimension counts as logits.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.now: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self.flops = 0
        self._part = ACTIVATIONS
        self._total = 0
        self._peak = 0
        # By storage a list of its one part, which may change while it exists.
        self._part_of = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation, and count what it makes."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return _value(args[0])
        if func is aten.nonzero.default:
            return args[0].new_empty((0, args[0].ndim), dtype=torch.long)
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            return self._four_bit_product(func, args, kwargs)
        found = func(*args, **kwargs)
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        self.flops += _flops(func, args, kwargs, found)
        return found

    @contextlib.contextmanager
    def making(self, part: str) -> Iterator[None]:
        """Let what is made inside count as a part."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    def becomes(self, tensor: torch.Tensor, part: str) -> None:
        """Let what holds a tensor count as another part from now on."""
        found = self._part_of.get(tensor.untyped_storage())
        if found is not None:
            size = tensor.untyped_storage().nbytes()
            self.now[found[0]] -= size
            self.now[part] += size
            found[0] = part

    def begin(self) -> None:
        """Forget the peak and the operations so far."""
        self.flops = 0
        self._peak = 0
        self._note_peak()

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._part_of:
            return
        part = self._part
        if part == ACTIVATIONS and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
            part = LOGITS
        holder = [part]
        self._part_of[storage] = holder
        size = storage.nbytes()
        self._change(part, size)
        weakref.finalize(storage, self._gone, holder, size)

    def _gone(self, holder: list[str], size: int) -> None:
        self._change(holder[0], -size)

    def _change(self, part: str, size: int) -> None:
        self.now[part] += size
        self._total += size
        self._note_peak()

    def _note_peak(self) -> None:
        if self._total > self._peak:
            self._peak = self._total
            self.at_peak = dict(+self.now)

    def _four_bit_product(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A product with NF4 weights, which exist in the states' type, and their scales, during
        it."""
        states, shape = args[0], args[2]
        size = shape[0] * shape[1]
        weight = states.new_empty(size)
        scales = states.new_empty(size // NF4_BLOCK, dtype=torch.float32)
        found = func(*args, **kwargs)
        for tensor in (weight, scales, found):
            self._add(tensor)
        self.flops += 2 * (states.numel() // states.shape[-1]) * size
        return found


def _value(number: torch.Tensor) -> bool | float | int:
    """A number's value where it has one, else one that it may have."""
    if not isinstance(number, FakeTensor):
        with _disable_current_modes():
            return number.item()
    if number.dtype == torch.bool:
        return True
    return 1.0 if number.dtype.is_floating_point else 1


def _flops(func: Any, args: tuple, kwargs: dict, found: Any) -> int:
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    count = flop_registry.get(getattr(func, "_overloadpacket", None))
    return count(*args, **kwargs, out_val=found) if count else 0


class _Values(TorchFunctionMode):
    """Values where code leaves PyTorch: ones; no element is what is searched for, all are sound."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], FakeTensor):
            if name in ("numpy", "tolist"):
                values = np.ones(tuple(args[0].shape), dtype=_as_numpy(args[0].dtype))
                return values if name == "numpy" else values.tolist()
            if name in ("any", "all") and len(args) == 1 and not kwargs:
                return SOUND if name == "all" else FAULTLESS
        return func(*args, **(kwargs or {}))


@functools.cache
def _as_numpy(dtype: torch.dtype) -> Any:
    return np.dtype(str(dtype).removeprefix("torch.").replace("bfloat16", "float32"))


@contextlib.contextmanager
def rehearsing(config: PreTrainedConfig) -> Iterator[Tally]:
    """Let no tensor that is made inside have memory; all of them are counted.

    Args:
        config: Of the models that will be made, for the entries of their head.
    """
    tally = Tally(config.get_text_config(decoder=True).vocab_size)
    with FakeTensorMode(allow_non_fake_inputs=True), tally, _Values():
        yield tally


def outline(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A model as a configuration describes it, on the device ``meta``: shapes without memory.

    Raises:
        ValueError: If it describes no decoder-only language model.
    """
    with torch.device("meta"):
        return model_files.auto_class(config).from_config(config, dtype=dtype).eval()


def furnished(
    model: nn.Module,
    tally: Tally,
    made: dict[int, tuple[torch.Tensor, torch.Tensor]],
    *,
    part: str,
    trained: str = "",
) -> nn.Module:
    """Give, in place, fake tensors to a model on the device ``meta``, inside a rehearsal.

    Args:
        model: Of :func:`outline`, or one that shares weights with it, or a copy to be trained.
        tally: Of the rehearsal.
        made: What was given to other models in the place of which tensor: models that share one go
            on sharing it. What is made here is added.
        part: What its weights count as.
        trained: What those that require gradients count as, if that is another part.
    """
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None or weight.device.type != "meta":
                continue
            if id(weight) not in made:
                with tally.making(trained if weight.requires_grad and trained else part):
                    made[id(weight)] = (weight, _weight(weight))
            module._parameters[name] = made[id(weight)][1]
        for name, buffer in list(module._buffers.items()):
            if buffer is None or buffer.device.type != "meta":
                continue
            if id(buffer) not in made:
                with tally.making(part):
                    made[id(buffer)] = (buffer, _empty(buffer))
            module._buffers[name] = made[id(buffer)][1]
    return model


def _weight(weight: nn.Parameter) -> nn.Parameter:
    """A parameter of the same size; one that is to be stored in NF4 with its constants."""
    if type(weight).__name__ != "Params4bit":
        return nn.Parameter(_empty(weight), requires_grad=weight.requires_grad)
    size = weight.numel()
    n_blocks = -(-size // NF4_BLOCK)
    packed = nn.Parameter(torch.empty(size // 2, 1, dtype=torch.uint8), requires_grad=False)
    scales = QuantState(
        torch.empty(-(-n_blocks // NF4_SCALES)),
        code=torch.empty(SCALE_VALUES),
        blocksize=NF4_SCALES,
        dtype=torch.float32,
    )
    packed.quant_state = QuantState(
        torch.empty(n_blocks, dtype=torch.uint8),
        shape=weight.shape,
        code=torch.empty(NF4_VALUES),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=torch.empty(()),
        state2=scales,
    )
    return packed


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)
