"""How alike the hidden states before and after each block of layers are, all in one pass."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass, field

import numpy as np

from pruning_utils import models
from pruning_utils.engine import memory, passes, wrappers
from pruning_utils.engine.bars import tqdm
from pruning_utils.engine.checks import whole_number
from pruning_utils.engine.later import nn, torch

# Where a cosine is this near to 1 or -1, the float32 Gram matrix has lost the angle's digits. The
# chord |u - v| or |u + v| still holds them.
SMALL_ANGLE_COSINE = 0.999
# Tokens whose states are multiplied at once. A chunk's states fit the processor's cache: the pass
# is bound by memory, not by arithmetic.
CHUNK_TOKENS = 128


@dataclass(frozen=True)
class Similarity:
    """Distances between the inputs of layers, and the influence of each of the L layers.

    Index i of a state is 0-based: i < L is the input of layer i, and L the raw output of the last
    layer, before the final norm. All means are float64.

    Attributes:
        angular_distance: ``(L+1, L+1)``, symmetric with a zero diagonal, in [0, 1] (1 is opposite).
            Entry [i, j] is the mean over samples of arccos(cos(h_i, h_j)) / pi at the last real
            token, the distance of Sec. 3.2 of arXiv:2403.17887 for the block of layers i to j-1.
        angular_distance_all_tokens: The same, mean over all real tokens.
        block_influence: ``(L,)``, mean over real tokens of 1 - cos(h_i, h_{i+1}), in [0, 2];
            arXiv:2403.03853, Eq. (1).
        block_influence_flattened: ``(L,)``, 1 minus one cosine over all tokens' states laid end to
            end, as in released code of arXiv:2411.15558; a single token with a huge norm decides
            it.
        n_samples: Number of samples that the means are over.
        n_tokens: Number of real tokens that the means are over.
        last_token_samples: ``(n_samples, L+1, L+1)`` float32: the distances at the last token
            before the mean, from which intervals are drawn.
    """

    angular_distance: np.ndarray
    angular_distance_all_tokens: np.ndarray
    block_influence: np.ndarray
    block_influence_flattened: np.ndarray
    n_samples: int
    n_tokens: int
    last_token_samples: np.ndarray = field(repr=False)


def measure_similarity(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    batch_size: int = 8,
) -> Similarity:
    """Measure the angular distance of every block and the influence of every layer in one pass.

    Per token, the L+1 states are scaled to unit length and multiplied with each other; angles and
    cosines go into running sums, so that the states of only one micro-batch are alive at a time.
    Each layer runs once per micro-batch and the language-model head never. Rows are moved to right
    padding first: a causal model's states at real tokens then do not depend on the padding. Only
    where the rotation of positions follows the longest row of a micro-batch (``longrope``,
    ``dynamic``) do they depend on what stands beside them. Products are taken in float32, those of
    the last token and all sums in float64.

    Args:
        model: A causal language model, quantised if need be; it is left as it was, and can be
            trained.
        input_ids: Token ids of shape ``(n_samples, seq_len)``.
        attention_mask: 1 or True at real tokens and 0 or False at padding, of the same shape: a
            tensor of any dtype, an array or a list of rows. The real tokens of a row must be
            consecutive. None: all are real.
        batch_size: Samples in a micro-batch, at least 1. It is halved, with a notice, where memory
            does not suffice.

    Returns:
        The :class:`Similarity`.

    Raises:
        ValueError: If an argument is out of range, weights are missing, PEFT puts trained tokens
            before each text, the layers do not pass on one state for each token, or a state is zero
            or not finite (the layer and sample are named).
        MemoryError: If not even one sample fits into memory.
    """
    input_ids = models.check_input_ids(model, input_ids)
    wrappers.refuse_own_tokens(model)
    passes.refuse_missing_weights(model)
    batches = memory.BatchSize(whole_number("batch_size", batch_size, 1))
    rows, lengths = align_right_padded(input_ids, attention_mask)
    sums, device = RunningSums(len(models.decoder_layers(model))), passes.input_device(model)

    def add(samples: slice) -> None:
        """Add a micro-batch to the sums: all of it, or nothing."""
        nonlocal sums
        length = lengths[samples]
        larger = copy.copy(sums)
        # No name for the states: they must be gone before the next micro-batch begins.
        larger.add(
            states.of(rows[samples, : int(length.max())].to(device)),
            length.to(device),
            first_sample=samples.start,
        )
        sums = larger

    with (
        LayerStates(model) as states,
        torch.no_grad(),
        tqdm(total=len(rows), desc="similarity", leave=False) as progress,
    ):
        batches.run(add, len(rows), progress)
    return sums.result()


def align_right_padded(
    input_ids: torch.Tensor, attention_mask: object | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the real tokens of each row to its left end.

    Returns:
        The rows, of the shape of ``input_ids``, and the number of real tokens of each, of shape
        ``(n_samples,)``.

    Raises:
        ValueError: If the mask has another shape, other values than 0 and 1, an empty row, or a gap
            within a row.
    """
    n_samples, seq_len = input_ids.shape
    if attention_mask is None:
        return input_ids, torch.full((n_samples,), seq_len)
    mask = passes.as_mask(attention_mask, input_ids.shape)
    lengths, starts = mask.sum(1), mask.argmax(1)
    ends = seq_len - mask.flip(1).argmax(1)
    wrong = ((lengths == 0) | (ends - starts != lengths)).nonzero()
    if len(wrong):
        raise ValueError(f"attention_mask row {int(wrong[0])} must have one unbroken run of ones")
    columns = (torch.arange(seq_len) + starts[:, None]) % seq_len
    return input_ids.cpu().gather(1, columns), lengths


class LayerStates:
    """Collects every decoder layer's input, and the last one's raw output, in a forward pass."""

    def __init__(self, model: nn.Module):
        self.model, self.layers = model, models.decoder_layers(model)
        self.states: list[torch.Tensor] = []

    def __enter__(self):
        self.undo = contextlib.ExitStack()
        self.undo.enter_context(passes.evaluation_mode(self.model))
        for layer in self.layers:
            hook = layer.register_forward_pre_hook(self._keep_input, with_kwargs=True)
            self.undo.callback(hook.remove)
        self.undo.callback(self.layers[-1].register_forward_hook(self._keep_output).remove)
        return self

    def __exit__(self, *error):
        self.undo.close()
        self.states = []

    def _keep_input(self, layer, inputs, named_inputs):
        self.states.append(inputs[0] if inputs else named_inputs.get("hidden_states"))

    def _keep_output(self, layer, inputs, output):
        self.states.append(passes.states_in(output))

    def of(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """The L+1 states, each of shape ``(batch, seq_len, hidden)``."""
        self.states = []
        models.backbone(self.model)(input_ids=input_ids, use_cache=False)
        states, self.states = self.states, []
        if len(states) != len(self.layers) + 1:
            raise ValueError(
                f"{type(self.model).__name__} ran {len(states) - 1} of its {len(self.layers)} "
                "layers once"
            )
        passes.refuse_other_states(self.model, states, input_ids)
        return states


class RunningSums:
    """Float64 sums over tokens and samples; O(L^2) numbers, whatever the text."""

    def __init__(self, n_layers: int):
        self.n_states = n_layers + 1
        self.angles = np.zeros((self.n_states, self.n_states))
        self.influence, self.inner = np.zeros(n_layers), np.zeros(n_layers)
        self.squares = np.zeros(self.n_states)
        self.n_tokens = 0
        self.last: list[np.ndarray] = []

    def add(self, states: list[torch.Tensor], lengths: torch.Tensor, first_sample: int) -> None:
        """Add one micro-batch.

        Args:
            states: L+1 tensors of shape ``(batch, seq_len, hidden)``.
            lengths: Real tokens of each row.
            first_sample: Number of the first row among all samples.
        """
        _, seq_len, hidden = states[0].shape
        real = (torch.arange(seq_len, device=lengths.device) < lengths[:, None]).flatten()
        rows = [
            state.flatten(0, 1) if bool(real.all()) else state.flatten(0, 1)[real]
            for state in states
        ]
        n_tokens = len(rows[0])
        chunk = rows[0].new_empty(
            min(n_tokens, CHUNK_TOKENS), self.n_states, hidden, dtype=torch.float32
        )
        for start in range(0, n_tokens, CHUNK_TOKENS):
            by_token = chunk[: min(CHUNK_TOKENS, n_tokens - start)]
            for index, row in enumerate(rows):
                by_token[:, index] = row[start : start + CHUNK_TOKENS]
            # In a narrower type, as around it, small angles would be lost.
            with torch.autocast(by_token.device.type, enabled=False):
                angle, cosine, norm = _angles(by_token)
            if not bool(torch.isfinite(angle).all()):
                index, token = (~torch.isfinite(norm) | (norm == 0)).T.nonzero()[0].tolist()
                among = int(torch.searchsorted(lengths.cumsum(0), start + token, right=True))
                raise ValueError(
                    f"the input of layer {index} (where {self.n_states - 1} is the output of the "
                    f"last) is zero or not finite at a token of sample {first_sample + among}"
                )
            # Not in place: a copy made before keeps the sums that it had.
            self.angles = self.angles + angle.sum(0, dtype=torch.float64).cpu().numpy()
            neighbours = cosine.diagonal(1, dim1=1, dim2=2).double()
            self.influence = self.influence + (1 - neighbours).sum(0).cpu().numpy()
            self.inner = self.inner + (
                (neighbours * norm[:, 1:] * norm[:, :-1]).sum(0).cpu().numpy()
            )
            self.squares = self.squares + norm.square().sum(0).cpu().numpy()
        ends = lengths.cumsum(0) - 1
        angle, _, _ = _angles(torch.stack([row[ends] for row in rows], dim=1).double())
        # Nothing fails after this.
        self.last.append(angle.float().cpu().numpy())
        self.n_tokens += n_tokens

    def result(self) -> Similarity:
        """The means over everything that was added."""
        samples = np.concatenate(self.last)
        lengths = np.sqrt(self.squares)
        last, every = samples.mean(0, dtype=np.float64), self.angles / self.n_tokens
        return Similarity(
            # A product's two triangles may differ in the last bit.
            angular_distance=(last + last.T) / 2,
            angular_distance_all_tokens=(every + every.T) / 2,
            block_influence=self.influence / self.n_tokens,
            block_influence_flattened=1 - self.inner / (lengths[1:] * lengths[:-1]),
            n_samples=len(samples),
            n_tokens=self.n_tokens,
            last_token_samples=samples,
        )


def _angles(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Angular distances, cosines and lengths of the states of each token.

    Args:
        states: ``(tokens, L+1, hidden)``, float32 or float64.

    Returns:
        Angles in [0, 1], symmetric and exactly 0 on the diagonal, and cosines, both of shape
        ``(tokens, L+1, L+1)``; lengths in float64, ``(tokens, L+1)``. A zero or non-finite state
        gives NaN.
    """
    gram = torch.bmm(states, states.transpose(1, 2))
    norm = gram.diagonal(dim1=1, dim2=2).sqrt().double()
    # Squares near the ends of the float range lose digits.
    if not bool(((norm > 1e-15) & (norm < 1e15)).all()):
        scale = states.abs().amax(-1, keepdim=True)
        states = states / scale
        gram = torch.bmm(states, states.transpose(1, 2))
        lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
        norm = lengths.double() * scale[..., 0].double()
    else:
        lengths = norm
    inverse = (1 / lengths).to(gram.dtype)
    cosine = gram.mul_(inverse[:, :, None]).mul_(inverse[:, None, :])
    # Its angle is set below; 0 keeps it out of the repair of small angles.
    cosine.diagonal(dim1=1, dim2=2).fill_(0)
    near = (cosine.abs() > SMALL_ANGLE_COSINE).nonzero(as_tuple=True)
    angle = cosine.clamp_(-1, 1).acos().mul_(1 / math.pi)
    angle.diagonal(dim1=1, dim2=2).fill_(0)
    for token, row, column in zip(*(index.split(4096) for index in near), strict=True):
        sign = cosine[token, row, column].sign()
        chord = (
            states[token, row] * inverse[token, row, None]
            - states[token, column] * (sign * inverse[token, column])[:, None]
        ).norm(dim=-1)
        small = 2 / math.pi * (chord / 2).asin()
        angle[token, row, column] = torch.where(sign > 0, small, 1 - small)
        cosine[token, row, column] = sign * (1 - chord.square() / 2)
    return angle, cosine, norm
