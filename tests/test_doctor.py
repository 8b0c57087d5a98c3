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
        "sparse kernels",
    ):
        assert part in report


def test_doctor_reports_a_wrong_backend(monkeypatch, capsys):
    monkeypatch.setenv("MFAC_BACKEND", "reference")
    assert doctor.main() == 0
    assert "backend          reference (MFAC_BACKEND)\n" in capsys.readouterr().out
    monkeypatch.setenv("MFAC_BACKEND", "nonsense")
    assert doctor.main() == 1
    assert capsys.readouterr().out.endswith("MFAC_BACKEND: expected one of auto, compiled, reference, got 'nonsense'\n")


def test_doctor_survives_a_cxx_that_is_no_command(bench, capsys):
    bench.monkeypatch.setenv("CXX", "'g++")
    assert doctor.main() == 1
    report = capsys.readouterr().out
    assert "compiler         not found; fix: set CXX to a C++ compiler, or unset it\n" in report
    assert "NOT LOADED" in report and 'CXX: expected a command, got "\'g++"' in report


def test_doctor_reports_failure(bench, capsys):
    bench.monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert doctor.main() == 1
    report = capsys.readouterr().out
    assert "NOT LOADED" in report and "no C++ compiler" in report and "apt install g++" in report
