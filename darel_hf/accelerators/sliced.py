"""`SlicedStep`: one forward pass over all candidates, and a backward pass over the kept rows of it only."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import default_partition
from torch._guards import TracingContext
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Trainer

from ..config import ACCELERATOR_FACTS
from ..files import require
from ..scoring import (
    BatchScorer,
    PerSampleLoss,
    SampleLosses,
    Trial,
    base_model,
    counts_items,
    first_of,
    is_causal_lm,
    is_sharded,
    logits_of,
    moved,
    per_sample_losses,
    scorer_for,
    untouched,
    weighted_loss,
    with_decoder_inputs,
)
from .base import CannotAccelerate, Choosing, first_line, register_accelerator

logger = logging.getLogger(__name__)

BACKENDS = ("eager", "inductor")
#: Largest relative difference of a gradient to that of the whole backward pass, by whether all of it is float32.
TOLERANCE = {True: 1e-4, False: 5e-2}
REDUCED = {torch.bfloat16, torch.float16}


class CannotSlice(CannotAccelerate):
    """The backward pass of this model cannot be done on some rows only; the message says why."""


class SlicedStep:
    """
    Compute the losses of all candidates, then the gradient of some of them, with one forward pass.

    The forward pass is compiled ahead of time with a symbolic batch size. Its backward graph then takes what the
    forward pass has saved, and sizes, as inputs that depend on that symbol: between the two, every saved tensor is cut
    down to the kept rows, within its own memory, and the sizes are made smaller. The gradient is that of a forward and
    backward pass over the kept rows with the same dropout masks; the time of a step falls from f + A (a forward pass
    to score, a training step on what is kept) to f + A (1 - f) and the moving of rows.

    Memory is that of a step on all candidates. Every compiled backward graph is checked once, on its first batch,
    against the whole backward pass.

    Args:
        model (`nn.Module`): takes a batch's keys, returns logits; PEFT models welcome, wrappers for several processes
            not (give the module inside, and reduce the gradients).
        label_smoothing (`float`): of the loss that trains; losses that rank are never smoothed.
        per_sample_loss (`Callable`, *optional*): `(outputs, inputs) -> float [B]`, traceable by `torch.compile`.
        shift (`bool`, *optional*): whether position t predicts label t + 1; default: what the model's class says.
        want_correct (`bool`): also find out how many positions are predicted right.
        backend (`str`): `"eager"` runs the operators of eager mode, `"inductor"` compiles them (takes longer, and
            needs a C++ compiler on the CPU).

    Raises:
        CannotSlice: at construction where rows depend on each other (batch normalization in train mode) or parameters
            are spread over processes; at the first step where the model cannot be traced as one graph, or where the
            gradient is not that of the whole backward pass.

    Example: an own loop.

    ```python
    step = SlicedStep(model)
    samples = step(batch)                                     # all candidates, differentiable
    rows, _ = selector.select(ids, samples.losses.detach().numpy(), batch_size=8, batch=number)
    step.keep(rows)
    samples.losses[rows].mean().backward()
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        label_smoothing: float = 0.0,
        per_sample_loss: PerSampleLoss | None = None,
        shift: bool | None = None,
        want_correct: bool = False,
        backend: str = "eager",
    ):
        require(backend in BACKENDS, "backend", backend, f"choose one of {BACKENDS}")
        self.model, self.want_correct = model, want_correct
        self._kept = _Kept()
        _refuse(model)
        shift = self.shift = is_causal_lm(model) if shift is None else shift

        takes_cache = "use_cache" in inspect.signature(base_model(model).forward).parameters
        options = {"use_cache": False} if takes_cache else {}
        call = functools.partial(type(model).forward, model)
        if "forward" in vars(model) or model._forward_hooks or model._forward_pre_hooks:
            call = model  # somebody wants to be asked; what accelerate puts there later for autocast, we do ourselves

        def losses(inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
            for value in inputs.values():  # one symbol for the batch, whatever else has the same size
                if torch.is_tensor(value) and value.dim() > 0:
                    torch._check(value.shape[0] == first_of(inputs).shape[0])
            if per_sample_loss is not None:
                own = per_sample_loss(call(**inputs), inputs).float()
                return own, own.detach(), torch.ones_like(own, dtype=torch.int64), torch.full_like(own, torch.nan)
            labels = inputs["labels"]
            outputs = call(**{key: value for key, value in inputs.items() if key != "labels"}, **options)
            logits = logits_of(outputs)
            samples = per_sample_losses(logits, labels, shift, label_smoothing, want_correct, dense=True)
            ranking = samples.losses.detach()
            if label_smoothing > 0:
                ranking = per_sample_losses(logits.detach(), labels, shift, dense=True).losses
            return samples.losses, ranking, samples.n_tokens, samples.correct

        losses.__code__ = losses.__code__.replace()  # what has been compiled is counted per code object: for each step
        compiler = _eager if backend == "eager" else _inductor
        self._losses = torch.compile(
            losses, backend=functools.partial(compiler, kept=self._kept), fullgraph=True, dynamic=True
        )
        self._per_sample_loss = per_sample_loss
        self.ranking: torch.Tensor | None = None

    def __call__(self, inputs: Mapping[str, Any]) -> SampleLosses:
        """
        Compute the losses of all candidates, in the mode that the model is in.

        Args:
            inputs (`Mapping`): the c rows of a batch of candidates, on the model's device; tensors `[c, ...]`.

        Returns:
            [`SampleLosses`]: `losses` are differentiable; [`SlicedStep.ranking`] are the same without smoothing, and
            without a gradient.
        """
        inputs = dict(inputs)
        if self._per_sample_loss is None:
            inputs = with_decoder_inputs(self.model, inputs)
        for value in inputs.values():
            if torch.is_tensor(value) and value.dim() > 0 and value.shape[0] > 1:
                torch._dynamo.mark_dynamic(value, 0)
        self._kept.rows, self._kept.of = None, len(first_of(inputs))
        try:
            # Hooks that come later count, too. Floats are constants: taken for variables, those of a checkpointed
            # layer (math.pi in GPT-2's GELU) fail to compile in torch 2.14.
            with dynamo_config.patch(skip_nnmodule_hook_guards=False, specialize_float=True):
                losses, self.ranking, n_tokens, correct = self._losses(inputs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            cause = getattr(
                error, "inner_exception", error
            )  # of the backend, whose name is all that the outer one says
            raise CannotSlice(f"the model cannot be traced as one graph ({first_line(cause)})") from error
        return SampleLosses(losses, n_tokens, correct)

    def keep(self, rows: Sequence[int]) -> None:
        """
        Say which rows of the last batch the next backward pass is for; without it, it is for all of them.

        Args:
            rows (`Sequence[int]`): int `[b]`, unique. What is differentiated must depend on these rows' losses only.
        """
        chosen = sorted(int(row) for row in rows)
        if len(chosen) == 1 and self._kept.of > 1:  # a batch of one is a special case to the compiler
            chosen = sorted({*chosen, 0 if chosen[0] else 1})
        self._kept.rows = chosen


def _refuse(model: nn.Module) -> None:
    """Refuse models whose rows depend on each other, and parameters that are not whole."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()  # some layers stay in eval mode
    coupled = [
        name
        for name, module in model.named_modules()
        if module.training and (isinstance(module, _BatchNorm) or "BatchNorm" in type(module).__name__)
    ]
    for module, training in modes:
        module.training = training
    if coupled:
        raise CannotSlice(
            f"{coupled[0]} is batch normalization: its statistics are of all candidates, those of a step on the kept "
            "rows would be others"
        )
    if is_sharded(model):
        raise CannotSlice("its parameters are spread over processes (FSDP, ZeRO 3)")


@dataclass
class _Kept:
    """The rows that the next backward pass is for, between the trainer and the compiled graphs."""

    rows: list[int] | None = None  # ascending
    of: int = 0


def _eager(graph: torch.fx.GraphModule, example_inputs: Sequence, kept: _Kept) -> Callable:
    """Compile with the operators of eager mode; save what eager mode would save."""

    def backward(part: torch.fx.GraphModule, inputs: Sequence) -> Callable:
        return _sliced_backward(functools.partial(boxed_nop, part, inputs), part, kept, reuses=False)

    made = aot_autograd(fw_compiler=boxed_nop, bw_compiler=backward, partition_fn=default_partition)
    return made(graph, example_inputs)


def _inductor(graph: torch.fx.GraphModule, example_inputs: Sequence, kept: _Kept) -> Callable:
    """Compile with Inductor. Dropout masks are saved, not drawn again: they would be of other rows."""
    from torch._inductor import config as inductor_config  # seconds to import, and only for those who ask for it
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(part: torch.fx.GraphModule, inputs: Sequence, **options: Any) -> Callable:
        compile_part = functools.partial(compile_fx_inner, part, inputs, **options)
        if not options.get("is_backward"):
            return compile_part()
        return _sliced_backward(compile_part, part, kept, reuses=True)

    with functorch_config.patch(enable_autograd_cache=False), inductor_config.patch(fallback_random=True):
        return compile_fx(graph, example_inputs, inner_compile=inner)


def _own_inputs() -> frozenset[int]:
    """
    Return which inputs of the backward graph in compilation nobody else sees: no input, no output, nor a view of one.

    Torch calls them donated. The compiler is told that there are none: it would write into some and not expect others,
    that share their memory, to be cut in place.
    """
    metadata = TracingContext.get().fw_metadata
    own = frozenset(metadata.bw_donated_idxs or ())
    metadata.bw_donated_idxs = []
    return own


def _sliced_backward(
    compile_part: Callable[[], Callable], part: torch.fx.GraphModule, kept: _Kept, reuses: bool
) -> Callable:
    """
    Compile a backward graph, and wrap it: what it takes is cut down to the kept rows before it runs.

    Args:
        compile_part (`Callable`): compiles it to what takes a list, which it empties.
        part (`GraphModule`): the graph. It takes symbolic sizes, fake tensors, and the gradient of the losses last.
        kept ([`_Kept`]): the rows.
        reuses (`bool`): whether the graph may write its results into what it takes.
    """
    own = _own_inputs()
    values = {node.name: node.meta.get("val") for node in part.graph.nodes if node.op == "placeholder"}
    batch = list(values.values())[-1].shape[0]  # of the gradient of the losses
    backward = compile_part()
    dims = [_batch_dim(value, batch) for value in values.values()]
    # The numbers of the rows: those of the kept ones are new.
    ranges = [(i, value) for i, (name, value) in enumerate(values.items()) if name.startswith(("arange", "iota"))]
    numbers = {i for i, value in ranges if torch.is_tensor(value) and value.dim() == 1}
    checked = False

    def call(arguments: list) -> Any:
        nonlocal checked
        rows, c = kept.rows, arguments[-1].shape[0]
        kept.rows = None
        if rows is None or len(rows) == c:
            return backward(arguments)
        if not isinstance(batch, torch.SymInt):
            raise CannotSlice(f"the compiled graph is for batches of {c} rows only")
        if not checked:
            exact = not {getattr(argument, "dtype", None) for argument in arguments} & REDUCED
            whole = backward([_copy(argument) for argument in arguments] if reuses else list(arguments))
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # retain_graph=True
        _cut_all(arguments, dims, numbers, set() if again else own - numbers, rows, c)
        if checked:
            return backward(arguments)
        try:
            gradients = backward(arguments)
        except (RuntimeError, AssertionError, IndexError) as error:
            raise CannotSlice(f"the backward pass cannot be done on fewer rows ({first_line(error)})") from error
        checked = _compare(gradients, whole, TOLERANCE[exact])
        return gradients

    call._boxed_call = True
    return call


def _copy(argument: Any) -> Any:
    """Copy a tensor with its strides, which compiled code asserts (`clone` closes gaps)."""
    if not torch.is_tensor(argument) or 0 in argument.stride():
        return argument
    made = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=argument.device)
    return made.copy_(argument)


def _compare(gradients: Sequence, whole: Sequence, tolerance: float) -> bool:
    """
    Raise `CannotSlice` where a gradient of the kept rows is not that of the whole backward pass.

    Returns whether it could be told: gradients that overflow, as with scaled losses in float16, say nothing.
    """
    pairs = [(a, b) for a, b in zip(gradients, whole, strict=True) if torch.is_tensor(b)]
    if not all(torch.isfinite(b).all() for _, b in pairs):
        return False
    total = max((b.float().norm().item() for _, b in pairs), default=0.0)
    for a, b in pairs:
        scale = max(b.float().norm().item(), 1e-2 * total)
        error = (a.float() - b.float()).norm().item() if a.shape == b.shape else float("inf")
        if not error <= tolerance * scale:
            raise CannotSlice(
                f"the gradient of the kept rows differs from that of the whole backward pass by {error / scale:.1e} "
                "(rows that depend on each other, or random numbers that are drawn again in the backward pass)"
            )
    return True


def _batch_dim(value: Any, batch: Any) -> int | None:
    """
    Return which dimension of an input of a backward graph has the rows; `None`: it does not depend on the batch size.

    A size that is a multiple of the number of rows is taken for a dimension of its own.
    """
    sizes = value.shape if torch.is_tensor(value) else [value]
    dims = [dim for dim, size in enumerate(sizes) if _grows(size, batch)]
    if len(dims) > 1:
        raise CannotSlice(f"a saved tensor of shape {tuple(value.shape)} has the batch in more than one dimension")
    return dims[0] if dims else None


def _grows(size: Any, batch: Any) -> bool:
    """Whether a size is a multiple of the batch size; raise if it depends on it in another way."""
    if not isinstance(size, torch.SymInt) or not isinstance(batch, torch.SymInt):
        return False
    expression, symbol = size.node.expr, batch.node.expr
    if symbol not in expression.free_symbols:
        return False
    if symbol in sympy.simplify(expression / symbol).free_symbols:
        raise CannotSlice(f"a saved size, {expression}, is no multiple of the batch size {symbol}")
    return True


def _cut_all(
    arguments: list, dims: list[int | None], numbers: set[int], own: set[int], rows: list[int], c: int
) -> None:
    """
    Replace every argument by that of the kept rows.

    Where nobody else sees its memory, and it lies row after row, kept rows from behind move into the places of dropped
    ones in front: less is written than in a copy, and no memory is needed. What is not like that is copied, with its
    rows in the same order.
    """
    b = len(rows)
    behind = [row for row in rows if row >= b]
    free = [place for place in range(b) if place not in rows]
    order = list(range(b))
    for place, row in zip(free, behind, strict=True):
        order[place] = row

    sharing: dict[int, list[int]] = {}  # which arguments share memory
    for i, argument in enumerate(arguments):
        if torch.is_tensor(argument):
            sharing.setdefault(argument.untyped_storage().data_ptr(), []).append(i)
    moves: dict[torch.dtype, tuple[list, list]] = {}  # places and sources; of one type, they are moved at once
    in_place: set[int] = set()
    for together in sharing.values():
        if all(i in own and _lies_row_after_row(arguments[i], dims[i], c) for i in together):
            in_place.update(together)
            tensor = arguments[together[0]]
            each = tensor.untyped_storage().nbytes() // tensor.element_size() // c
            memory = tensor.as_strided((c, each), (each, 1), 0)
            places, sources = moves.setdefault(tensor.dtype, ([], []))
            places += [memory[place] for place in free]
            sources += [memory[row] for row in behind]
    for places, sources in moves.values():
        if places:
            torch._foreach_copy_(places, sources)

    index = torch.tensor(order, device=arguments[-1].device)
    copies: dict[tuple, torch.Tensor] = {}  # some tensors are saved more than once
    for i, (argument, dim) in enumerate(zip(arguments, dims, strict=True)):
        if dim is None:
            continue
        if not torch.is_tensor(argument):
            arguments[i] = argument // c * b
        elif i in in_place or i in numbers:
            arguments[i] = argument.narrow(dim, 0, argument.shape[dim] // c * b)
        else:
            key = (dim, argument.data_ptr(), argument.shape, argument.stride(), argument.dtype)
            if key not in copies:
                copies[key] = _take_rows(dim, argument, index, c)
            arguments[i] = copies[key]


def _lies_row_after_row(tensor: torch.Tensor, dim: int | None, c: int) -> bool:
    """Whether the memory of a tensor is c pieces of the same size, one for each row, that have nothing else."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    if dim is None or size % c or 0 in tensor.shape or tensor.untyped_storage().nbytes() % tensor.element_size():
        return False
    piece, inside = size // c, tensor.shape[dim] // c
    if tensor.stride(dim) * inside != piece:
        return False
    extents = [(inside if d == dim else extent) - 1 for d, extent in enumerate(tensor.shape)]
    last = tensor.storage_offset() + sum(e * stride for e, stride in zip(extents, tensor.stride(), strict=True))
    return last < piece


def _take_rows(dim: int, tensor: torch.Tensor, rows: torch.Tensor, c: int) -> torch.Tensor:
    """
    Copy some rows of a tensor, laid out in memory like the source.

    Dimensions outside of the batch in memory get smaller strides; those inside keep theirs.
    """
    shape, b = list(tensor.shape), len(rows)
    shape[dim] = shape[dim] // c * b
    if tensor.stride(dim) == 0:  # the same for all rows
        return tensor.narrow(dim, 0, shape[dim])
    outer = tensor.stride(dim) * (tensor.shape[dim] // c)
    strides = [stride if stride <= outer else stride // c * b for stride in tensor.stride()]
    thin = tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in strides)]  # nothing more than once
    size = [1 if stride == 0 else extent for extent, stride in zip(shape, strides, strict=True)]
    made = torch.empty_strided(size, strides, dtype=tensor.dtype, device=tensor.device)
    torch.index_select(thin.unflatten(dim, (c, -1)), dim, rows, out=made.unflatten(dim, (b, -1)))
    return made.expand(shape)


@register_accelerator
class SlicedTraining(Choosing):
    """
    Score and train with one forward pass, see [`SlicedStep`]. Exact, given the rows and the dropout masks.

    It brings token counts and gradients of what is kept together, over all processes.
    """

    facts = ACCELERATOR_FACTS["sliced"]

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        self.step: SlicedStep | None = None
        self.counts = True  # whether the model's loss is divided by the count that Trainer tells it
        self.start_step()

    def why_not(self, few_rows: Callable[[], Mapping[str, Any]] | None) -> str | None:
        """Return why the forward pass that trains cannot give the loss of each sample; a step is tried out."""
        reason = self._other_loss()
        if reason is not None:
            return reason
        if few_rows is None:
            return "train_dataset is a stream, of which no row can be tried before training"
        with untouched(self.trainer.model):
            batch, scorer = few_rows(), scorer_for(self.trainer, stage="online")
            scorer(batch)
            if scorer.reading.matches_own_loss is False:
                return "the model's loss is more than cross-entropy"
            if batch["labels"].is_floating_point():
                return "labels are floating-point numbers, which Trainer counts in another way than rows"
            problem = self._unlike_own_step(batch, scorer)
            if problem is not None:
                return problem
            try:
                self._compile(scorer.want_correct, scorer.reading.shift)
                with moved(self.trainer.model):
                    self._try_out(batch)
            except Exception as error:  # whatever the compiler has to say, there is another way to train
                return str(error) if isinstance(error, CannotSlice) else f"{type(error).__name__}: {first_line(error)}"
        return None

    def _other_loss(self) -> str | None:
        trainer, ours = self.trainer, __name__.partition(".")[0]
        classes = [cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls) and cls is not Trainer]
        own = next((cls.__name__ for cls in classes if cls.__module__.partition(".")[0] != ours), None)
        reasons = {
            f"{own} computes a loss of its own": own is not None,
            "compute_loss_func is a loss of your own": trainer.compute_loss_func is not None,
            "per_sample_loss ranks, the loss that trains is the model's own": trainer.per_sample_loss is not None,
            "neftune_noise_alpha adds its noise by a hook that comes after this is compiled": (
                trainer.args.neftune_noise_alpha
            ),
            "FSDP and DeepSpeed spread parameters or gradients over processes": (
                trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
            ),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _unlike_own_step(self, batch: Mapping[str, Any], scorer: BatchScorer) -> str | None:
        """Return what differs between the trainer's own step on a few rows and the losses of ours, or `None`."""
        trainer = self.trainer
        items = trainer._get_num_items_in_batch([batch], trainer.args.device)
        own = functools.partial(trainer.own_loss, batch, smoothed=True)
        if items is not None:
            with scorer.scoring():
                self.counts = counts_items(own, int(items))
        smoothing = 0.0 if trainer.label_smoother is None else trainer.label_smoother.epsilon

        def ours() -> torch.Tensor:
            inputs = with_decoder_inputs(trainer.model, dict(batch))
            outputs = trainer.model(**{key: value for key, value in inputs.items() if key != "labels"})
            samples = scorer.read(logits_of(outputs), batch["labels"], label_smoothing=smoothing)
            loss = weighted_loss(samples, torch.ones_like(samples.losses), items if self.counts else None)
            scaled = trainer.args.average_tokens_across_devices and items is not None  # as Trainer does with its own
            return loss * trainer.accelerator.num_processes if scaled else loss

        return Trial(trainer, functools.partial(own, items)).difference(ours)

    def _try_out(self, batch: Mapping[str, Any]) -> None:
        """Do a step on a batch that is not trained on."""
        self.trainer.model.train()
        c = len(first_of(batch))
        samples, _ = self.score(batch)
        self.step.keep(range(c // 2, c))  # rows that have to move
        samples.losses[c // 2 :].sum().backward()

    def _compile(self, want_correct: bool, shift: bool) -> None:
        trainer = self.trainer
        compiled = trainer.args.torch_compile and trainer.args.torch_compile_backend in (None, "inductor")
        self.step = SlicedStep(
            trainer.model,
            label_smoothing=0.0 if trainer.label_smoother is None else trainer.label_smoother.epsilon,
            shift=shift,
            want_correct=want_correct,
            backend="inductor" if compiled else "eager",
        )

    def attach(self) -> None:
        """Compile again where Trainer has made the model anew."""
        if self.step.model is not self.trainer.model:
            self._compile(self.step.want_correct, self.step.shift)

    def measure(self, seconds: Callable[[Callable[[], Mapping]], float], inputs: Mapping[str, Any]) -> None:
        """Return `None`: what it saves is the forward pass that scores, not a step on rows that are chosen already."""

    def start_step(self) -> None:
        """Begin an optimizer step, also where an earlier one was not ended."""
        self._labels: list[dict[str, torch.Tensor]] = []  # of what is kept
        self._returned = 0.0  # the losses of the micro-batches so far
        self._ratio: torch.Tensor | None = None  # label positions counted over those kept, in the last micro-batch

    def score(self, inputs: Mapping[str, Any]) -> tuple[SampleLosses, torch.Tensor]:
        """Compute the losses of all candidates, and what ranks them, in the precision that the trainer trains in."""
        with self.trainer.autocast():
            samples = self.step(inputs)
        return samples, self.step.ranking

    def loss(
        self,
        inputs: Mapping[str, Any],
        samples: SampleLosses,
        rows: Sequence[int],
        weights: torch.Tensor | None,
        counted: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """
        Reduce the losses of the kept rows to what a step on them alone would have as its loss.

        Trainer counts label positions before it is known what is kept. In the last micro-batch of an optimizer step
        the gradients so far, and this loss, are multiplied by what was counted over what was kept.

        Args:
            inputs (`Mapping`): the candidates.
            samples ([`SampleLosses`]): of the candidates.
            rows (`Sequence[int]`): int `[b]`, which of them are kept.
            weights (`torch.Tensor`, *optional*): float `[b]`.
            counted (`torch.Tensor` or `int`, *optional*): Trainer's `num_items_in_batch`, of all candidates.
        """
        self.step.keep(rows)
        index = torch.as_tensor(rows, device=samples.losses.device)
        kept = SampleLosses(*(values[index] for values in samples[:3]))
        counted = counted if self.counts else None
        loss = weighted_loss(kept, torch.ones_like(kept.losses) if weights is None else weights, counted)
        if counted is None:  # a mean over the micro-batch, which Trainer divides by their number
            return loss
        self._labels.append({"labels": inputs["labels"][index]})
        if not self.trainer.accelerator.sync_gradients:
            return loss
        kept_items = self.trainer._get_num_items_in_batch(self._labels, loss.device)
        self._ratio = (counted / kept_items.clamp(min=1)).to(loss)
        if len(self._labels) > 1:
            for parameter in self.trainer.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self._ratio.to(parameter.grad))
        return loss * self._ratio

    def settle(self, loss: torch.Tensor) -> torch.Tensor:
        """End a micro-batch; in the last one bring gradients together over processes. Return the loss to log."""
        if self._ratio is None:
            self._returned = self._returned + loss
        else:  # what the earlier micro-batches have returned was divided by too many label positions
            loss = loss + (self._ratio - 1) * self._returned
        accelerator = self.trainer.accelerator
        if accelerator.sync_gradients and accelerator.num_processes > 1:
            # The model inside was called, of which its wrapper knows nothing.
            for parameter in self.trainer.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.copy_(accelerator.reduce(parameter.grad, "mean"))
        return loss
