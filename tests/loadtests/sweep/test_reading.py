"""Sweep files: what they expand to, and every mistake with its line before anything starts."""

import socket
from pathlib import Path

import pytest

from loadtests.sweep import checks, reading
from loadtests.sweep.reading import read_plan
from loadtests.sweep.source import SweepError, parse_source, read_source
from service.runtimes.ray_environment import free_ports
from tests.loadtests.sweep.documents import SWEEP, plan

SWEEPS = Path(__file__).parents[3] / "loadtests" / "sweeps"


def mistakes(text: str) -> list[str]:
    with pytest.raises(SweepError) as caught:
        plan(text)
    return str(caught.value).splitlines()


def refused_here(text: str) -> list[str]:
    """What a plan that can run elsewhere lacks on this machine."""
    source = parse_source(text, "sweep.yaml")
    found = read_plan(source, "sweep")
    with pytest.raises(SweepError) as caught:
        checks.check_machine(found, source)
    return str(caught.value).splitlines()


def edited(old: str, new: str) -> str:
    assert old in SWEEP
    return SWEEP.replace(old, new)


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.yaml")), ids=lambda file: str(file.stem))
def test_the_files_that_we_ship_can_run(file: Path) -> None:
    found = read_plan(read_source(file), file.stem)
    assert found.name == file.stem
    assert len(found.configurations) >= 2


def test_lists_are_combinations() -> None:
    found = plan(edited("kv_heads: [4, 2, 1]", "kv_heads: [4, 1]\n    window: [null, 8]"))
    assert [one.name for one in found.configurations] == [
        "h4kv4d16", "h4kv1d16", "h4kv4d16w8", "h4kv1d16w8",
    ]  # fmt: skip
    assert [load.name for load in found.loads] == [
        "c1-p16-o8", "c4-p16-o8", "c1-p128-o8", "c4-p128-o8",
    ]  # fmt: skip
    assert found.engine.max_num_seqs == 4
    assert all(one.model.max_position_embeddings == 136 for one in found.configurations)


def test_head_counts_at_a_fixed_width_are_multi_head() -> None:
    found = plan(edited("heads: 4\n    kv_heads: [4, 2, 1]", "heads: [2, 4, 8]"))
    assert [one.name for one in found.configurations] == ["h2kv2d32", "h4kv4d16", "h8kv8d8"]


def test_a_widened_configuration_has_as_many_parameters() -> None:
    text = """\
engine: {kv_cache_bytes: 1GiB}
configurations:
  - heads: 12
  - heads: 12
    kv_heads: [4, 1]
    same_parameters_as: h12kv12d64
loads: [{clients: 1, prompt: 16, output: 8}]
"""
    reference, *widened = plan(text).configurations
    assert [one.arm for one in widened] == ["same parameters"] * 2
    assert [one.name for one in widened] == ["h12kv4d64-widened", "h12kv1d64-widened"]
    for one in widened:
        assert one.num_parameters == pytest.approx(reference.num_parameters, rel=0.01)
        assert one.model.intermediate_size > reference.model.intermediate_size


def test_all_mistakes_are_named_at_once_with_their_lines() -> None:
    text = """\
runtime: ray
repeats: many
engine:
  kv_cache_bytes: 64MiB
  num_blocks: 3
configurations:
  - heads: 12
    kv_heads: [12, 5]
    windows: 3
  - heads: [7, 12]
    kv_heads: 1
  - name: two words
    checkpoint: nowhere
loads:
  - clients: 1
    prompt: 16
"""
    assert mistakes(text) == [
        "sweep.yaml:2: repeats is 'many'; allowed: a valid integer",
        "sweep.yaml:5: engine.num_blocks is not known; allowed: kv_cache_bytes, max_num_seqs, "
        "max_num_batched_tokens, block_size, num_threads",
        "sweep.yaml:9: configurations[0].windows is not known; allowed: name, layers, hidden, "
        "intermediate, vocab, dtype, heads, kv_heads, head_dim, window, same_parameters_as",
        "sweep.yaml:10: configurations[1].heads is 7; allowed: a divisor of hidden=768 where "
        "head_dim is not given",
        "sweep.yaml:12: configurations[2].name is 'two words'; allowed: match pattern "
        "'^[a-zA-Z0-9_-]{1,64}$'",
        "sweep.yaml:15: loads[0].output is missing",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("kv_heads: [4, 2, 1]", "kv_heads:\n      - 4\n      - 3",
         "sweep.yaml:12: configurations[0].kv_heads is 3; allowed: a divisor of heads=4"),
        ("hidden: 64", "hidden: 4",
         "sweep.yaml:6: configurations[0].head_dim is 1; allowed: an even number, 2 or more"),
        ("kv_cache_bytes: 64MiB", "kv_cache_bytes: 64 apples",
         "sweep.yaml:4: engine.kv_cache_bytes is '64 apples'; allowed: bytes, such as 512MiB"),
        ("kv_cache_bytes: 64MiB", "kv_cache_bytes: -4MiB",
         "sweep.yaml:4: engine.kv_cache_bytes is '-4MiB'; allowed: bytes, such as 512MiB"),
        ("kv_cache_bytes: 64MiB", "kv_cache_bytes: null",
         "sweep.yaml:4: engine.kv_cache_bytes is null; allowed: bytes, such as 512MiB"),
        ("prompt: [16, 128]", "prompt: '12'",
         "sweep.yaml:15: loads[0].prompt is '12'; allowed: a valid integer"),
        ("prompt: [16, 128]", "prompt: [16, no]",
         "sweep.yaml:15: loads[0].prompt[1] is false; allowed: a valid integer"),
        ("prompt: [16, 128]", "prompt: {a: [yes]}",
         "sweep.yaml:15: loads[0].prompt is {'a': [true]}; allowed: a valid integer"),
        ("clients: [1, 4]", "clients: []",
         "sweep.yaml:14: loads[0].clients is []; allowed: entries, at least 1"),
        ("repeats: 3", "repeats: 2026-01-02",
         "sweep.yaml:2: repeats is 2026-01-02; allowed: a valid integer"),
        ("clients: [1, 4]", "clients: [1, 0]",
         "sweep.yaml:14: loads[0].clients[1] is 0; allowed: greater than or equal to 1"),
        ("clients: [1, 4]", "clients: [4, 4]", "sweep.yaml:14: loads[0] repeats c4-p128-o8"),
        ("kv_heads: [4, 2, 1]", "kv_heads: [4, 4]",
         "sweep.yaml:6: configurations[0] is another 'h4kv4d16'; allowed: names that differ"),
        ("kv_heads: [4, 2, 1]", "kv_heads: 4\n    same_parameters_as: h4kv1d16",
         "sweep.yaml:13: configurations[0].same_parameters_as is 'h4kv1d16'; allowed: the name of "
         "a configuration without it"),
        ("repeats: 3", "repeats: 3\nrepeats: 4", "sweep.yaml:3: repeats is given twice"),
        ("repeats: 3", "repeats: [", "sweep.yaml:4: expected ',' or ']'"),
        ("64MiB", "64MiB\n  max_num_batched_tokens: 3",
         "sweep.yaml:5: engine.max_num_batched_tokens is 3; allowed: at least max_num_seqs=4"),
        ("64MiB", "64MiB\n  max_num_seqs: 3",
         "sweep.yaml:5: engine.max_num_seqs is 3; load c4-p128-o8 needs 4, or `waiting: true`"),
        ("kv_heads: [4, 2, 1]", f"kv_heads: {[1] * 33}",
         "sweep.yaml:12: configurations[0].kv_heads is [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, "
         "1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1...; allowed: entries, at most 32"),
        ("clients: [1, 4]", "clients: &few [1, 4]\n    waves: *few",
         "sweep.yaml:15: aliases are not allowed"),
        ("repeats: 3", "repeats: " + "[" * 10_000, "sweep.yaml cannot be read: maximum recursion"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(old: str, new: str, expected: str) -> None:
    assert mistakes(edited(old, new))[0].startswith(expected)


def test_a_section_that_is_missing_is_one_mistake() -> None:
    without = edited("engine:\n  kv_cache_bytes: 64MiB\n", "")
    assert mistakes(without) == ["sweep.yaml:1: engine is missing"]


def test_too_many_are_counted_before_any_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("expanded")

    monkeypatch.setattr(reading, "expand", never)
    many = ", ".join(str(number) for number in range(1, 33))
    shapes = f"heads: [{many}]\n    kv_heads: [{many}]\n    window: [{many}]"
    assert mistakes(edited("heads: 4\n    kv_heads: [4, 2, 1]", shapes)) == [
        "sweep.yaml:6: configurations[0] brings the configurations to 32768; allowed: at most 32"
    ]
    monkeypatch.undo()
    loads = "".join(f"  - {{clients: [{many}], prompt: [{many}], output: 2}}\n" for _ in range(5))
    assert mistakes(SWEEP[: SWEEP.index("loads:")] + "loads:\n" + loads)[-1] == (
        "sweep.yaml:18: loads[4] brings the loads to 5120; allowed: at most 4096"
    )
    # What is too many measurements is not also checked load by load.
    assert mistakes(
        edited("repeats: 3", "repeats: 100")
        .replace("64MiB", "64KiB")
        .replace("clients: [1, 4]\n    prompt: [16, 128]", f"clients: [{many}]\n    prompt: 16")
    ) == ["sweep.yaml:13: loads make 9600 measurements; allowed: at most 4096"]


def test_more_sequences_than_tokens_of_a_step_need_no_setting() -> None:
    many = plan(edited("clients: [1, 4]", "clients: 600").replace("64MiB", "1GiB"))
    assert many.engine.max_num_batched_tokens == many.engine.max_num_seqs == 600
    assert plan().engine.max_num_batched_tokens == 512


def test_a_kv_budget_that_does_not_hold_the_largest_load_is_refused() -> None:
    # 4 sequences of 135 cached tokens are 9 blocks each; a block is 16 kiB with 4 KV heads.
    too_small = edited("64MiB", "512KiB")
    assert mistakes(too_small) == [
        "sweep.yaml:4: engine.kv_cache_bytes is 524288, which holds 3 sequences of load "
        "c4-p128-o8 in configuration h4kv4d16; needed: 4, or `waiting: true` in the load"
    ]
    waiting = plan(too_small + "    waiting: true\n")
    assert waiting.max_concurrent(waiting.configurations[0].model, waiting.loads[-1]) == 3
    # Three configurations, two lengths, two numbers of clients: said once, by what needs most.
    assert mistakes(edited("64MiB", "8KiB")) == [
        "sweep.yaml:4: engine.kv_cache_bytes is 8192, which holds 0 sequences of load "
        "c4-p128-o8 in configuration h4kv4d16; needed: 4; 10 more do not fit either"
    ]


def test_more_memory_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "available_memory", lambda: 2**30)
    (mistake,) = refused_here(SWEEP)
    assert mistake.startswith("sweep.yaml:5: configurations need 1.7 GiB together")
    assert mistake.endswith("available: 1.0 GiB")


def test_taken_ports_are_refused() -> None:
    first = free_ports(1)[0]
    with socket.create_server(("127.0.0.1", first)):
        text = f"metrics_port: {first - 2}\n{SWEEP}"
        (mistake,) = refused_here(text)
    assert mistake.startswith(
        f"sweep.yaml:1: metrics_port is {first - 2}: cannot listen on 127.0.0.1:{first}"
    )
    assert any(
        "as port does" in line for line in refused_here(f"port: 9000\nmetrics_port: 9001\n{SWEEP}")
    )


def test_checkpoints_are_loaded_far_enough_to_know_that_they_can_be(tmp_path: Path) -> None:
    demo = "  - name: demo\n    checkpoint: models/demo/mha\n"
    found = plan(edited("loads:", f"{demo}loads:"))
    bundled = plan(edited("loads:", f"{demo.replace('models/demo/mha', 'demo')}loads:"))
    assert bundled.configurations[-1].model == found.configurations[-1].model
    (tmp_path / "config.json").write_text("{}")
    empty = demo.replace("models/demo/mha", str(tmp_path))
    (mistake,) = mistakes(edited("loads:", f"{empty}loads:"))
    assert mistake.startswith(f"sweep.yaml:14: configurations[1].checkpoint is '{tmp_path}': ")
    long = edited("loads:", f"{demo}loads:").replace("[16, 128]", "[16, 4096]")
    assert mistakes(long.replace("64MiB", "1GiB")) == [
        "sweep.yaml:13: configurations[1] (demo) knows 1024 positions; load c1-p4096-o8 needs 4104"
    ]


@pytest.mark.parametrize("text", ["", "- a", "text", "!!python/object:os.system {}"])
def test_what_is_no_sweep_is_refused(text: str) -> None:
    with pytest.raises(SweepError, match=r"sweep.yaml"):
        parse_source(text, "sweep.yaml")


def test_a_file_that_is_missing_or_huge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="No such file"):
        read_source(tmp_path / "none.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(SweepError, match="more than 1048576 bytes"):
        read_source(tmp_path / "huge.yaml")
