"""The page of results: what it says is in the results, and nothing else is."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import report, results
from benchmarks.limits import Limits
from benchmarks.results import Measurement, Record, Work

ROOT = Path(__file__).parents[2]
LIMITS = Limits({"float32": 1e11, "bfloat16": 4e11}, 2e10, "cpu", 2)


def measurements(operator: str, work: Work) -> list[Measurement]:
    """Ours at 10 ms beside two rivals, our reference, and a yardstick that is faster than all."""
    return [
        Measurement(operator, "K = 4", "dpdiff", 0.01, None, 3_000_000, work),
        Measurement(operator, "K = 4", "dpdiff: reference", 0.5, 50.0, 40_000_000, work),
        Measurement(operator, "K = 4", "faiss", 0.025, 2.5, None, work),
        Measurement(operator, "K = 4", "cdist", 0.07, 7.25, None, work),
        Measurement(operator, "K = 4", "half of it", 0.005, 0.5, None, work, yardstick=True),
    ]


@pytest.fixture
def found() -> dict:
    sizes = [("tokens", n) for n in (1024, 4096)] + [("threads", n) for n in (1, 2)]
    growing = [
        Measurement("scaling", f"{n} {axis}", "dpdiff", n / 1e6, None, 1, Work(n, n, "float32"), sweep=("x", axis, n))
        for axis, n in sizes
    ]
    record = Record([*measurements("nearest", Work(4e8, 1e6, "float32")), *growing], {"KeOps": "no compiler"}, LIMITS)
    return results.assemble(record, LIMITS, ["dpdiff", "bench", "ops"])


def run(tmp_path, *files: dict) -> str:
    """The page from these results, with figures beside it."""
    paths = [tmp_path / f"{i}.json" for i in range(len(files))]
    for path, content in zip(paths, files):
        path.write_text(json.dumps(content))
    assert report.main([*map(str, paths), "--page", str(tmp_path / "docs" / "page.md")]) == 0
    return (tmp_path / "docs" / "page.md").read_text()


def test_every_contender_has_time_ratio_memory_and_share(found, tmp_path):
    page = run(tmp_path, found)
    assert "| K = 4 | **dpdiff** | 10.0 ms |  | 3.0 MB | 40% |" in page  # 0.4 GFLOP at 100 GFLOP/s take 4 ms
    assert "|  | dpdiff: reference | 500 ms | 50.00 | 40 MB | 1% |" in page
    assert "|  | *half of it* | 5.00 ms | 0.50 |  |  |" in page
    for part in ("100 GFLOP/s", "20.0 GB/s", "dpdiff bench ops", "KeOps: no compiler", found["date"][:10]):
        assert part in page


def test_neither_yardsticks_nor_our_reference_are_rivals(found):
    (row,) = report.summary(found["cases"]).splitlines()[2:]
    assert row == "| nearest | 1 | 2.50 | 2.50 | 2.50 |"


def test_figures_are_written_and_shown(found, tmp_path):
    page = run(tmp_path, found)
    for name in ("roofline", "growing"):
        assert f"(page/{name}.svg)" in page
        assert (tmp_path / "docs" / "page" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "docs" / "page" / f"{name}.svg").read_text()


def test_the_scaling_study_has_its_figure_and_table(found, tmp_path):
    rows = [{"model": "dpdiff", "categories": 10, "training": 21.5, "peak_memory": 2**30, "aupro": 0.912}]
    about = {"date": found["date"], "machine": found["machine"], "command": "python -m benchmarks.scaling"}
    page = run(tmp_path, found, {"study": "scaling", "steps": 20, "rows": rows} | about)
    assert "python -m benchmarks.scaling\n" in page
    assert "| dpdiff | 10 | 21.5 |  | 1.00 |  |  | 0.912 |" in page
    assert "(page/categories.svg)" in page and (tmp_path / "docs" / "page" / "categories.svg").exists()


def test_results_of_two_machines_are_not_mixed(found, tmp_path, capsys):
    other = found | {"machine": found["machine"] | {"processor": "another"}}
    with pytest.raises(SystemExit):
        run(tmp_path, found, other)
    assert "several machines" in capsys.readouterr().err


def test_a_gpu_has_its_page(tmp_path):
    """Cases of a GPU's data types and rates, with a contender that was skipped for one type only."""
    work = Work(4e8, 1e6, "bfloat16")
    rows = [
        Measurement("attention", "bfloat16, M = 256", "dpdiff", 2e-4, None, 3_000_000, work),
        Measurement("attention", "bfloat16, M = 256", "flash sdpa, folded", 1e-4, 0.5, 0, work),
    ]
    limits = Limits({"float32": 5e13, "bfloat16": 8e14, "float16": 8e14, "tf32": 4e14}, 4e12, "cuda", 16)
    skipped = {"attention: flash sdpa, folded": "in float32: this kernel takes float16 and bfloat16 only"}
    run_on_gpu = results.assemble(Record(rows, skipped, limits), limits, ["pytest", "--device", "cuda"])
    run_on_gpu["machine"]["cuda:0"] = "NVIDIA X, sm_90"
    page = run(tmp_path, run_on_gpu)
    for part in ("|  | flash sdpa, folded | 0.100 ms | 0.50 | 0.0 MB | 0% |", "NVIDIA X", "tf32 | 400,000 GFLOP/s"):
        assert part in page
    assert "| attention | 1 | 0.50 | 0.50 | 0.50 |" in page  # slower than a rival, and said so
    assert "- attention: flash sdpa, folded: in float32" in page
    assert (tmp_path / "docs" / "page" / "roofline.svg").exists()


def test_the_summary_replaces_the_one_in_the_readme(found):
    text = f"before\n{report._START}\nold\n{report._END}\nafter\n"
    once = report.update_readme(text, [found], "docs/benchmarks.md")
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
    assert "| nearest | 1 | 2.50 |" in once and "(docs/benchmarks.md)" in once
    assert report.update_readme(once, [found], "docs/benchmarks.md") == once
    with pytest.raises(ValueError, match="lacks"):
        report.update_readme("no marks", [found], "docs/benchmarks.md")


@pytest.mark.parametrize("file", (ROOT / "docs").glob("benchmarks*.md"), ids=lambda file: file.name)
def test_the_published_pages_are_what_the_stored_results_say(file):
    """No figure of them, or of the README's summary, was typed."""
    published = file.read_text(encoding="utf-8")
    (command,) = re.findall(r"^python -m benchmarks\.report .*$", published, re.MULTILINE)
    paths = [ROOT / word for word in command.split() if word.endswith(".json")]
    runs, studies = report.read(paths)
    assert report.page(runs, studies, command, file.stem) == published
    if "--readme" not in command:
        return
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.update_readme(readme, runs, f"docs/{file.name}") == readme
