"""`mfac doctor`."""

from mfac.cli import doctor


def test_doctor_reports_success(capsys):
    assert doctor.main() == 0
    report = capsys.readouterr().out
    for part in (
        "torch  ",
        "compiler  ",
        "cpu capability",
        "cuda kernels",
        "cache  ",
        "kernels          loaded",
        "openmp",
        "cpu_bf16",
    ):
        assert part in report


def test_doctor_reports_failure(bench, capsys):
    bench.monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert doctor.main() == 1
    report = capsys.readouterr().out
    assert "NOT LOADED" in report and "no C++ compiler" in report and "apt install g++" in report
