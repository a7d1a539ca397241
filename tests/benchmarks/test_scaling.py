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


def test_a_study_goes_on_where_it_stopped(monkeypatch):
    calls, saved = [], []

    def apart(function, model, n, *args):
        calls.append((function.__name__, model, n))
        return {"inference": 1.0, "peak_memory": 2**30} | (
            {"training": 2.0} if function is scaling.rates else {"image_auroc": 0.9}
        )

    monkeypatch.setattr(scaling, "_apart", apart)
    known = [{"model": "dpdiff", "categories": 10, "training": 20.0, "inference": 30.0, "peak_memory": 2**30}]
    scaling.study((10, 20), list(scaling.MODELS), 600, 10, known, saved.append)
    assert calls == [
        ("accuracy", "dpdiff", 10),
        ("rates", "reference operators", 10),
        ("accuracy", "unified k-NN", 10),
        ("rates", "dpdiff", 20),
        ("rates", "reference operators", 20),
    ]
    rows = saved[-1]["rows"]
    assert [(row["model"], row["categories"]) for row in rows] == [
        *((model, 10) for model in scaling.MODELS),
        ("dpdiff", 20),
        ("reference operators", 20),
    ]
    assert rows[0]["training"] == 20.0 and rows[0]["image_auroc"] == 0.9
    assert len(saved) == 5 and len(known[0]) == 5  # what is given stays as it is
