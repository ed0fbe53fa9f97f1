"""AdamW (arXiv 1711.05101) over flat buckets of parameters, with its state on every worker or each on one.

Parameters of one kind (matrices decay, vectors do not) lie one after another in buckets of up to ``BUCKET`` bytes: one
collective and a dozen kernels per bucket instead of per parameter. Gradients are added up in float32 buckets; moments,
and masters where the weights are 16-bit, are float32. With ``shards`` > 1 a worker keeps moments and masters of its own
part of every bucket only (ZeRO stage 1, arXiv 1910.02054): it updates that part, and the workers gather the whole.

Where workers share layers, a bucket holds parameters of one :class:`Kind`: what is cut, what all workers of a row of the grid
have, and what some do. Those that hold the same values add their gradients up, so that they stay the same, and share the
norm of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from research.core.config.schema import TrainConfig
from research.core.errors import UserError
from research.core.mindspore import native, runtime
from research.core.mindspore.collectives import AllReduce, Gather, gather_now
from research.core.mindspore.parallel import World
from research.core.mindspore.tensor_plan import TensorPlan
from research.core.mindspore.weights import set_value, to_numpy

BUCKET = 64 * 2**20
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Kind:
    """``copies`` workers of a row of the grid hold the same values; ``partial``: the gradients that they compute are parts of a
    sum, else each has all of it."""

    copies: int = 1
    partial: bool = True

    @property
    def share(self) -> float:
        """What the sum of the copies' gradients is multiplied by."""
        return 1.0 if self.partial else 1.0 / self.copies


WHOLE = Kind()


@dataclass(frozen=True)
class Bucket:
    """Some parameters one after another; ``length`` is filled up so that every worker's part has ``part`` elements."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    decay: float
    part: int
    shards: int
    kind: Kind = WHOLE

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def length(self) -> int:
        return self.part * self.shards

    @property
    def filling(self) -> int:
        return self.length - sum(self.sizes)


def make_buckets(
    parameters: Sequence[Parameter],
    decay: float,
    shards: int,
    limit: int = BUCKET,
    kind_of: Callable[[str], Kind] = lambda name: WHOLE,
) -> list[Bucket]:
    """Buckets in the parameters' order, matrices first; a parameter is never cut."""
    kinds = {p.name: (len(p.shape) >= 2, kind_of(p.name)) for p in parameters}
    buckets = []
    for matrices, kind in sorted(
        set(kinds.values()), key=lambda found: (not found[0], found[1].copies, found[1].partial)
    ):
        group: list[Parameter] = []
        for parameter in [*(p for p in parameters if kinds[p.name] == (matrices, kind)), None]:
            if group and (parameter is None or 4 * (sum(p.size for p in group) + parameter.size) > limit):
                part = -(-sum(p.size for p in group) // shards)
                names, shapes = tuple(p.name for p in group), tuple(tuple(p.shape) for p in group)
                buckets.append(Bucket(names, shapes, decay if matrices else 0.0, part, shards, kind))
                group = []
            if parameter is not None:
                group.append(parameter)
    return buckets


def flat(bucket: Bucket, tensors):
    """The bucket's tensors, in its order, as one float32 vector."""
    parts = [t.reshape(-1).astype(ms.float32) for t in tensors]
    if bucket.filling:
        parts.append(ops.zeros((bucket.filling,), ms.float32))
    return parts[0] if len(parts) == 1 else ops.cat(parts)


class Backward(nn.Cell):
    """Forward and backward of one micro batch; its gradients are added to the sums."""

    def __init__(self, objective: nn.Cell, optimizer: Optimizer):
        super().__init__(auto_prefix=False)  # parameters keep their names
        self.objective, self.buckets = objective, optimizer.buckets
        self.weights, self.sums, self.groups = optimizer.weights, optimizer.sums, optimizer.groups
        self.grad = ms.value_and_grad(self.forward, None, self.weights, has_aux=True)

    def forward(self, input_ids, position_ids, doc_ids, where, targets, ends, scale, router_scale):
        total, balance = self.objective(input_ids, position_ids, doc_ids, where, targets, ends)
        return total * scale + balance * router_scale, total, balance

    def construct(self, input_ids, position_ids, doc_ids, where, targets, ends, scale, router_scale):
        """The inputs of :class:`research.core.mindspore.loss.Objective`; ``scale`` and ``router_scale``: float32 scalars on the summed loss and on the router's -> (sum of the
        cross-entropies, router balance)."""
        # One by one: tensors in a tuple would be constants, and every step a graph of its own.
        found, gradients = self.grad(input_ids, position_ids, doc_ids, where, targets, ends, scale, router_scale)
        for n in range(len(self.buckets)):
            mine = [gradients[i] for i in self.groups[n]]
            ops.assign_add(self.sums[n], flat(self.buckets[n], mine))
        return found[1], found[2]


class Reduce(nn.Cell):
    """Sum the gradients over the workers, in place, bucket by bucket -> the sum of the whole model's squares."""

    def __init__(self, optimizer: Optimizer, world: World, plan: TensorPlan | None):
        super().__init__(auto_prefix=False)
        self.sums = optimizer.sums
        kinds = [bucket.kind for bucket in optimizer.buckets]
        groups = {kind: world.neighbours(kind.copies) for kind in kinds}
        self.kinds = tuple(groups)
        self.kind_of = tuple(self.kinds.index(kind) for kind in kinds)
        self.shares = tuple(kind.share for kind in kinds)
        self.counted = tuple(1.0 / kind.copies for kind in kinds)
        self.reduced = tuple(group is not None for group in groups.values())
        self.totals = nn.CellList([AllReduce(g) if g is not None else nn.Identity() for g in groups.values()])
        self.shared = plan is not None
        self.over_row = AllReduce(plan.group) if plan is not None else None

    def construct(self):
        squares = ()
        for n in range(len(self.sums)):
            total = self.sums[n]
            value = total.value()
            if self.reduced[self.kind_of[n]]:
                value = self.totals[self.kind_of[n]](value)
                if self.shares[n] != 1.0:
                    value = value * self.shares[n]
                ops.assign(total, value)
            squares += (ops.square(value).sum() * self.counted[n],)
        found = ops.stack(squares).sum()
        return self.over_row(found) if self.shared else found


class Clear(nn.Cell):
    """Forget the gradients."""

    def __init__(self, optimizer: Optimizer):
        super().__init__(auto_prefix=False)
        self.sums = optimizer.sums

    def construct(self):
        for total in self.sums:
            ops.assign(total, ops.zeros_like(total))
        return True


class Update(nn.Cell):
    """One AdamW update of every bucket from its sum of gradients, which is cleared."""

    def __init__(self, optimizer: Optimizer):
        super().__init__(auto_prefix=False)
        cfg = optimizer.cfg
        self.beta1, self.beta2, self.eps = cfg.beta1, cfg.beta2, cfg.eps
        self.buckets, self.groups, self.weights = optimizer.buckets, optimizer.groups, optimizer.weights
        self.sums, self.first, self.second = optimizer.sums, optimizer.first, optimizer.second
        self.masters, self.rank, self.shards = optimizer.masters, optimizer.rank, optimizer.shards
        self.all_gather = Gather(optimizer.shard_group) if self.shards > 1 else None
        self.kernel = native.adamw() if native.available() and not runtime.on_ascend() else None
        decays = (bucket.decay for bucket in self.buckets)
        self.settings = tuple(Tensor([cfg.beta1, cfg.beta2, cfg.eps, decay], ms.float32) for decay in decays)

    def construct(self, factor, rate, correction1, correction2):
        """float32 scalars: the factor on the gradients (clipping), the learning rate, and ``1 - beta^step`` of both
        moments, the second one's root."""
        for n in range(len(self.buckets)):
            bucket = self.buckets[n]
            gradient = self.part(bucket, self.sums[n].value())
            first, second = self.first[n].value(), self.second[n].value()
            if self.masters is None:
                weight = self.part(bucket, flat(bucket, [self.weights[i] for i in self.groups[n]]))
            else:
                weight = self.masters[n].value()
            if self.kernel is not None:
                numbers = ops.stack((factor, rate, correction1, correction2))
                weight, first, second = self.kernel(weight, gradient, first, second, numbers, self.settings[n])
            else:
                gradient = gradient * factor
                first = first * self.beta1 + gradient * (1.0 - self.beta1)
                second = second * self.beta2 + ops.square(gradient) * (1.0 - self.beta2)
                step = first / (ops.sqrt(second) / correction2 + self.eps)
                if bucket.decay:
                    weight = weight * (1.0 - rate * bucket.decay)
                weight = weight - step * (rate / correction1)
            ops.assign(self.first[n], first)
            ops.assign(self.second[n], second)
            if self.masters is not None:
                ops.assign(self.masters[n], weight)
            if self.shards > 1:
                weight = self.all_gather(weight).reshape(-1)
            self.write(n, weight)
            ops.assign(self.sums[n], ops.zeros_like(self.sums[n]))
        return True

    def part(self, bucket, whole):
        """This worker's part of a flat bucket."""
        if self.shards == 1:
            return whole
        return ops.slice(whole, (self.rank * bucket.part,), (bucket.part,))

    def write(self, n, values):
        place = 0
        for i in self.groups[n]:
            weight = self.weights[i]
            piece = ops.slice(values, (place,), (weight.size,))
            ops.assign(weight, piece.reshape(weight.shape).astype(weight.dtype))
            place += weight.size


class Optimizer:
    """AdamW with weight decay on matrices only (not on biases and norms), clipping, and named, saveable state.

    ``master`` of the settings: ``same`` keeps no float32 copy of 16-bit weights. With ``world.shard_optimizer`` each worker
    among those that train on different rows keeps a part of the state; ``plan``: how a row of workers shares the layers.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        cfg: TrainConfig,
        world: World | None = None,
        plan: TensorPlan | None = None,
    ):
        world = World() if world is None else world
        self.cfg, self.clip_norm, self.plan = cfg, cfg.clip_norm, plan
        sharded = world.shard_optimizer and world.data_size > 1
        self.shards, self.rank = (world.data_size, world.data_rank) if sharded else (1, 0)
        self.shard_group = world.neighbours() if sharded else None
        self.parameters = {parameter.name: parameter for parameter in parameters}
        self.weights = ms.ParameterTuple(parameters)
        self.buckets = tuple(make_buckets(parameters, cfg.weight_decay, self.shards, kind_of=self._kind))
        place = {parameter.name: i for i, parameter in enumerate(parameters)}
        self.groups = tuple(tuple(place[name] for name in bucket.names) for bucket in self.buckets)
        self.sums = self._vectors("gradients", whole=True)
        self.first, self.second = self._vectors("exp_avg"), self._vectors("exp_avg_sq")
        narrow = cfg.master == "fp32" and any(p.dtype != ms.float32 for p in parameters)
        self.masters = self._vectors("master") if narrow else None
        if narrow:
            self._fill(self.masters, {name: to_numpy(p) for name, p in self.parameters.items()}, own=True)
        self.step_number = 0
        self._reduce, self._update, self._clear = Reduce(self, world, plan), Update(self), Clear(self)

    def _kind(self, name: str) -> Kind:
        return WHOLE if self.plan is None else Kind(self.plan.copies(name), self.plan.partial(name))

    def _vectors(self, what: str, whole: bool = False) -> ms.ParameterTuple:
        return ms.ParameterTuple(
            Parameter(
                Tensor(np.zeros(bucket.length if whole else bucket.part, np.float32)),
                name=f"optimizer.{what}.{n}",
                requires_grad=False,
            )
            for n, bucket in enumerate(self.buckets)
        )

    def norm(self, scale: float = 1.0) -> float:
        """Sum the gradients over the workers -> the Euclidean norm of all of them together, divided by ``scale``, which
        they were multiplied with."""
        self.scale = scale
        self.last_norm = math.sqrt(float(self._reduce().asnumpy())) / scale
        return self.last_norm

    def clear(self) -> None:
        self._clear()

    def step(self, rate: float) -> None:
        """Scale the gradients to at most ``clip_norm`` (:meth:`norm` comes before), update, and clear them."""
        self.step_number += 1
        factor = 1.0 / self.scale
        if math.isfinite(self.clip_norm):  # torch's clip_grad_norm_
            factor *= min(1.0, self.clip_norm / (self.last_norm + 1e-6))
        numbers = (
            factor,
            rate,
            1.0 - self.cfg.beta1**self.step_number,
            math.sqrt(1.0 - self.cfg.beta2**self.step_number),
        )
        self._update(*(Tensor(number, ms.float32) for number in numbers))

    @property
    def trainable(self) -> int:
        """Trained parameters of the whole model."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        if self.plan is not None:
            shapes = {name: self.plan.whole_shape(name, shape) for name, shape in shapes.items()}
        return sum(math.prod(shape) for shape in shapes.values())

    # --- state ---

    def names(self) -> list[str]:
        return list(self.parameters)

    def trained(self) -> dict[str, np.ndarray]:
        """The trained weights in their master precision, whole. Every worker has to call it."""
        if self.masters is not None:
            return self._split(self.masters)
        return {name: self._whole(name, to_numpy(parameter)) for name, parameter in self.parameters.items()}

    def state(self) -> dict[str, np.ndarray]:
        """``<parameter>.step | exp_avg | exp_avg_sq``; empty before the first update. Every worker has to call it."""
        if self.step_number == 0:
            return {}
        found = {f"{name}.step": np.float32(self.step_number).reshape(()) for name in self.parameters}
        for key, vectors in zip(_MOMENTS, (self.first, self.second)):
            found |= {f"{name}.{key}": value for name, value in self._split(vectors).items()}
        return found

    def load(self, weights: dict[str, np.ndarray], state: dict[str, np.ndarray]) -> None:
        """Put saved weights and state back. Raises :class:`UserError` naming the first tensor that does not fit."""
        for name in self.parameters:
            self._check(name, weights.get(name), name)
        for name in weights:
            if name not in self.parameters:
                raise UserError(f"the checkpoint trains {name}, this run does not", where="optimizer")
        moments = {key: {name: state[f"{name}.{key}"] for name in self.parameters} for key in _MOMENTS if state}
        for key, values in moments.items():
            for name, value in values.items():
                self._check(f"{name}.{key}", value, name)
        for name, parameter in self.parameters.items():
            set_value(parameter, self._part(name, weights[name]))
        if self.masters is not None:
            self._fill(self.masters, weights)
        for key, vectors in zip(_MOMENTS, (self.first, self.second)):
            if state:
                self._fill(vectors, moments[key])
        steps = {int(state[f"{name}.step"]) for name in self.parameters} if state else {0}
        assert len(steps) == 1, "parameters of different ages"
        self.step_number = steps.pop()

    def _part(self, name: str, whole: np.ndarray) -> np.ndarray:
        return whole if self.plan is None else self.plan.take(name, whole)

    def _whole(self, name: str, part: np.ndarray) -> np.ndarray:
        if self.plan is None:
            return part.copy()
        return np.ascontiguousarray(self.plan.join(name, gather_now(self.plan.group, np.ascontiguousarray(part))))

    def _fill(self, vectors: ms.ParameterTuple, values: dict[str, np.ndarray], own: bool = False) -> None:
        """Whole ``values``, or this worker's ``own`` parts, into the buckets."""
        for bucket, vector in zip(self.buckets, vectors):
            whole = np.zeros(bucket.length, np.float32)
            place = 0
            for name, size in zip(bucket.names, bucket.sizes):
                whole[place : place + size] = (values[name] if own else self._part(name, values[name])).reshape(-1)
                place += size
            vector.set_data(Tensor(whole[self.rank * bucket.part :][: bucket.part]))

    def _split(self, vectors: ms.ParameterTuple) -> dict[str, np.ndarray]:
        found = {}
        for bucket, vector in zip(self.buckets, vectors):
            whole = gather_now(self.shard_group, vector.asnumpy()).reshape(-1)
            place = 0
            for name, shape, size in zip(bucket.names, bucket.shapes, bucket.sizes):
                found[name] = self._whole(name, whole[place : place + size].reshape(shape))
                place += size
        return {name: found[name] for name in self.parameters}

    def _check(self, what: str, saved: np.ndarray | None, name: str) -> None:
        shape = tuple(self.parameters[name].shape)
        shape = shape if self.plan is None else self.plan.whole_shape(name, shape)
        found = "missing" if saved is None else f"{tuple(saved.shape)} {saved.dtype}"
        expected = f"{shape} float32"
        if found != expected:
            raise UserError(
                f"{what} is {found} in the checkpoint, this run needs {expected}",
                where="train.resume=true",
                hint="the settings of the first run (train.master, train.dtype, lora.rank), or a new run",
            )
