"""AdamW (arXiv 1711.05101) over flat buckets of parameters, with its state on every worker or each on one.

Parameters of one kind (matrices decay, vectors do not) lie one after another in buckets of up to ``BUCKET`` bytes: one
collective and a dozen kernels per bucket instead of per parameter. Gradients are added up in float32 buckets; moments,
and masters where the weights are 16-bit, are float32. With ``shards`` > 1 a worker keeps moments and masters of its own
part of every bucket only (ZeRO stage 1, arXiv 1910.02054): it updates that part, and the workers gather the whole.

Workers that hold the same values (:class:`research.core.mindspore.buckets.Kind`) add their gradients up, so that they stay the
same, and share the norm of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from research.core.config.schema import TrainConfig
from research.core.errors import ConfigError, UserError
from research.core.mindspore import native, runtime
from research.core.mindspore.buckets import WHOLE, Kind, flat, make_buckets, piece
from research.core.mindspore.collectives import AllReduce, Gather, Group, gather_now, sum_now
from research.core.mindspore.parallel import World
from research.core.mindspore.plan import Plan
from research.core.mindspore.weights import set_value, to_numpy

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Reduce(nn.Cell):
    """Sum the gradients over the workers, in place, bucket by bucket -> the sum of the whole model's squares."""

    def __init__(self, optimizer: Optimizer, world: World, plan: Plan | None):
        super().__init__(auto_prefix=False)
        self.sums = optimizer.sums
        kinds = [bucket.kind for bucket in optimizer.buckets]
        groups = {kind: world.neighbours(kind.copies, kind.stages) for kind in kinds}
        self.kinds = tuple(groups)
        self.kind_of = tuple(self.kinds.index(kind) for kind in kinds)
        self.shares = tuple(kind.share for kind in kinds)
        self.counted = tuple(kind.counted for kind in kinds)
        self.reduced = tuple(group.size > 1 for group in groups.values())
        self.totals = nn.CellList([AllReduce(g) if g.size > 1 else nn.Identity() for g in groups.values()])
        self.shared = plan is not None
        self.over_model = AllReduce(world.model_group()) if plan is not None else None

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
        return self.over_model(found) if self.shared else found


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
            ops.assign(weight, piece(values, place, weight))
            place += weight.size


class Optimizer:
    """AdamW with weight decay on matrices only (not on biases and norms), clipping, and named, saveable state.

    ``master`` of the settings: ``same`` keeps no float32 copy of 16-bit weights. With ``world.shard_optimizer`` each worker
    among those that train on different rows keeps a part of the state; ``plan``: how workers share the layers. Raises
    :class:`ConfigError` where a stage of a pipeline would train nothing.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        cfg: TrainConfig,
        world: World | None = None,
        plan: Plan | None = None,
    ):
        world = World() if world is None else world
        self.cfg, self.clip_norm, self.plan = cfg, cfg.clip_norm, plan
        sharded = world.shard_optimizer and world.data_size > 1
        self.shards, self.rank = (world.data_size, world.data_rank) if sharded else (1, 0)
        self.shard_group = world.neighbours() if sharded else Group("", 1, 0, False)
        self.parameters = {parameter.name: parameter for parameter in parameters}
        self.shapes = self._whole_shapes(world)
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
        self.column = world.column()

    def _whole_shapes(self, world: World) -> dict[str, tuple[int, ...]]:
        """Shapes of the trained parameters of the whole model, by name and in its order."""
        if self.plan is None:
            return {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        own = {name: self.plan.whole_shape(name, parameter.shape) for name, parameter in self.parameters.items()}
        if self.plan.stages == 1:
            return own
        every = world.collect(own)
        for rank, theirs in enumerate(every):
            if not theirs:
                raise ConfigError(
                    f"stage {world.grid.place(rank).stage} of the pipeline has nothing to train",
                    where="lora.target_modules",
                    hint="modules of every layer, or parallel.pipeline=1",
                )
        return {name: tuple(shape) for theirs in every for name, shape in theirs.items()}

    def _kind(self, name: str) -> Kind:
        plan = self.plan
        if plan is None:
            return WHOLE
        stages = plan.holders(name)
        partial = plan.partial(name) or plan.workers == 1
        return Kind(plan.copies(name), partial, stages if len(stages) > 1 else ())

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
        return sum(math.prod(shape) for shape in self.shapes.values())

    # --- state ---

    def trained(self) -> dict[str, np.ndarray]:
        """The trained weights in their master precision, whole and of all stages. Every worker has to call it."""
        if self.masters is not None:
            return self._split(self.masters)
        return self._every({name: self._whole(name, to_numpy(p)) for name, p in self.parameters.items()})

    def state(self) -> dict[str, np.ndarray]:
        """``<parameter>.step | exp_avg | exp_avg_sq``; empty before the first update. Every worker has to call it."""
        if self.step_number == 0:
            return {}
        found = {f"{name}.step": np.float32(self.step_number).reshape(()) for name in self.shapes}
        for key, vectors in zip(_MOMENTS, (self.first, self.second)):
            found |= {f"{name}.{key}": value for name, value in self._split(vectors).items()}
        return found

    def load(self, weights: dict[str, np.ndarray], state: dict[str, np.ndarray]) -> None:
        """Put saved weights and state back. Raises :class:`UserError` naming the first tensor that does not fit."""
        for name in self.shapes:
            self._check(name, weights.get(name), name)
        for name in weights:
            if name not in self.shapes:
                raise UserError(f"the checkpoint trains {name}, this run does not", where="optimizer")
        moments = {key: {name: state[f"{name}.{key}"] for name in self.shapes} for key in _MOMENTS if state}
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
        steps = {int(state[f"{name}.step"]) for name in self.shapes} if state else {0}
        assert len(steps) == 1, "parameters of different ages"
        self.step_number = steps.pop()

    def _part(self, name: str, whole: np.ndarray) -> np.ndarray:
        return whole if self.plan is None else self.plan.take(name, whole)

    def _whole(self, name: str, part: np.ndarray) -> np.ndarray:
        if self.plan is None:
            return part.copy()
        return np.ascontiguousarray(self.plan.join(name, gather_now(self.plan.group, np.ascontiguousarray(part))))

    def _every(self, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The whole tensors of this stage -> those of all stages."""
        if self.column.size == 1:
            return found
        out = {}
        for name, shape in self.shapes.items():
            mine = name in found and self.plan.answers_for(name)
            out[name] = sum_now(self.column, found[name] if mine else np.zeros(shape, np.float32))
        return out

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
        return self._every({name: found[name] for name in self.parameters})

    def _check(self, what: str, saved: np.ndarray | None, name: str) -> None:
        found = "missing" if saved is None else f"{tuple(saved.shape)} {saved.dtype}"
        expected = f"{self.shapes[name]} float32"
        if found != expected:
            raise UserError(
                f"{what} is {found} in the checkpoint, this run needs {expected}",
                where="train.resume=true",
                hint="the settings of the first run (train.master, train.dtype, lora.rank), or a new run",
            )
