"""``kt trace`` and ``kt place``: from a model to a table and a picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cli.calling import Kt
from kt_core.interfaces import ExpertGrid
from kt_core.placement.synthetic import zipf_trace
from kt_core.placement.trace import load_trace, save_trace

QUICK = ("--raw", "--max-new-tokens", "4", "--threads", "1")
GRID = ExpertGrid(num_experts=(12,) * 3, expert_bytes=(1_000_000,) * 3)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("Once upon a time\nTom had a red ball\n", encoding="utf-8")
    return file


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A trace of two prompts whose popularity is known."""
    file = tmp_path / "zipf.safetensors"
    made = zipf_trace(GRID, top_k=2, tokens=200, exponent=1.2, seed=0, shifts=1, prompt_tokens=20)
    save_trace(made, file)
    return file


# ---------------------------------------------------------------- kt trace


def test_trace(kt: Kt, stories: Path, prompts: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    answer = kt("trace", stories, "--prompts", prompts, "-o", file, *QUICK, "--predict", "--json")
    report = json.loads(answer.succeeds())
    recorded = load_trace(file)
    assert report["tokens"] == recorded.num_tokens
    assert (report["prompts"], report["layers"], report["experts"]) == (2, 4, 16)
    assert report["decode_tokens"] == 6
    assert report["top_k"] == 2
    assert 0.25 <= report["busiest_quarter"] <= 1
    assert report["prediction_recall_by_layer"][0] is None
    assert 0 < report["prediction_recall"] < 1
    assert Path(report["statistics"]).is_file()
    assert answer.err == ""

    shown = kt("trace", file, "--json").succeeds()
    assert json.loads(shown)["prediction_recall"] == report["prediction_recall"]
    used = kt("place", file, "--statistics", report["statistics"], "--hot", "50%", "--json")
    assert len(json.loads(used.succeeds())["results"]) == 5


def test_trace_as_text(kt: Kt, stories: Path, prompts: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    text = kt("trace", stories, "--prompts", prompts, "-o", file, *QUICK).succeeds()
    assert "4 layers of 16, 2 per token" in text
    assert "2 prompts" in text
    assert "prediction" not in text


def test_trace_that_cannot_be_recorded(
    kt: Kt, stories: Path, prompts: Path, tmp_path: Path
) -> None:
    file = tmp_path / "t.safetensors"
    kt("trace", stories).fails("--prompts FILE and -o FILE", code=2)
    kt("trace", stories, "--prompts", prompts, "-o", tmp_path / "t").fails(".safetensors", code=2)
    absent = tmp_path / "absent" / "t.safetensors"
    kt("trace", stories, "--prompts", prompts, "-o", absent).fails("is not there; make it first")
    kt("trace", stories, "--prompts", tmp_path / "no", "-o", file).fails("cannot read", code=2)
    kt("trace", file).fails("there is no trace", "kt trace MODEL --prompts FILE -o TRACE")
    arguments = ("trace", stories, "--prompts", prompts, "-o", file)
    kt(*arguments, "--placement", "best").fails("placement policy 'best' is not registered")
    kt(*arguments, "--heatmap", tmp_path / "h.gif").fails("must end in .html or .png", code=2)
    assert not file.exists()


def test_heatmaps(kt: Kt, trace: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "h.html", tmp_path / "h.png"
    options = ("--placement", "frequency", "--hot-experts", "25%")
    kt("trace", trace, "--heatmap", page, *options).succeeds()
    text = page.read_text(encoding="utf-8")
    assert text.count("<rect") == 36
    assert text.count("class=hot") == 9
    assert "25% placed by frequency" in text
    assert "http" not in text  # nothing is fetched
    pytest.importorskip("matplotlib", reason="matplotlib (the extra plot) is not installed")
    kt("trace", trace, "--heatmap", picture, *options).succeeds()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_picture_without_matplotlib(
    kt: Kt, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for arguments in (
        ("trace", trace, "--heatmap", tmp_path / "h.png"),
        ("place", trace, "--plot", tmp_path / "p.svg"),
    ):
        kt(*arguments).fails("needs matplotlib", "pip install 'kt-core[plot]'")
    kt("trace", trace, "--heatmap", tmp_path / "h.html").succeeds()


# ---------------------------------------------------------------- kt place


def test_place(kt: Kt, trace: Path) -> None:
    text = kt("place", trace, "--hot", "25%,0.5").succeeds()
    header, *rows = text.splitlines()
    assert header.split()[:2] == ["hot", "policy"]
    assert [row.split()[0] for row in rows] == ["25%"] * 5 + ["50%"] * 5
    policies = {"adaptive", "frequency", "uniform", "front-loading", "random"}
    assert {row.split()[1] for row in rows} == policies


def test_place_as_json(kt: Kt, trace: Path) -> None:
    policies = ("--policy", "frequency,adaptive", "--hot", "50%")
    report = json.loads(kt("place", trace, *policies, "--pcie", "10GB/s", "--json").succeeds())
    frequency, adaptive = report["results"]
    assert (frequency["policy"], adaptive["policy"]) == ("frequency", "adaptive")
    assert report["machine"]["link_bytes_per_s"] == 10e9
    assert frequency["budget_bytes"] == GRID.total_bytes // 2
    assert frequency["moved_bytes"] == 0
    assert adaptive["moved_bytes"] > 0
    # All popularity changes between the part that is learned from and the rest.
    assert adaptive["decode_hit_rate"] > frequency["decode_hit_rate"]
    assert adaptive["decode_tokens_per_s"] > 0

    slow = json.loads(kt("place", trace, *policies, "--bandwidth", "1GB/s", "--json").succeeds())
    assert slow["results"][0]["decode_tokens_per_s"] < frequency["decode_tokens_per_s"]


def test_place_for_the_machine_of_a_plan(kt: Kt, trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "machine.yaml"
    file.write_text(
        "host: {bandwidth: 200GB/s, cores: 32, memory: 512GiB, int8: 30TOP/s}\n"
        "accelerator: {count: 2, memory: 24GiB, bandwidth: 900GB/s, bf16: 100TFLOP/s}\n"
    )
    options = ("--machine", file, "--pcie", "20GB/s", "--link-share", "25%", "--json")
    machine = json.loads(kt("place", trace, *options).succeeds())["machine"]
    assert machine == {
        "link_bytes_per_s": 40e9,
        "link_share": 0.25,
        "accelerator_bytes_per_s": 1800e9,
        "accelerator_ops_per_s": 200e12,
        "cpu_bytes_per_s": 200e9,
        "cpu_ops_per_s": 30e12,
    }


def test_plot(kt: Kt, trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib (the extra plot) is not installed")
    for suffix, start in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        file = tmp_path / f"p{suffix}"
        kt("place", trace, "--plot", file, "--hot", "10%,90%").succeeds()
        assert file.read_bytes().startswith(start)


def test_place_with_bad_input(kt: Kt, trace: Path, tmp_path: Path) -> None:
    kt("place", tmp_path / "no.safetensors").fails("there is no trace", "kt trace MODEL")
    kt("place", trace, "--policy", "best").fails("'best' is not registered", "adaptive")
    for wrong in ("half", "120%", "-1", "nan", ""):
        kt("place", trace, "--hot", wrong).fails("--hot takes parts", code=2)
    kt("place", trace, "--pcie", "0GB/s").fails("--pcie must be above 0", code=2)
    kt("place", trace, "--pcie", "10").fails("--pcie must be a number with its unit", code=2)
    kt("place", trace, "--link-share", "0").fails("leaves nothing for swaps", code=2)
    kt("place", trace, "--machine", tmp_path / "no.yaml").fails("cannot be read", code=2)
    kt("place", trace, "--statistics", tmp_path / "no").fails("there are no statistics")
    other = tmp_path / "s.json"
    content = {"format": "kt-routing-statistics", "version": 1, "tokens": 1, "counts": [[1.0]]}
    other.write_text(json.dumps(content))
    kt("place", trace, "--statistics", other).fails("of different models")
    kt("place", trace, "--plot", tmp_path / "absent" / "p.svg").fails("make it first", code=2)

    one = tmp_path / "one.safetensors"
    save_trace(zipf_trace(GRID, top_k=2, tokens=9, exponent=1, seed=0), one)
    kt("place", one).fails("--train 50% cuts nothing off", "--train 0", code=2)
    kt("place", one, "--train", "0").succeeds()
