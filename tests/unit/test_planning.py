"""The planner's arithmetic: sizes, links, what is recommended, and what the words say. No engine runs here."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import LoraArguments, ModelArguments, TrainArguments
from pipeline.methods import load_method
from pipeline.planning.activations import Row, Subject
from pipeline.planning.arguments import PlanArguments
from pipeline.planning.communication import Traffic, collective_seconds, link_seconds, traffic
from pipeline.planning.description import shown
from pipeline.planning.gathering import Gathers
from pipeline.planning.hardware import GPUS, Cluster, of_device_name
from pipeline.planning.plan import Job, plan
from pipeline.planning.recommend import recommend, with_hpz
from pipeline.planning.report import nodes_table, over_node_counts, report
from pipeline.planning.sizes import SIZES, size_config
from pipeline.planning.states import ZeroSettings, states
from pipeline.planning.step_time import operations
from pipeline.training.meta_step import subject
from tests.tiny import tiny_llama

GIB = 2**30
# Parameters of the models on the hub, as their cards or their index files state them.
PUBLISHED = {
    "7b": 6_738_415_616,
    "8b": 8_030_261_248,
    "13b": 13_015_864_320,
    "34b": 34_388_917_248,
    "70b": 70_553_706_496,
}
PRODUCT = {
    "stage": 3, "reduce_bucket_size": 8192**2, "stage3_prefetch_bucket_size": int(0.9 * 8192**2),
    "stage3_param_persistence_threshold": 81_920, "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
}  # fmt: skip
DS_CONFIG = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": PRODUCT}


@functools.cache
def subject_of(size: str, checkpointing: bool, lora_r: int = 0) -> Subject:
    config = size_config(size) if size in SIZES else tiny_llama().config
    method: Any = load_method("surgery")
    train = TrainArguments(bf16=True, gradient_checkpointing=checkpointing)
    return subject(config, ModelArguments(), LoraArguments(lora_r=lora_r), train, method(method.Config()), cuda=True)


def job_of(size: str, nodes: int = 1, *, gpu: str = "h100-80gb", lora_r: int = 0, **changes: Any) -> Job:
    cluster = Cluster(GPUS[gpu], nodes, 8)
    job = Job(
        subject=lambda checkpointing: subject_of(size, checkpointing, lora_r), cluster=cluster,
        zero=ZeroSettings.read(DS_CONFIG, cluster.ranks), rows=4, accumulation=1, tokens=1024, references=(512, 512),
        trained_share=0.5, checkpointing=True,
    )  # fmt: skip
    return replace(job, **changes)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_published_number_of_parameters(size: str) -> None:
    assert sum(weight.numel for weight in subject_of(size, True).weights) == PUBLISHED[size]


def test_states_are_sixteen_bytes_and_more_a_parameter_divided_by_the_ranks() -> None:
    # bf16 weights 2, fp32 gradients 4, fp32 copy and moments 12; then what stays whole and the bucket.
    held = states(subject_of("8b", True).weights, ZeroSettings.read(DS_CONFIG, 8))
    assert (held.parameters, held.gradients, held.optimizer) == tuple(n * PUBLISHED["8b"] // 8 for n in (2, 4, 12))
    norms = (2 * 32 + 1) * 4096 * 2
    assert (held.whole_parameters, held.bucket) == (norms, 2 * 8192**2)
    assert held.on_device == sum((held.parameters, held.gradients, held.optimizer, norms, held.bucket))


def test_offload_moves_states_to_the_host_and_keeps_their_sum() -> None:
    weights = subject_of("8b", True).weights
    zero = ZeroSettings.read(DS_CONFIG, 8)
    on_device = states(weights, zero)
    on_host = states(weights, replace(zero, optimizer_on_host=True, parameters_on_host=True))
    assert on_host.on_device == on_device.whole_parameters + on_device.bucket
    moved = on_device.parameters + on_device.gradients + on_device.optimizer
    assert on_host.on_host == moved + PUBLISHED["8b"] // 8 * 4, "DeepSpeed keeps a second fp32 gradient there"


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "x"}}, "offload_optimizer: offload to NVMe"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights"),
        ({"zero_hpz_partition_size": 3}, "zero_hpz_partition_size 3: 8 ranks are not a multiple"),
    ],
)
def test_settings_that_are_not_planned_are_named(section: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ZeroSettings.read(DS_CONFIG | {"zero_optimization": PRODUCT | section}, 8)


def test_activations_do_not_depend_on_how_many_layers_were_traced() -> None:
    config = tiny_llama().config
    config.num_hidden_layers = 7
    method: Any = load_method("surgery")
    parts = (ModelArguments(), LoraArguments(), TrainArguments(bf16=True), method(method.Config()))
    row = Row((96, 64), (48, 48), 40)
    few = subject(config, *parts, cuda=True)
    every = replace(few, whole=True)
    extended, traced = few.activations(row), every.activations(row)
    assert (extended.saved, extended.logits) == (traced.saved, traced.logits)
    assert extended.peak == pytest.approx(traced.peak, rel=1e-3)
    bounds = PRODUCT | {"stage3_max_reuse_distance": 30_000, "stage3_prefetch_bucket_size": 20_000}
    zero = ZeroSettings.read(DS_CONFIG | {"zero_optimization": bounds}, 4)
    assert few.gathers(row, zero) == every.gathers(row, zero)


def test_references_of_a_checkpointed_layer_are_kept_as_its_input_alone() -> None:
    model = subject_of("tiny", True)
    with_references, without = (
        model.activations(Row((96, 64), references, 40)).saved for references in ((48, 48), ())
    )
    inputs = 2 * 96 * 64 * 2  # layers x tokens x hidden size x bytes; the last norm keeps as much in fp32, and more
    assert inputs < with_references - without < 4 * inputs


def test_weights_are_gathered_twice_and_gradients_reduced_once() -> None:
    job = job_of("70b", 2)
    found = plan(job)
    whole = 2 * PUBLISHED["70b"]
    assert 1.9 * whole < found.traffic.forward + found.traffic.backward < 2 * whole  # the last layers are still there
    assert found.traffic.reduced == whole
    assert 0 < found.gathers.live <= 2 * (10**9 + 128256 * 8192)
    assert (found.gathers.largest_module, found.gathers.largest) == ("model.embed_tokens", 2 * 128256 * 8192)


def test_hpz_gathers_what_changed_from_all_ranks_once() -> None:
    job = job_of("70b", 2, accumulation=4)
    plain, hpz = (traffic_of(replace(job, zero=replace(job.zero, hpz=size))) for size in (1, 8))
    small = hpz.small
    assert hpz.forward + hpz.backward == pytest.approx(2 * PUBLISHED["70b"] - small, rel=1e-6)
    assert hpz.forward_in_group + hpz.backward_in_group == plain.forward + plain.backward - hpz.forward
    frozen = traffic_of(job_of("70b", 2, lora_r=16, zero=replace(job.zero, hpz=8)))
    assert frozen.forward < 0.01 * PUBLISHED["70b"], "a frozen weight never changes"


def traffic_of(job: Job) -> Traffic:
    return plan(job).traffic


def test_links_are_those_of_the_slowest_way() -> None:
    gpu = GPUS["h100-80gb"]
    inside = collective_seconds(450 * 10**9, Cluster(gpu, 1, 8), 8)
    assert inside == pytest.approx(7 / 8 / 0.7)
    between = collective_seconds(400 * 10**9, Cluster(gpu, 4, 8), 32)
    assert between == pytest.approx(max(3 / 4 / 0.7, 400 / 450 * 31 / 32 / 0.7))
    assert collective_seconds(10**9, Cluster(gpu, 1, 1), 1) == 0


def test_a_slow_network_makes_hpz_worth_it_and_a_fast_one_does_not() -> None:
    def advice(network: float) -> tuple[float, str]:
        job = job_of("8b", 2)
        job = replace(job, cluster=replace(job.cluster, gpu=replace(job.cluster.gpu, between_nodes=network)))
        before = plan(job)
        hpz = with_hpz(job)
        assert hpz is not None
        norms = (2 * 32 + 1) * 4096  # small and trained: no second shard
        assert hpz.memory == 2 * (PUBLISHED["8b"] - norms) // 8
        assert hpz == with_hpz(replace(job, zero=replace(job.zero, hpz=8))), "the same, whichever was asked for"
        return before.time.exposed / before.time.overlapped, hpz.advice

    assert advice(50e9) == (pytest.approx(0, abs=1e-3), "not worth it")
    assert advice(8e9) == (pytest.approx(0, abs=1e-3), "worth it only where collectives do not hide")
    waits, advised = advice(1e9)
    assert advised == "use it"
    assert waits > 0.5
    assert with_hpz(job_of("8b", 1)) is None


def test_computing_is_six_operations_a_parameter_and_token() -> None:
    model = subject_of("70b", True)
    row = Row((1024,) * 4, (), 2048)
    work = operations(model.config, model.weights, row, checkpointing=True)
    embedding = 128256 * 8192
    dense = 6 * (PUBLISHED["70b"] - 2 * embedding) * row.tokens + 6 * embedding * row.trained
    assert work.useful == pytest.approx(dense, rel=0.03)  # attention is the rest
    assert work.recomputed == pytest.approx(work.forward, rel=0.03)
    lora = subject_of("70b", True, 16)
    frozen = operations(lora.config, lora.weights, row, checkpointing=False)
    assert frozen.useful == pytest.approx(dense * 4 / 6, rel=0.05)
    assert frozen.recomputed == 0


def test_a_run_that_does_not_fit_says_by_how_much_and_what_fits() -> None:
    job = job_of("13b", rows=16, tokens=2048, checkpointing=False)
    found = plan(job)
    assert not found.fits
    text = report(job, None)
    assert f"does NOT fit, {shown(found.peak - found.usable)} too much" in text
    advice = recommend(job)
    assert advice.plan is not None
    assert advice.job is not None
    assert plan(advice.job).peak == advice.plan.peak <= advice.plan.usable
    assert advice.job.rows * advice.job.accumulation == 16
    assert all(change in text for change in advice.changes)
    assert advice.changes


def test_offload_is_recommended_only_where_nothing_else_fits() -> None:
    job = job_of("34b", rows=1)
    advice = recommend(job)
    assert not plan(job).fits
    assert advice.job is not None
    assert advice.job.zero.optimizer_on_host
    assert any("offload_optimizer" in change for change in advice.changes)
    fitting = recommend(job_of("8b", rows=1))
    assert fitting.changes == []


def test_offload_is_offered_with_the_nodes_that_need_none() -> None:
    job = job_of("34b", rows=1)
    nodes = recommend(job).nodes_instead
    assert nodes == 2
    assert plan(job.on(nodes)).fits
    assert "or 2 nodes with --gradient_checkpointing and without this offload" in report(job, None)


def test_a_folder_that_cannot_be_written_is_named_by_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output_dir .*file.x: .*: name a folder that can be written"):
        report(job_of("tiny"), tmp_path / "file" / "x")


def test_what_cannot_fit_at_all_says_so() -> None:
    job = job_of("8b", cluster=Cluster(replace(GPUS["l40s-48gb"], memory=GIB), 1, 8))
    assert recommend(job).plan is None
    assert "nothing fits" in report(job, None)


def test_more_nodes_take_less_memory_each() -> None:
    plans = [(each, plan(each)) for each in over_node_counts(job_of("34b", 8))]
    peaks = [found.peak for _, found in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert nodes_table(plans).splitlines()[2].split("|")[1].strip() == "1 x 8"
    six = job_of("34b", 6)
    assert [each.cluster.nodes for each in over_node_counts(six)] == [1, 2, 4, 6]
    over_two = replace(six, zero=replace(six.zero, hpz=16))
    assert [each.cluster.nodes for each in over_node_counts(over_two)] == [2, 4, 6], "8 GPUs are half a group"


@pytest.mark.parametrize(
    ("name", "memory", "found"),
    [
        ("NVIDIA H100 80GB HBM3", 79 * GIB, "h100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 39 * GIB, "a100-40gb"),
        ("NVIDIA H200", 140 * GIB, "h200-141gb"),
        ("NVIDIA H100 PCIe", 79 * GIB, None),  # another chip under the same name
        ("NVIDIA GeForce RTX 4090", 24 * GIB, None),
    ],
)
def test_a_driver_s_name_is_known_or_not(name: str, memory: int, found: str | None) -> None:
    gpu = of_device_name(name, memory)
    assert (gpu.name if gpu else None) == found


def test_flags_replace_what_is_stated() -> None:
    gpu = PlanArguments(gpu="l40s-48gb", gpu_memory_gib=40, network_gbs=25).cluster().gpu
    assert (gpu.memory, gpu.between_nodes, gpu.flops) == (40 * GIB, 25e9, 362e12)
    assert "by flags: memory, between_nodes" in gpu.source
    with pytest.raises(ValueError, match="--gpu h100 is unknown; did you mean h100-80gb"):
        PlanArguments(gpu="h100")


def test_gathers_of_one_rank_are_none() -> None:
    model = subject_of("tiny", False)
    zero = ZeroSettings.read(DS_CONFIG, 1)
    assert model.gathers(Row((32,), (), 8), zero) == Gathers(0, 0, 0, 0, 0, "", 0)
    nothing = traffic(model.weights, zero, model.gathers(Row((32,), (), 8), zero), 1)
    seconds = link_seconds(nothing, zero, Cluster(GPUS["h100-80gb"], 1, 1))
    assert seconds.total == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_both_kinds_of_checkpointing_keep_little_more_than_the_layers_inputs(use_reentrant: bool) -> None:
    method: Any = load_method("sft")

    def saved(**more: Any) -> int:
        config = tiny_llama().config
        config.num_hidden_layers = 12
        parts = (ModelArguments(), LoraArguments(), TrainArguments(bf16=True, **more), method(method.Config()))
        return subject(config, *parts, cuda=True).activations(Row((96, 64), (), 1)).saved

    kind = f'{{"use_reentrant": {str(use_reentrant).lower()}}}'
    inputs = 12 * 160 * 64 * 2
    kept = saved(gradient_checkpointing=True, gradient_checkpointing_kwargs=kind)
    assert inputs < kept < 2 * inputs
    assert saved() > 5 * kept
