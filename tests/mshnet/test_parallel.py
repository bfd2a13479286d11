"""An update does not know who computes it: one process against several real ones, on a network of a few channels."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mshnet import ModelConfig
from mshnet.architectures import build
from mshnet.backbone import Features
from mshnet.config import Architecture, TrainingConfig
from mshnet.data.batches import EpisodeBatch
from mshnet.engine import Part, Update, make_optimizer, train_step
from mshnet.errors import InputError
from mshnet.features import FeatureCache
from mshnet.masking import resize
from mshnet.model import Prediction
from mshnet.parallel import (
    BatchNorm2d,
    ChannelDropout,
    Share,
    rank_and_world,
    set_share,
    share_of,
    synchronise_batch_norm,
)
from tests import tolerances
from tests.mshnet import worlds
from tests.mshnet.noise_episodes import episode_batch

BATCH = 8
EPISODES = [(row, (row + 1,)) for row in range(BATCH)]
CHANNELS = 6


class SmallRelation(nn.Module):
    """All that matters here, three times over: convolution, batch norm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        widths = itertools.pairwise([6, CHANNELS, CHANNELS, CHANNELS])
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU(), ChannelDropout(0.2)) for a, b in widths
        )
        self.head = nn.Conv2d(CHANNELS, 2, 1)
        self.poisoned = False

    def forward(self, query: Features, support: Features, masks: Tensor) -> Prediction:
        x = torch.cat([query.level3[:, 0], support.level3[:, 0]], dim=1)
        for block in self.blocks:
            x = block(x)
        inner = self.head(x)
        if self.poisoned:
            inner = inner * math.nan
        low = resize(inner, (2 * inner.shape[-2], 2 * inner.shape[-1]))
        return Prediction(logits_low=low, inner_logits=(inner,), size=(low.shape[-2], low.shape[-1]))


@dataclass
class AtPrecision:
    """A network behind a wrapper, as the pipelines' for bfloat16."""

    module: nn.Module
    dtype: torch.dtype

    def __call__(self, query: Features, support: Features, masks: Tensor) -> Prediction:
        query, support = (Features(*(maps.to(self.dtype) for maps in features)) for features in (query, support))
        prediction: Prediction = self.module(query, support, masks.to(self.dtype))
        return prediction


class Thumbnails(FeatureCache):
    """Features without a backbone."""

    def __init__(self) -> None:
        pass

    def of(self, batch: EpisodeBatch) -> tuple[Features, Features]:
        query, support = (
            F.adaptive_avg_pool2d(images.float() / 255, 12)[:, None]
            for images in (batch.query_images, batch.support_images.flatten(0, 1))
        )
        return Features(query, query, query), Features(support, support, support)


@dataclass(frozen=True)
class Outcome:
    """What a process holds after its updates."""

    losses: Tensor
    finite: list[bool]
    gradients: dict[str, Tensor]
    """Of the last update."""
    state: dict[str, Tensor]
    """Weights, and batch norm's buffers."""
    momentum: list[Tensor]


@dataclass(frozen=True)
class Training:
    """Some updates on the same episodes, as one process of a world."""

    dtype: torch.dtype = torch.float64
    cuts: tuple[int, ...] | None = None
    """Where a part is cut into shares; None: as even as can be."""
    episodes: int = BATCH
    statistics_batch: int = BATCH
    updates: int = 3
    real: bool = False
    """The network itself instead of the small one."""
    architecture: Architecture = "mshnet"
    """Of the network itself."""
    poisoned_rank: int | None = None
    """Whose loss is nan in the last update."""
    compiled: bool = False
    """By `torch.compile`, without the code generator at its end."""

    def __call__(self, rank: int, world_size: int) -> Outcome:
        torch.manual_seed(0)
        described = ModelConfig(architecture=self.architecture, backbone="resnet18")
        whole = build(described).train() if self.real else None
        bare = (whole.relation if whole else SmallRelation()).to(self.dtype)
        features = FeatureCache(whole.backbone, 0) if whole else Thumbnails()
        network = bare
        if world_size > 1:
            synchronise_batch_norm(bare)
            # Buckets so small that their collectives meet those of batch norm.
            network = DistributedDataParallel(bare, bucket_cap_mb=None if self.real or self.compiled else 1e-3)
        if self.compiled:
            network.compile(backend="aot_eager", dynamic=False)
        optimizer = make_optimizer(network.parameters(), TrainingConfig(learning_rate=0.05))
        updates: list[Update] = []
        for step in range(self.updates):
            bare.poisoned = rank == self.poisoned_rank and step + 1 == self.updates
            parts = self.parts(rank, world_size)
            updates.append(train_step(AtPrecision(network, self.dtype), features, parts, optimizer, 0.3, seed=step))
        return Outcome(
            losses=torch.stack([update.losses for update in updates]),
            finite=[bool(update.finite) for update in updates],
            gradients={name: parameter.grad for name, parameter in bare.named_parameters()},
            state=bare.state_dict(),
            momentum=[state["momentum_buffer"] for state in optimizer.state_dict()["state"].values()],
        )

    def parts(self, rank: int, world_size: int) -> list[Part]:
        share = share_of(self.statistics_batch, rank, world_size)
        if self.cuts and world_size > 1:
            share = Share(self.cuts[rank], self.cuts[rank + 1], self.statistics_batch)
        firsts = range(0, self.episodes, self.statistics_batch)
        return [Part(episode_batch(EPISODES[first + share.start : first + share.stop]), share) for first in firsts]


@dataclass(frozen=True)
class Normalised:
    """Batch norm's output and gradients."""

    y: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Normalising:
    """Batch norm alone, on a share of the same maps; each process's mean is another one."""

    dtype: torch.dtype
    cuts: tuple[int, ...]
    memory_format: torch.memory_format = torch.contiguous_format
    offset: float = 3.0
    compiled: bool = False

    def __call__(self, rank: int, world_size: int) -> Normalised:
        torch.manual_seed(0)
        norm: nn.Module = nn.Sequential(nn.BatchNorm2d(CHANNELS))
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        x = (
            torch.randn(BATCH, CHANNELS, 5, 4, dtype=torch.float64)
            + self.offset * torch.arange(BATCH)[:, None, None, None]
        )
        toward = torch.randn(BATCH, CHANNELS, 5, 4, dtype=torch.float64)
        if world_size > 1:
            synchronise_batch_norm(norm)
            x, toward = (t[self.cuts[rank] : self.cuts[rank + 1]] for t in (x, toward))
        x = x.to(self.dtype).contiguous(memory_format=self.memory_format).requires_grad_()
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        y = (torch.compile(norm.to(wide), backend="eager") if self.compiled else norm.to(wide))(x)
        assert y.is_contiguous(memory_format=self.memory_format)
        y.backward(toward.to(self.dtype))  # always contiguous, whatever y is
        weight, bias = norm.parameters()
        return Normalised(y.detach(), x.grad, weight.grad, bias.grad, norm.state_dict())


@dataclass(frozen=True)
class CheckingGradients:
    """Torch's gradcheck of the code for several processes, in groups of one."""

    def __call__(self, rank: int, world_size: int) -> bool:
        norm = nn.Sequential(nn.BatchNorm2d(2)).double()
        synchronise_batch_norm(norm)
        norm[0].group, _ = distributed.new_subgroups(group_size=1)
        torch.manual_seed(rank)
        nn.init.uniform_(norm[0].weight, 0.5, 1.5)
        x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)

        def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return torch.func.functional_call(norm, {"0.weight": weight, "0.bias": bias}, (x,))

        y = normalise(x, norm[0].weight, norm[0].bias)
        return y.grad_fn.name().startswith("_SharedBatchNorm") and torch.autograd.gradcheck(
            normalise, (x, norm[0].weight, norm[0].bias), rtol=1e-6, atol=1e-8
        )


EVEN, UNEVEN = Training(), Training(cuts=(0, 3, 8))
HALVES = Training(statistics_batch=4)
UNEVEN_HALVES = Training(statistics_batch=4, cuts=(0, 3, 4))
SINGLE, POISONED = Training(dtype=torch.float32), Training(updates=2, poisoned_rank=1)
REAL = Training(updates=1, real=True, episodes=4, statistics_batch=4)  # torch has no fast float64 convolution
REAL_PANET = Training(updates=2, real=True, architecture="panet")  # two times four against eight
BRIEF = Training(updates=1)
COMPILED, REAL_COMPILED = replace(UNEVEN_HALVES, compiled=True), replace(REAL, compiled=True)
NORMS = (
    Normalising(torch.float64, (0, 3, 8)),
    Normalising(torch.float64, (0, 4, 8), torch.channels_last),
    Normalising(torch.float32, (0, 7, 8)),
    Normalising(torch.float32, (0, 1, 8), torch.channels_last),
    Normalising(torch.bfloat16, (0, 3, 8)),
    Normalising(torch.bfloat16, (0, 4, 8), torch.channels_last),
    Normalising(torch.float64, (0, 2, 8), compiled=True),
)
FAR = Normalising(torch.float32, (0, 3, 8), offset=1e4)
CHECK = CheckingGradients()
IN_TWO = (
    EVEN,
    UNEVEN,
    HALVES,
    UNEVEN_HALVES,
    SINGLE,
    SINGLE,
    POISONED,
    BRIEF,
    REAL,
    REAL_PANET,
    COMPILED,
    REAL_COMPILED,
    *NORMS,
    FAR,
    CHECK,
)
UNEVEN_FOUR = Training(cuts=(0, 1, 4, 6, 8))
IN_FOUR = (EVEN, UNEVEN_FOUR, HALVES)

SCENARIOS: dict[int, tuple[worlds.Scenario, ...]] = {4: IN_FOUR, 2: IN_TWO}
Found = dict[int, list[list[Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two and four processes found: `found[world_size][number of the scenario][rank]`."""
    return worlds.run(SCENARIOS, tmp_path_factory.mktemp("worlds"))


def of(found: Found, world_size: int, scenario: worlds.Scenario) -> list[Any]:
    """By rank."""
    return found[world_size][SCENARIOS[world_size].index(scenario)]


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    """Relative to the largest magnitude."""
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * float(expected.abs().max()) + 1e-300)


def assert_same_training(found: Outcome, expected: Outcome, bound: float) -> None:
    assert all(found.finite)
    assert_close(found.losses, expected.losses, bound)
    assert found.state.keys() == expected.state.keys()
    for name, tensor in expected.state.items():
        assert_close(found.state[name], tensor, bound)
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        # A bias before a batch norm has gradient 0, of which rounding remains.
        torch.testing.assert_close(found.gradients[name], gradient, rtol=0, atol=bound * largest)


def assert_same_bits(found: Outcome, expected: Outcome) -> None:
    assert torch.equal(found.losses, expected.losses)
    for a, b in ((found.state, expected.state), (found.gradients, expected.gradients)):
        assert all(torch.equal(a[name], tensor) for name, tensor in b.items())
    assert all(torch.equal(a, b) for a, b in zip(found.momentum, expected.momentum, strict=True))


@pytest.mark.parametrize("training", [EVEN, UNEVEN, HALVES, UNEVEN_HALVES])
def test_two_processes_train_as_one(found: Found, training: Training) -> None:
    """Losses, gradients, weights and running statistics, dropout on; shares of 4 and 4, 3 and 5, 3 and 1."""
    expected = training(0, 1)
    for outcome in of(found, 2, training):
        assert_same_training(outcome, expected, tolerances.SAME_COMPUTATION.bound)


@pytest.mark.parametrize("training", IN_FOUR)
def test_four_processes_train_as_one(found: Found, training: Training) -> None:
    """Shares of two each, of 1, 3, 2, 2, and of one each in parts of four."""
    expected = training(0, 1)
    for outcome in of(found, 4, training):
        assert_same_training(outcome, expected, tolerances.SAME_COMPUTATION.bound)


def test_in_float32(found: Found) -> None:
    expected = SINGLE(0, 1)
    for outcome in of(found, 2, SINGLE):
        assert_same_training(outcome, expected, tolerances.SAME_UPDATE.bound)


@pytest.mark.parametrize("training", [REAL, REAL_PANET], ids=["mshnet", "panet"])
def test_the_network_itself(found: Found, training: Training) -> None:
    """In float64: in float32 one process's own rounding was a quarter of its largest gradient after two updates."""
    expected = training(0, 1)
    for outcome in of(found, 2, training):
        assert_same_training(outcome, expected, tolerances.PARITY_GRADIENT.bound)


@pytest.mark.parametrize(("compiled", "plain"), [(COMPILED, UNEVEN_HALVES), (REAL_COMPILED, REAL)])
def test_compiled_they_train_the_same(found: Found, compiled: Training, plain: Training) -> None:
    """Collectives, dropout and gradients of several parts, in pieces of compiled code between them."""
    for outcome, expected in zip(of(found, 2, compiled), of(found, 2, plain), strict=True):
        assert_same_training(outcome, expected, tolerances.SAME_COMPUTATION.bound)


def test_processes_hold_the_same_bits(found: Found) -> None:
    for world_size, scenarios in SCENARIOS.items():
        for scenario, (first, *others) in zip(scenarios, found[world_size], strict=True):
            if isinstance(scenario, Training) and scenario is not POISONED:
                for other in others:
                    assert_same_bits(other, first)


def test_the_same_world_twice_gives_the_same_bits(found: Found) -> None:
    first, second = (world for scenario, world in zip(IN_TWO, found[2], strict=True) if scenario is SINGLE)
    for rank in range(2):
        assert_same_bits(second[rank], first[rank])


def test_the_batch_that_shares_statistics_matters() -> None:
    """Else nothing would be shown by the parts' tests; what stays the same is the number of episodes."""
    whole, halves = EVEN(0, 1), HALVES(0, 1)
    assert (whole.losses[0] - halves.losses[0]).abs().max() > 1e-3
    name = "blocks.0.1.num_batches_tracked"
    assert (int(whole.state[name]), int(halves.state[name])) == (3, 6)


def test_a_loss_that_is_not_finite_on_one_process_stops_all(found: Found) -> None:
    before = of(found, 2, BRIEF)[0]
    for outcome in of(found, 2, POISONED):
        assert outcome.finite == [True, False]
        assert torch.equal(outcome.losses[0], before.losses[0])
        assert outcome.losses[1].isnan().all()
        for name in outcome.gradients:
            assert torch.equal(outcome.state[name], before.state[name])
        assert all(torch.equal(a, b) for a, b in zip(outcome.momentum, before.momentum, strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_batch_norm_is_torchs_on_the_whole_batch(found: Found, norm: Normalising) -> None:
    bound = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7}[norm.dtype]
    # Torch's own sums for mixed memory formats are rounded to bfloat16.
    expected = replace(norm, memory_format=torch.contiguous_format)(0, 1)
    shares = of(found, 2, norm)
    assert_close(torch.cat([share.y for share in shares]), expected.y, bound)
    assert_close(torch.cat([share.grad_x for share in shares]), expected.grad_x, bound)
    assert shares[0].y.dtype == shares[0].grad_x.dtype == norm.dtype
    bound = min(bound, 1e-5)  # the sums are float32 whatever the input
    assert_close(sum(share.grad_weight for share in shares), expected.grad_weight, bound)
    assert_close(sum(share.grad_bias for share in shares), expected.grad_bias, bound)
    for share in shares:
        assert share.state.keys() == expected.state.keys()
        for name, tensor in expected.state.items():
            assert share.state[name].dtype == tensor.dtype
            assert_close(share.state[name], tensor, bound)


def test_a_small_variance_beside_a_large_mean(found: Found) -> None:
    """Episode i lies at 10,000 i with deviation 1; running variances of either process alone would be far off."""
    exact = Normalising(torch.float64, FAR.cuts, offset=FAR.offset)(0, 1)
    for share in of(found, 2, FAR):
        assert_close(share.state["0.running_var"], exact.state["0.running_var"].float(), 1e-6)
        assert_close(share.state["0.running_mean"], exact.state["0.running_mean"].float(), 1e-6)


def test_gradcheck_of_batch_norm(found: Found) -> None:
    assert of(found, 2, CHECK) == [True, True]


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The run-time check of shapes, which the compiler cannot see through, is off."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("training", [True, False])
def test_alone_batch_norm_is_torchs_bit_for_bit(training: bool) -> None:
    assert rank_and_world() == (0, 1)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)).train(training)
    ours = copy.deepcopy(plain)
    parameters, state = list(ours.parameters()), ours.state_dict()
    synchronise_batch_norm(ours)
    assert type(ours[1]) is BatchNorm2d
    assert ours[1].training is training
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert all(ours.state_dict()[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())
    x = torch.randn(4, 3, 9, 9)
    outputs = []
    for network in (plain, ours, torch.compile(copy.deepcopy(ours), backend="eager", fullgraph=True)):
        y = network(x)
        y.square().sum().backward()
        outputs.append((y, *(p.grad for p in network.parameters()), *network.buffers()))
    for output in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(output, outputs[0], strict=True))


@pytest.mark.usefixtures("unchecked")
def test_dropout_without_a_share_is_torchs_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 40, 3, 2, dtype=dtype)
        for ours in (ChannelDropout(0.2), torch.compile(ChannelDropout(0.2), backend="eager", fullgraph=True)):
            torch.manual_seed(3)
            expected = nn.Dropout2d(0.2)(x)
            torch.manual_seed(3)
            assert torch.equal(ours(x), expected)
    assert ChannelDropout(0.2).eval()(x) is x
    assert ChannelDropout(0.0)(x) is x


def test_an_episodes_mask_does_not_depend_on_the_share() -> None:
    """Two calls, as of two layers or parts: the second draws other masks, the same for every share."""
    x = torch.randn(BATCH, 50, 2, 2)

    def dropped(share: Share | None) -> list[Tensor]:
        network = nn.ModuleList([ChannelDropout(0.3), nn.ModuleList([ChannelDropout(0.3)])])
        if share:
            set_share(network, share)
        torch.manual_seed(11)
        own = x[share.start : share.stop] if share else x
        return [network[0](own), network[1][0](own)]

    whole = dropped(None)
    assert not torch.equal(whole[0], whole[1])
    assert 0.2 < (whole[0] == 0).float().mean() < 0.4
    for world_size in (1, 2, 3, 8):
        shares = [dropped(share_of(BATCH, rank, world_size)) for rank in range(world_size)]
        for call in range(2):
            assert torch.equal(torch.cat([share[call] for share in shares]), whole[call])


@pytest.mark.parametrize("total", [1, 4, 8, 11, 14])
def test_shares_are_neighbours_and_as_even_as_can_be(total: int) -> None:
    for world_size in range(1, total + 1):
        shares = [share_of(total, rank, world_size) for rank in range(world_size)]
        positions = [i for share in shares for i in range(share.start, share.stop)]
        assert positions == list(range(total))
        sizes = [len(share) for share in shares]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
        assert {share.total for share in shares} == {total}


def test_more_processes_than_episodes() -> None:
    with pytest.raises(InputError, match="at least one episode for each of 3 workers, found 2 that share"):
        share_of(2, 0, 3)
