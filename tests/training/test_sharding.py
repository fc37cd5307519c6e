"""Sharded over two processes a run equals that of one process, and what it refuses."""

import functools
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.utils._python_dispatch import TorchDispatchMode

from qwenlib.model import MoEConfig, Qwen
from qwenlib.post_training.completions import CompletionBatch
from qwenlib.post_training.preferences import PairBatch
from qwenlib.training import held_out_loss, launch, next_token_loss, train
from qwenlib.training.gradients import Gradients
from qwenlib.training.sharding import by_rank, part_of, shard, whole_weights
from tests.training import test_golden
from tests.training.test_loop import batch, model, settings

STEPS, RANKS = 20, 2
KINDS = ("dense tied", "dense untied", "moe tied", "moe untied")


def network(kind: str) -> Qwen:
    changes = {"tie_word_embeddings": kind.endswith(" tied")}
    if kind.startswith("moe"):
        changes["moe"] = MoEConfig(5, 2, 16, 32)  # five experts do not divide by two
    return Qwen(model().config.replace(**changes)).initialise(0)


def pieces(step: int, parts: int) -> list:
    """All rows of a step in so many micro-batches of unequal numbers of labels."""
    whole = batch(step)
    rows = len(whole.input_ids_BT)
    return [whole.rows(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]


def run(net: Qwen, parts: int = 4, **changes) -> dict:
    """A run whose steps have `parts` micro-batches, evaluated in between as well."""
    changes = {"max_steps": STEPS, "eval_every": 7, "ema_decay": 0.9} | changes
    result = train(
        net, by_rank(lambda step: pieces(step, parts)), next_token_loss, settings(**changes),
        show_progress=False, evaluate=lambda net: {"loss": held_out_loss(net, [batch(99)])},
    )  # fmt: skip
    rows = [[row[key] for key in ("loss", "grad_norm", "count")] for row in result.history]
    evaluations = [row["loss"] for row in result.evaluations]
    return {"rows": rows, "evaluations": evaluations, "weights": whole_weights(net)}


def cases() -> dict:
    """What the two processes do, by name: keywords of `shard`, and of `run`."""
    found = {kind: (kind, {}, {}) for kind in KINDS}
    found["one micro-batch"] = ("dense tied", {}, {"parts": 2})
    found["rows cut"] = ("dense tied", {}, {"parts": 1})
    found["summed each time"] = ("dense untied", {"sum_each": True}, {})
    found["copies"] = ("moe untied", {"replicas": 2}, {})
    found["blocks run again"] = ("dense untied", {}, {"activation_checkpointing": "full"})
    half = {"autocast": "bfloat16"}
    found["bf16"] = ("dense tied", half, half)
    return found


class Calls(TorchDispatchMode):
    """Names of the operations that ran inside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def sums_in_a_step(net: Qwen, **options) -> int:
    """Sums over ranks that the gradients of a step of three micro-batches take."""
    net = shard(Qwen(net.config).initialise(0), **options)
    with Calls() as seen, Gradients(net.parameters()) as gradients:
        gradients(net, pieces(0, 3), next_token_loss)
    return seen.names.count("c10d::_reduce_scatter_base_")


def one_rank(number: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=RANKS
    )
    kept = {}
    for name in names:
        kind, options, changes = cases()[name]
        net = shard(network(kind), **options)
        held = sum(p.to_local().numel() for p in net.parameters())
        kept[name] = run(net, **changes) | {"held": held}
    kept["sums"] = [sums_in_a_step(net, sum_each=each) for each in (False, True)]
    net = shard(network("dense tied"))
    try:
        train(net, lambda step: pieces(step, 1 + number), next_token_loss, settings(max_steps=1))
    except ValueError as error:
        kept["unequal"] = str(error)
    try:
        train(net, by_rank(lambda step: pieces(step, 2)), next_token_loss,
              settings(max_steps=2, save_every=1), out_dir=folder)  # fmt: skip
    except ValueError as error:
        kept["states"] = str(error)
    try:
        shard(network("dense tied"), replicas=3)
    except ValueError as error:
        kept["replicas"] = str(error)
    torch.save(kept, f"{folder}/rank{number}.pt")
    dist.destroy_process_group()


@functools.cache
def on_two_ranks(*names: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(one_rank, (folder, list(names)), RANKS)
        return [torch.load(f"{folder}/rank{i}.pt") for i in range(RANKS)]


def differences(one: dict, two: dict) -> tuple[float, float, float, float]:
    """Largest relative one of the losses and norms, of evaluations, and the weights' absolute."""
    assert [row[2] for row in one["rows"]] == [row[2] for row in two["rows"]], "labels"
    loss, norm = (
        max(abs(a[i] / b[i] - 1) for a, b in zip(two["rows"], one["rows"])) for i in (0, 1)
    )
    evaluation = max(
        abs(a / b - 1) for a, b in zip(two["evaluations"], one["evaluations"], strict=True)
    )
    assert one["weights"].keys() == two["weights"].keys()
    weights = max(
        (value - one["weights"][name]).abs().max().item() for name, value in two["weights"].items()
    )
    return loss, norm, evaluation, weights


def check(ranks: list[dict], name: str) -> None:
    kind, _, changes = cases()[name]
    alone = run(network(kind), **changes)
    first, second = (rank[name] for rank in ranks)
    assert first["rows"] == second["rows"], "ranks disagree"
    assert first["evaluations"] == second["evaluations"]
    assert not second["weights"], "only rank 0 is given whole weights"
    loss, norm, evaluation, weights = differences(alone, first)
    print(
        f"{name}: losses {loss:.1e}, norms {norm:.1e}, evaluations {evaluation:.1e} (relative), "
        f"weights {weights:.1e}"
    )
    total = sum(p.numel() for p in network(kind).parameters())
    if name == "copies":
        assert first["held"] == total
    else:
        assert first["held"] + second["held"] == total
        assert 0.35 < first["held"] / total < 0.65
    if name == "bf16":
        assert loss < 5e-3 and evaluation < 5e-3
        return
    assert loss < 1e-6 and norm < 1e-5 and evaluation < 1e-6
    assert weights < 1e-5


def test_two_ranks_equal_one():
    ranks = on_two_ranks("dense tied", "moe untied")
    check(ranks, "dense tied")
    check(ranks, "moe untied")
    units = model().config.num_hidden_layers + 1
    assert ranks[0]["sums"] == [units, 3 * units], "one for each unit, or with sum_each three"
    assert ranks[0]["unequal"].startswith("rank 0 has 1 micro-batches, others 1 to 2")
    assert ranks[0]["states"].startswith("the parts of a sharded model cannot be saved yet")
    assert ranks[1]["replicas"] == "2 ranks do not divide into 3 replicas of the model"


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
def test_every_kind_on_two_ranks_equals_one(name):
    check(on_two_ranks(*cases()), name)


@pytest.mark.slow
def test_every_stage_on_two_ranks_equals_one():
    """Pretraining, with router losses too, packed SFT and DPO: the curves of tests/golden."""

    def on_each_rank():
        def in_parts(net, batches, *rest, **options):
            return train(shard(net), by_rank(batches), *rest, **options)

        test_golden.train = in_parts
        return {name: stage() for name, stage in test_golden.CASES.items()}

    ranks = launch(on_each_rank, nproc=RANKS, device="cpu", show=False)
    for name, stage in test_golden.CASES.items():
        alone = stage()
        for key in ("loss", "grad_norm", "count"):
            off = max(abs(two[key] / one[key] - 1) for two, one in zip(ranks[name], alone))
            print(f"{name} {key}: {off:.1e}")
            assert off < (1e-5 if key == "grad_norm" else 1e-6), (name, key)


@pytest.mark.parametrize("parts, ranks", [(4, 2), (4, 4), (1, 2), (3, 2)])
def test_parts_of_a_step_are_all_its_rows_once(parts, ranks):
    made = [list(part_of(pieces(3, parts), number, ranks)) for number in range(ranks)]
    assert len({len(part) for part in made}) == 1, "as many micro-batches on each rank"
    rows = torch.cat([piece.input_ids_BT for part in made for piece in part])
    want = batch(3).input_ids_BT
    if parts % ranks == 0:
        assert torch.equal(rows, want), "in the order of one process"
    assert sorted(rows.tolist()) == sorted(want.tolist())


def test_parts_of_pairs_have_both_answers():
    rows = torch.arange(10)[:, None].expand(10, 3)  # five pairs: row i and row i + 5
    whole = PairBatch(CompletionBatch(rows, rows + 100), torch.arange(10.0))
    parts = [part_of([whole], number, 2)[0] for number in range(2)]
    for part, want in zip(parts, ([0, 1, 5, 6], [2, 3, 4, 7, 8, 9])):
        assert part.rows.input_ids_NT[:, 0].tolist() == want
        assert part.rows.labels_NT[:, 2].tolist() == [100 + i for i in want]
        assert part.reference_2B.tolist() == want


def test_what_cannot_be_shared_out():
    with pytest.raises(ValueError, match="1 micro-batches do not divide into 2 ranks, and a list"):
        part_of([[1, 2]], 0, 2)[0]
    few = batch(0).rows(0, 2)
    with pytest.raises(ValueError, match="micro-batch 1 has 2 rows, too few for 3 ranks"):
        part_of([few], 0, 3)[0]
    with pytest.raises(ValueError, match="autocast must be 'none' or 'bfloat16' here, got 'auto'"):
        shard(model(), autocast="auto")


def test_alone_nothing_happens():
    net = model()

    def batches(step):
        return [batch(step)]

    assert by_rank(batches) is batches
    assert shard(net) is net and type(net) is Qwen
    assert whole_weights(net).keys() == net.state_dict().keys()
