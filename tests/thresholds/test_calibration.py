"""The calibration file: what is read is what was written, or is refused with a sentence; and the backend heeds it."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random
import stat

import pytest
import torch
from test_record import Fused, Model

from sparge_compile import Calibration, Options, attach
from sparge_compile.thresholds import json_file
from sparge_compile.thresholds.calibration import from_points
from sparge_compile.thresholds.choice import choose
from sparge_compile.thresholds.fronts import Point
from sparge_compile.thresholds.measured import CHECKED, Origin
from sparge_compile.thresholds.site_curves import PhaseCurves, SiteCurves

FAST = {"min_seq_len": 0, "inner": "eager"}


def head(shift: float) -> tuple[Point, ...]:
    return tuple(Point(k, p, k, (1 - k) * shift, (1 - k) * shift / 2) for k, p in ((0.1, 0.0), (0.3, 0.2), (0.6, 0.4)))


def measured_calibration(
    phases: int = 2, sites=("blocks.0", "blocks.1"), heads: int = 2, head_size: int = 16, **changes
) -> Calibration:
    """A calibration as a run would leave it, for the small models of these tests."""
    curves = {
        site: SiteCurves(
            head_size,
            8,
            tuple(PhaseCurves(10.0, tuple(head(0.1 * (1 + i + j + k)) for k in range(heads))) for j in range(phases)),
        )
        for i, site in enumerate(sites)
    }
    about = {
        "model": "Model",
        "created_with": "torch 2",
        "device": "cpu",
        "query_block": 128,
        "key_block": 64,
        "by": "worst",
        "mode": "hybrid",
        "seed": 0,
        "query_blocks": 32,
        "batches": 8,
        "complete": True,
        "target_error": 0.12,
        "modes": {"hybrid": 0.5},
        "held_out": {**dict.fromkeys(CHECKED, 0.1), "within": 1.0},
    }
    origin = Origin(**{**about, **changes}, curves=curves)
    starts = [0.2, 0.6][: phases - 1]
    return from_points(origin, starts, choose(origin))


@pytest.mark.parametrize(
    "calibration",
    [
        measured_calibration(),
        measured_calibration(1),
        Calibration({"*": [(1, 0)]}, phases={0.2: {"*": [(0.1, 0.3)]}}),
        Calibration({}),
    ],
)
def test_saving_and_loading_changes_nothing(tmp_path, calibration):
    path = tmp_path / "c.json"
    calibration.save(path)
    loaded = Calibration.load(path)
    assert loaded == calibration and loaded.to_dict() == calibration.to_dict()
    assert [x.name for x in tmp_path.iterdir()] == ["c.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, "a file that is shared can be read by others"


def test_files_of_the_first_version_load_and_may_be_written_by_hand(tmp_path):
    path = tmp_path / "c.json"
    sites = {"blocks.*": {"thresholds": [[0.3, 0.1]]}, "head": {"thresholds": [[0.5, 0], [1, 0]]}}
    path.write_text(json.dumps({"format": "sparge-calibration", "format_version": 1, "sites": sites}))
    loaded = Calibration.load(path)
    assert loaded.lookup("blocks.7", 2) == ((0.3, 0.1),) * 2 and loaded.lookup("head", 2)[1] == (1.0, 0.0)
    assert loaded.origin is None and loaded.summary() is None


def places(value, path=()):
    """Every place in a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def put(document, path, change):
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = change(document[path[-1]])


BAD = [
    None,
    True,
    "x",
    "",
    [],
    {},
    -1,
    0,
    2.5,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    [[]],
    {"a": 1},
    [0.5, 0.5],
    0.999,
]


def mutations(text: str, number: int):
    """(what, bytes): files cut off, with other bytes, with other values, fields and orders; signed or not."""
    draw, document = random.Random(0), json.loads(text)
    every = [path for path in places(document) if path]
    for i in range(number):
        changed, kind, signed = copy.deepcopy(document), i % 5, i % 2 == 0
        if kind == 0:
            cut = draw.randrange(len(text))
            yield f"cut at {cut}", text[:cut].encode()
            continue
        if kind == 1:
            at = draw.randrange(len(text))
            yield f"byte at {at}", text[:at].encode() + bytes([draw.randrange(256)]) + text[at + 1 :].encode()
            continue
        path = draw.choice(every)
        if kind == 2:
            value = draw.choice(BAD)
            put(changed, path, lambda old, value=value: value)
            what = f"{path} = {value!r}"[:90]
        elif kind == 3:
            target = changed
            for key in path[:-1]:
                target = target[key]
            if draw.random() < 0.5 and isinstance(target, dict):
                target["surprise"] = 1
                what = f"unknown field in {path[:-1]}"
            else:
                del target[path[-1]]
                what = f"no {path}"
        else:
            lists = [p for p in every if isinstance(_at(changed, p), list) and len(_at(changed, p)) > 1]
            path = draw.choice(lists)
            put(changed, path, lambda old: old[::-1])
            what = f"swapped {path}"
        if signed:
            try:
                changed["checksum"] = json_file.checksum(changed)
            except (ValueError, OverflowError):
                signed = False
        yield f"{what}{', signed' if signed else ''}", json.dumps(changed).encode()


def _at(document, path):
    for key in path:
        document = document[key]
    return document


@pytest.mark.parametrize(
    "calibration",
    [
        measured_calibration(),
        Calibration({"a.*": [(0.5, 0.1), (0.25, 0.0)]}, phases={0.5: {"a.*": [(0.1, 0.0), (0.2, 0.0)]}}),
    ],
    ids=["measured", "plain"],
)
def test_of_200_changed_files_each_is_refused_with_a_sentence_or_means_what_it_says(tmp_path, calibration):
    path = tmp_path / "c.json"
    calibration.save(path)
    text, refused, loaded = path.read_text(), 0, 0
    for what, content in mutations(text, 200):
        path.write_bytes(content)
        try:
            got = Calibration.load(path)
        except ValueError as error:
            refused += 1
            assert "got" in str(error) and "allowed" in str(error), what
            assert str(path) in str(error), what
            continue
        loaded += 1
        # What loads says of itself what the file says: nothing was left out, and nothing put in its place.
        said = json.loads(content)
        said.pop("checksum")
        assert {**got.to_dict(), "created_by": said["created_by"]} == said, what
        assert all(0 < k <= 1 and 0 <= p <= 1 for pairs in got.sites.values() for k, p in pairs), what
        assert got.table() and repr(got), what
    assert refused > 120 and loaded > 0, (refused, loaded)


def test_heads_that_were_swapped_by_hand_are_refused(tmp_path):
    path = tmp_path / "c.json"
    measured_calibration().save(path)
    document = json.loads(path.read_text())
    document["sites"]["blocks.0"]["thresholds"][0].reverse()
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="edited by hand"):
        Calibration.load(path)


def test_a_duplicate_key_a_newer_format_and_another_file_say_what_they_are(tmp_path):
    path = tmp_path / "c.json"
    measured_calibration().save(path)
    text = path.read_text()
    for content, words in (
        (text.replace('"format_version": 2', '"format_version": 8'), "newer version"),
        (text.replace('"phases"', '"format": "x", "phases"'), "stands twice"),
        ('{"a": 1}', "format name"),
        ("[" * 100_000, "not JSON"),
        ("\xff", "not JSON"),
    ):
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=words):
            Calibration.load(path)


@pytest.mark.parametrize(
    "load", [Calibration.load, lambda path: attach(torch.nn.Linear(2, 2), path), lambda path: Options(calibration=path)]
)
def test_a_missing_file_is_named_and_how_one_is_made(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no calibration file: got 'no.json' in .*; allowed: .*sparge calibrate"
    ):
        load("no.json")


def run(model, x, calibration, **options):
    with torch.no_grad():
        return torch.compile(model, backend="sparge", options={**FAST, "calibration": calibration, **options})(x)


def test_the_backend_uses_the_file_and_attached_buffers_travel_in_a_state_dict(tmp_path):
    path, x = tmp_path / "c.json", torch.randn(1, 1500, 32)
    calibration = measured_calibration(1)
    calibration.save(path)
    model = Model(Fused).eval()
    got = run(model, x, path)
    assert (got - run(model, x, None, topk=1.0, topp=0.0)).abs().max() > 1e-3
    torch.testing.assert_close(got, run(model, x, Calibration(calibration.sites)))
    attached, other = copy.deepcopy(model), copy.deepcopy(model)
    attach(attached, path)
    attach(other, Calibration({name: [(1.0, 0.0)] * 2 for name in calibration.sites}))
    other.load_state_dict(attached.state_dict())
    torch.testing.assert_close(run(other, x, None), got)


def test_the_file_of_another_model_is_refused():
    x, model = torch.randn(1, 700, 32), Model(Fused).eval()
    with pytest.raises(Exception, match="made for another model"):
        run(model, x, measured_calibration(1, sites=("layers.0.attention",)))
    with pytest.raises(Exception, match="thresholds for 3 heads"):
        run(model, x, measured_calibration(1, heads=3))
    with pytest.raises(Exception, match="heads of size 64"):
        run(model, x, measured_calibration(1, head_size=64))
    with pytest.raises(Exception, match="attach"):
        run(model, x, measured_calibration(2))
    with pytest.raises(Exception, match="1 heads"):
        run(model, x, measured_calibration(1, heads=1))


def test_a_site_without_thresholds_and_a_file_of_a_part_are_spoken_of():
    x, model = torch.randn(1, 700, 32), Model(Fused).eval()
    with pytest.warns(UserWarning, match="no thresholds for site 'blocks.1'"):
        run(model, x, measured_calibration(1, sites=("blocks.0",)))
    with pytest.warns(UserWarning, match="interrupted after 8 batches"):
        run(model, x, measured_calibration(1, complete=False))


def test_a_file_of_a_whole_model_serves_a_block_that_is_called_alone():
    """No stranger: the site is named shorter here, of which there is a warning."""
    block, x = Fused().eval(), torch.randn(1, 700, 32)
    holder = torch.nn.Module()
    holder.attn = block
    holder.forward = lambda x: holder.attn(x)
    with pytest.warns(UserWarning, match="but here the site is 'attn'"):
        run(holder, x, measured_calibration(1, sites=("blocks.0.attn",)))


@pytest.mark.parametrize(
    "phases",
    [
        {0.0: {"a": [(1, 0)]}},
        {1.0: {"a": [(1, 0)]}},
        {"0.5": {"a": [(1, 0)]}},
        {0.5: {"b": [(1, 0)]}},
        [0.5],
        {0.5: {"a": [(1, 0)] * 3}},
    ],
)
def test_bad_phases_are_refused(phases):
    with pytest.raises(ValueError, match="phases"):
        Calibration({"a": [(0.5, 0.0)] * 2}, phases=phases)


def test_a_calibration_is_shown_in_a_line_and_as_a_table():
    measured = measured_calibration(2, complete=False)
    # Of eight heads one keeps a tenth with an error of 0.09, three 0.6 with 0.08, and four stay dense.
    errors = "errors of heads 0.0413 on average, 0.0900 at most"
    assert repr(measured) == f"<Calibration: 2 sites, 2 phases, sparsity 26.2%, {errors}, not complete>"
    assert repr(Calibration({"*": [(1, 0)]})) == "<Calibration: 1 sites>"
    table = measured.table()
    assert table.startswith("NOT COMPLETE") and "aim: error 0.12, by the worst sample" in table
    assert len([line for line in table.splitlines() if line.startswith("blocks.")]) == 4, "sites × phases"
    held = dict.fromkeys(CHECKED, 0.1)
    assert "100.0% keep the bound" in table
    assert (
        "keep the bound" not in measured_calibration(1, target_error=None, target_sparsity=0.3, held_out=held).table()
    )
    assert "0.1–0.3" in Calibration({"a": [(0.1, 0.0), (0.3, 0.0)]}).table()


@pytest.mark.parametrize("measured", [False, True])
def test_tables_are_not_changed(measured):
    """Compiled code would not notice; a plain dict of the same entries is a step away."""
    pairs = [(0.5, 0.0)]
    calibration = measured_calibration() if measured else Calibration({"a": pairs}, {0.5: {"a": pairs}})
    digest, before = Options(calibration=calibration).digest(), calibration.to_dict()
    tables = [calibration.sites, calibration.phases, *calibration.phases.values()]
    for table in [*tables, *([calibration.origin.curves, calibration.origin.modes] if measured else [])]:
        key = next(iter(table))
        for change in (
            lambda t=table, k=key: t.__setitem__(k, t[k]),
            lambda t=table, k=key: t.__delitem__(k),
            lambda t=table, k=key: t.update({k: t[k]}),
            lambda t=table, k=key: t.pop(k),
            lambda t=table: t.clear(),
            lambda t=table: t.__ior__({}),
        ):
            with pytest.raises(TypeError, match=r"a Calibration cannot be changed.*attach"):
                change()
        plain = {**table}
        plain.clear()
    assert calibration.to_dict() == before and Options(calibration=calibration).digest() == digest
    for same in (pickle.loads(pickle.dumps(calibration)), copy.deepcopy(calibration), copy.copy(calibration)):
        assert same == calibration and Options(calibration=same).digest() == digest
        with pytest.raises(TypeError, match="cannot be changed"):
            same.sites["a"] = pairs
