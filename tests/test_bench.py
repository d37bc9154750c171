"""The command that runs every benchmark keeps what each printed, and goes on after one that fails."""

import bench
import pytest


@pytest.mark.parametrize(
    ("code", "status", "said"), [("print('1.23 s')", 0, "1.23 s"), ("print('at'); raise SystemExit('none')", 1, "none")]
)
def test_a_benchmark_that_was_run_is_a_row_and_a_section(code, status, said):
    ran = bench.run(["-c", code])
    assert ran.status == status and said in ran.printed
    page = bench.page("a machine", {"toy": ran})
    assert "| toy | `python -c '" in page and f"| {'failed (1)' if status else 'done'} |" in page
    assert page.index("## toy") < page.index(said, page.index("## toy"))


def test_no_page_says_where_the_checkout_lies():
    ran = bench.run(["-c", f"print({str(bench.SCRIPTS.parent / 'runs')!r})"])
    assert ran.printed == "runs\n" and str(bench.SCRIPTS.parent) not in ran.command


def test_every_script_that_it_runs_is_there():
    for benchmark in bench.BENCHMARKS.values():
        for arguments in filter(None, benchmark):
            assert arguments[0] == "-m" or bench.Path(arguments[0]).is_file()


def test_a_page_keeps_what_stands_around_its_place(tmp_path):
    page = tmp_path / "page.md"
    bench.write(page, "all")
    assert page.read_text() == "all"
    page.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    for text in ("new", "newer"):
        bench.write(page, text)
        assert page.read_text() == f"before\n{bench.BEGIN}\n{text}\n{bench.END}\nafter\n"
