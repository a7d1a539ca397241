"""The scaling study's plot and lines; the study itself takes minutes."""

from benchmarks import scaling

ROWS = [
    {"model": "dpdiff", "categories": n, "training": 20.0, "inference": 30.0, "peak_memory": 2**30, "aupro": 0.9}
    for n in (10, 160)
] + [{"model": "unified k-NN", "categories": 10, "inference": 3.0, "peak_memory": 2**31}]


def test_a_line_has_what_was_measured_and_no_more():
    assert scaling.describe(ROWS[0]).split() == (
        "10 categories, dpdiff: training 20.0 images/s, inference 30.0 images/s, 1.00 GiB, aupro 0.900".split()
    )
    assert "training" not in scaling.describe(ROWS[2])


def test_plot_as_png_and_svg(tmp_path):
    found = {"rows": ROWS, "machine": {"processor": "a processor"}, "date": "2026-01-02T03:04:05+00:00"}
    scaling.plot(found, str(tmp_path / "scaling"))
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "scaling.svg").read_text(encoding="utf-8")
