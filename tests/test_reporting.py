"""Run logs, console, figures and report: written to real files and read back."""

import contextlib
import io
import json
import math
import os
import resource
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from gram_jax.errors import UserError
from gram_jax.evaluation import reliability
from gram_jax.figures import accuracy_bars, loss_curves, reliability_diagram, training_accuracy
from gram_jax.report import Report, Table
from gram_jax.reporting import (
    MetricsLog,
    Progress,
    duration,
    format_field,
    human,
    read_metrics,
)


def lines(workdir):
    """The lines of the log without their times."""
    text = (workdir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    found = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    for line in found:
        assert abs(line.pop("time", time.time()) - time.time()) < 600
    return found


def masked_crc(data):
    """The checksum of a record, by the library that others write event files with."""
    value = crc32c(data)
    return (((value >> 15) | (value << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def events(workdir):
    """Events of all files: records of length (8 bytes), checksum (4), data, checksum (4)."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        assert "tfevents" in path.name
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            record = data[12 : 12 + length]
            assert int.from_bytes(data[8:12], "little") == masked_crc(data[:8])
            assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc(record)
            found.append(Event.FromString(record))
            data = data[16 + length :]
    return found


def scalars(workdir):
    """(tag, step, value) of all event files, in order."""
    return [
        (value.tag, event.step, value.simple_value)
        for event in events(workdir)
        for value in event.summary.value
    ]


def test_each_write_is_on_disk_at_once_as_one_line(tmp_path):
    log = MetricsLog(tmp_path / "run", resume_step=0, tensorboard=False)
    log.write(1, {"loss": 2.5, "tokens/s": np.float32(3.0)})
    log.write(1, {"accuracy": 0.5}, split="held_out")
    assert lines(tmp_path / "run") == [
        {"step": 1, "split": "train", "loss": 2.5, "tokens/s": 3.0},
        {"step": 1, "split": "held_out", "accuracy": 0.5},
    ]
    log.close()
    log.close()


def test_a_resumed_run_cuts_later_steps_and_the_torn_last_line(tmp_path):
    with MetricsLog(tmp_path, resume_step=0, tensorboard=False) as log:
        for step in range(1, 8):
            log.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 4, "split": "tr\N{LATIN SMALL LETTER E WITH ACUTE}'.encode()[:-1])
    with MetricsLog(tmp_path, resume_step=4, tensorboard=False) as log:
        log.write(5, {"loss": 50.0})
    assert [(row["step"], row["loss"]) for row in lines(tmp_path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0}')
    with MetricsLog(tmp_path, resume_step=1, tensorboard=False) as log:
        log.write(2, {"loss": 2.0})
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]


@given(st.integers(0, 400))
def test_a_log_torn_at_any_byte_goes_on(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("torn")
    with MetricsLog(folder, resume_step=0, tensorboard=False) as log:
        for step in range(1, 6):
            log.write(step, {"loss": math.nan, "lr": 0.1})
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:cut])
    with MetricsLog(folder, resume_step=3, tensorboard=False) as log:
        log.write(4, {"loss": 4.0})
    steps = [row["step"] for row in lines(folder)]
    assert steps[-1] == 4
    assert steps[:-1] == list(range(1, len(steps)))
    assert len(steps) <= 4


def test_starting_over_cuts_step_zero_too(tmp_path):
    with MetricsLog(tmp_path, resume_step=0, tensorboard=False) as log:
        log.write(0, {"loss": 1.0}, split="held_out")
    with MetricsLog(tmp_path, resume_step=-1, tensorboard=False):
        assert lines(tmp_path) == []


def test_a_bad_line_within_a_log_is_an_error_that_names_it_and_leaves_the_file(tmp_path):
    text = '{"step": 1, "loss": 1.0}\n{"loss": 2.0}\n{"step": 3, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        MetricsLog(tmp_path, resume_step=0, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_values_that_are_not_finite_are_strings_in_the_file_and_floats_when_read(tmp_path):
    with MetricsLog(tmp_path, resume_step=0, tensorboard=False) as log:
        log.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
        log.write(1, {"a": 1.0}, split="held_out")
    assert lines(tmp_path)[0] == {"step": 1, "split": "train", "a": "nan", "b": "inf", "c": "-inf"}
    row = read_metrics(tmp_path, split="train")[0]
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)
    assert len(read_metrics(tmp_path)) == 2


def test_a_metric_cannot_take_the_name_of_a_field_of_the_line(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0, tensorboard=False)
    with log, pytest.raises(ValueError, match="'step'"):
        log.write(1, {"step": 2.0})


def test_tensorboard_holds_the_same_numbers_and_each_step_once_after_resuming(tmp_path):
    with MetricsLog(tmp_path, resume_step=0) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": step / 2, "lr": 1e-3})
        log.write(300, {"loss": 0.25}, split="validation")
        assert scalars(tmp_path)[-1] == ("validation/loss", 300, 0.25), "held back in memory"
    # What others keep in the folder is theirs.
    (tmp_path / "tensorboard" / "events.out.tfevents.1.other").write_bytes(b"")
    with MetricsLog(tmp_path, resume_step=1) as log:
        log.write(2, {"loss": math.nan})
        log.write(3, {"loss": 1e300})
    found = scalars(tmp_path)
    rate = np.float32(1e-3)
    assert found[:2] == [("train/loss", 1, 0.5), ("train/lr", 1, rate)]
    assert [row[:2] for row in found[2:]] == [("train/loss", 2), ("train/loss", 3)]
    assert math.isnan(found[2][2])
    assert found[3][2] == math.inf, "beyond float32"
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert events(tmp_path)[0].file_version == "brain.Event:2"


def test_event_files_that_a_kill_left_are_written_anew_from_the_metrics(tmp_path):
    """Behind, ahead, torn, doubled, half rewritten: the metrics say what they must hold."""
    with MetricsLog(tmp_path, resume_step=0) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": step / 2})
    (path,) = (tmp_path / "tensorboard").iterdir()
    times = [event.wall_time for event in events(tmp_path)]
    whole = path.read_bytes()
    other = path.with_name("events.out.tfevents.5.host.1.gram_jax")
    for content, second in (
        (whole[:-20], None),
        (whole, whole),
        (b"", whole[:7]),
        (whole * 2, None),
    ):
        path.write_bytes(content)
        if second is not None:
            other.write_bytes(second)
        (path.parent / "rewriting.tmp").write_bytes(whole[:30])
        MetricsLog(tmp_path, resume_step=2).close()
        assert scalars(tmp_path) == [("train/loss", 1, 0.5), ("train/loss", 2, 1.0)]
        assert [event.wall_time for event in events(tmp_path)][1:] == times[1:3]
        (path,) = (tmp_path / "tensorboard").iterdir()


@contextlib.contextmanager
def largest_file(size):
    """A disk without room, as far as a process without rights can make one."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_where_there_is_no_room_the_log_says_so_and_keeps_whole_lines(tmp_path, capsys):
    log = MetricsLog(tmp_path, resume_step=0)
    log.write(1, {"loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with largest_file(size + 20), pytest.raises(UserError, match="metrics cannot be written"):
        log.write(2, {"loss": 2.0})
    assert [row["step"] for row in lines(tmp_path)] == [1]
    assert capsys.readouterr().err == ""


def test_a_log_that_may_go_on_warns_once_and_has_no_holes_when_there_is_room_again(
    tmp_path, capsys
):
    with MetricsLog(tmp_path, resume_step=0, on_error="continue") as log:
        log.write(1, {"loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        for room in range(0, size, 7):  # tears in every part of a line
            with largest_file(size + room):
                log.write(2 + room, {"loss": 2.0})
                log.sync()
            assert [row["step"] for row in lines(tmp_path)] == [1]
        written = [step for step, *_ in events_steps(tmp_path)]
        assert len(written) == len(set(written)), "a torn or repeated event"
        log.write(1000, {"loss": 4.0})
        assert [row["step"] for row in lines(tmp_path)] == [1, *range(2, 2 + size, 7), 1000]
    assert [step for _, step, _ in scalars(tmp_path)] == [1, *range(2, 2 + size, 7), 1000]
    error = capsys.readouterr().err
    assert error.count("warning:") == 1
    assert os.strerror(27) in error


def events_steps(workdir):
    return [(step, tag) for tag, step, _ in scalars(workdir)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_progress(stream, steps, **settings):
    seconds = iter(range(0, 10_000, 10))
    with Progress(
        10, stream=stream, log_every=4, clock=lambda: float(next(seconds)), **settings
    ) as progress:
        for step in steps:
            progress.update(step, {"loss": 2.34123, "tokens/s": 12345.6, "mfu": 0.4119})
    return stream.getvalue()


def test_without_a_terminal_there_are_only_lines_each_so_many_steps_and_at_the_end():
    assert run_progress(io.StringIO(), range(1, 11)).splitlines() == [
        "step 4/10  loss 2.3412  tokens/s 12.3k  mfu 41.2%  eta 0:01:00",
        "step 8/10  loss 2.3412  tokens/s 12.3k  mfu 41.2%  eta 0:00:20",
        "step 10/10  loss 2.3412  tokens/s 12.3k  mfu 41.2%",
    ]


def test_steps_that_skip_a_multiple_are_still_logged():
    text = run_progress(io.StringIO(), [3, 6, 9, 10], unit="row")
    assert [line.split("  ")[0] for line in text.splitlines()] == [
        "row 6/10",
        "row 9/10",
        "row 10/10",
    ]


def test_a_resumed_run_starts_where_it_was_and_counts_only_its_own_time():
    text = run_progress(io.StringIO(), range(7, 11), initial=6)
    assert [line.split("  ")[0] for line in text.splitlines()] == ["step 8/10", "step 10/10"]
    assert "eta 0:00:20" in text


def test_a_terminal_gets_a_bar_and_the_same_lines():
    text = run_progress(Terminal(), range(1, 11), description="stage 1")
    assert "stage 1" in text
    assert "100%" in text
    assert "step 8/10  loss 2.3412" in text


def test_a_progress_that_is_not_enabled_says_nothing():
    assert run_progress(Terminal(), range(1, 11), enabled=False) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.5, "0.5"), (999, "999"), (999.7, "1.00k"), (1234, "1.23k"), (12345, "12.3k"),
        (9.999e3, "10.0k"), (999_999, "1.00M"), (1234567, "1.23M"), (-2.5e9, "-2.50G"),
        (3.2e14, "320T"), (5e18, "5000P"), (math.inf, "inf"), (math.nan, "nan"),
    ],
)  # fmt: skip
def test_human_numbers(value, text):
    assert human(value) == text


@given(st.floats(1e-3, 1e17))
def test_human_numbers_are_short_and_within_half_a_percent(value):
    text = human(value)
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}.get(text[-1], 1.0)
    assert float(text.rstrip("kMGTP")) * scale == pytest.approx(value, rel=5.1e-3)
    assert len(text) <= 8


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (130, "0:02:10"), (90061, "1d 1:01:01"), (math.inf, "?")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_fields_are_formatted_by_what_their_name_says():
    assert format_field("held_out/accuracy", 0.7125) == "71.2%"
    assert format_field("pairs/s", 81234.0) == "81.2k"
    assert format_field("lr", 3e-4) == "3.00e-04"
    assert format_field("epoch", 2.0) == "2"
    assert format_field("loss", math.nan) == "nan"


TABLE = Table(
    ["subset", "pairs", "accuracy"],
    [["a|b <i>", 120, "71.2% [68.0, 74.1]"], ["all", 4, None], ["c\nd", 1, 0.5]],
)


def test_a_table_is_aligned_on_the_console():
    assert TABLE.text().splitlines() == [
        "subset   pairs            accuracy",
        "-------  -----  ------------------",
        "a|b <i>    120  71.2% [68.0, 74.1]",
        "all          4                   \N{EN DASH}",
        "c d          1               0.500",
    ]


def test_a_table_in_markdown_keeps_its_columns_whatever_the_cells_hold():
    assert TABLE.markdown().splitlines() == [
        "| subset | pairs | accuracy |",
        "| --- | ---: | ---: |",
        "| a\\|b <i> | 120 | 71.2% [68.0, 74.1] |",
        "| all | 4 | \N{EN DASH} |",
        "| c d | 1 | 0.500 |",
    ]


def test_a_table_in_html_is_escaped():
    assert "<td>a|b &lt;i&gt;</td>" in TABLE.html()
    assert '<th scope="col" class="number">pairs</th>' in TABLE.html("a `caption`")
    assert "<caption>a <code>caption</code></caption>" in TABLE.html("a `caption`")


def test_a_ragged_row_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 headers"):
        Table(["a", "b"], [[1, 2], [3]])


STEPS = np.arange(5)


def all_figures():
    return [
        loss_curves({"train": (STEPS, [3.0, 2.0, math.nan, 1.5, 1.4])}, "nats", {"floor": 0.325}),
        loss_curves({"a": (STEPS, STEPS + 1.0), "b": ([4], [2.0])}),
        training_accuracy({"train": (STEPS, [0.4, 0.6, 0.7, math.nan, 0.9])}),
        accuracy_bars(
            ["one", "another test set"], ["before", "after"],
            [[0.5, 0.9], [0.6, math.nan]],
            [[0.4, 0.8], [0.5, math.nan]],
            [[0.6, 1.0], [0.7, math.nan]],
            {"one": 0.55},
        ),
        reliability_diagram(reliability([0.2, 0.6, 0.9, 0.99]), "held out"),
    ]  # fmt: skip


class Page(HTMLParser):
    """Checks on the way that tags are balanced, and keeps elements with their attributes."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page_text(tmp_path_factory):
    report = Report("Run & <result>", "in `4` minutes")
    report.section("What happened", "One <b> paragraph.\n\nAnother with `code`.")
    report.table(TABLE, "Table 1.")
    for number, figure in enumerate(all_figures(), start=1):
        report.figure(figure, f"Figure {number}.", alt=f'figure {number}, "quoted" & plain')
    report.code("\npython -m gram_jax.score --input=<file>\n")
    path = report.save(tmp_path_factory.mktemp("report") / "new" / "report.html")
    assert [other.name for other in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_the_report_is_a_page_with_balanced_tags_a_title_and_a_language(page_text):
    page = Page(page_text)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all(
        "meta"
    )
    assert "<title>Run &amp; &lt;result&gt;</title>" in page_text
    assert "<p>One &lt;b&gt; paragraph.</p>\n<p>Another with <code>code</code>.</p>" in page_text
    assert "<pre><code>python -m gram_jax.score --input=&lt;file&gt;</code></pre>" in page_text
    assert "prefers-color-scheme: dark" in page_text


def test_the_report_loads_nothing_from_anywhere(page_text):
    page = Page(page_text)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if not name.startswith("xmlns"):
                assert "://" not in (value or ""), (tag, name, value)
            if name in ("href", "xlink:href", "src"):
                assert value.startswith("#"), (tag, name, value)
    assert "@import" not in page_text
    assert page_text.count("://") == sum("xmlns" in n for _, a in page.elements for n in a)


def test_every_figure_has_a_label_a_view_box_and_ids_of_its_own(page_text):
    page = Page(page_text)
    drawings = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(drawings) == len(all_figures())
    assert drawings[0]["aria-label"] == 'figure 1, "quoted" & plain'
    assert all("viewbox" in svg and "width" not in svg for svg in drawings)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        if (attributes.get("xlink:href") or "").startswith("#"):
            assert attributes["xlink:href"][1:] in ids
    clips = {part.split(")")[0] for part in page_text.split("url(#")[1:]}
    assert clips <= set(ids)


def test_inline_drawings_are_well_formed(page_text):
    for part in page_text.split("<svg ")[1:]:
        ElementTree.fromstring("<svg " + part.split("</svg>")[0] + "</svg>")


def test_the_same_figures_give_the_same_page():
    pages = []
    for _ in range(2):
        report = Report("twice")
        report.figure(all_figures()[0], "", alt="a curve")
        pages.append(report.html())
    assert pages[0] == pages[1]


def test_a_figure_without_alt_text_is_an_error():
    with pytest.raises(ValueError, match="alt text"):
        Report("r").figure(all_figures()[0], "caption", alt=" ")


def test_bars_need_arrays_of_groups_by_stages():
    with pytest.raises(ValueError, match=r"low has shape \(1,\).*\(1, 2\)"):
        accuracy_bars(["g"], ["a", "b"], [[0.5, 0.6]], [0.4], [[0.6, 0.7]])
    with pytest.raises(ValueError, match="none of the groups"):
        accuracy_bars(["g"], ["a"], [[0.5]], [[0.4]], [[0.6]], {"h": 0.5})
