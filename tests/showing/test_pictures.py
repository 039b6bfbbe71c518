"""Pictures and pages: they are drawn, hold what they shall, need nothing from outside, and say what is missing."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_calibration import measured_calibration
from test_record import Fused, Model

from sparge_compile import (
    Calibration,
    plot_calibration,
    plot_survey,
    side_by_side,
    survey,
    write_report,
)
from sparge_compile.showing.clips import frames_of, gif
from sparge_compile.showing.names import short_names

CALIBRATION = measured_calibration(2).described(model_id="a <b> & c", resolution="8x64x64")


@pytest.fixture(scope="module")
def seen():
    torch.manual_seed(0)
    model = Model(Fused, 2).eval()
    x = torch.randn(1, 700, 32)
    options = {"min_seq_len": 0, "calibration": Calibration(CALIBRATION.sites, CALIBRATION.phases)}
    return survey(model, x, options, call=lambda value: [model(value) for _ in range(4)])


class Page(HTMLParser):
    """Tags that are open, what is asked from elsewhere, sources of pictures, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        assert tag not in ("script", "link", "iframe")
        if tag not in ("meta", "img", "br", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in ("line", "circle", "polyline") or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def pictures(page: Page) -> list[Image.Image]:
    found = []
    for link in page.links:
        kind, content = re.fullmatch(r"data:image/(png|gif);base64,(.+)", link).groups()
        found.append(Image.open(io.BytesIO(base64.b64decode(content))))
        assert found[-1].format == kind.upper()
    return found


def test_a_page_holds_everything_and_asks_nothing_from_outside(seen, tmp_path):
    clips = {"dense": torch.rand(5, 16, 16), "sparse": torch.rand(5, 16, 16)}
    path = write_report(tmp_path / "page.html", CALIBRATION, seen, clips=clips)
    text = path.read_text("utf-8")
    page = Page(text)
    shown = pictures(page)
    assert shown[0].format == "GIF" and shown[0].n_frames == 5
    first = seen.sites[0]
    mean, *heads = shown[1:4]
    assert mean.size == (11, 6) and len(shown) == 1 + 2 * (1 + 2)
    sparsest = min(range(2), key=lambda h: first.block_map[h].sum().item())
    expected = first.block_map[sparsest]
    dark = torch.tensor(list(heads[0].convert("L").tobytes())).view(6, 11) < 128
    assert torch.equal(dark, expected), "a pixel for a block"
    for words in ("a <b> & c", "8x64x64", "blocks.*", f"{seen.sparsity:.1%}", "min_seq_len is reached", "Side by side"):
        assert words in page.text
    assert "width=device-width" in text and "http" not in text.replace("https://json-schema.org", "")
    for site in seen.sites:
        for value in site.by_head():
            assert f"{site.name}, head " in text and f"{value:.1%}" in text


@pytest.mark.parametrize("calibration", [CALIBRATION, Calibration({"a": [(0.5, 0)]}), measured_calibration(1)])
def test_a_page_of_a_file_alone(calibration, tmp_path):
    page = Page(write_report(tmp_path / "page.html", calibration, title="mine").read_text("utf-8"))
    assert "mine" in page.text and "The calibration as text" in page.text and not page.links
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(tmp_path / "page.html")


def test_a_page_of_a_survey_shows_what_a_pipeline_made(seen, tmp_path):
    from dataclasses import replace

    outputs = {"dense": SimpleNamespace(frames=torch.rand(1, 3, 3, 8, 8)), "sparse": SimpleNamespace(frames=None)}
    one = Page(write_report(tmp_path / "page.html", survey=replace(seen, **outputs)).read_text("utf-8"))
    assert all(link.startswith("data:image/png") for link in one.links), "one clip is no comparison"
    outputs["sparse"] = outputs["dense"]
    two = Page(write_report(tmp_path / "page.html", survey=replace(seen, **outputs)).read_text("utf-8"))
    drawn = plot_survey(replace(seen, **outputs), tmp_path / "s")
    assert drawn[-1].name == "s-clips.gif" and drawn[-1].exists()
    assert pictures(two)[0].n_frames >= 1 and two.links[0].startswith("data:image/gif")


def test_plots_of_a_calibration_and_of_a_survey(seen, tmp_path):
    drawn = plot_calibration(CALIBRATION, tmp_path / "c")
    assert [path.name for path in drawn] == ["c-heads.png", "c-curves.png", "c-steps.png"]
    drawn += plot_survey(seen, tmp_path / "s", site="blocks.1")
    assert [path.name for path in drawn[3:]] == ["s-map.png", "s-times.png", "s-calls.png"]
    for path in drawn:
        with Image.open(path) as picture:
            assert min(picture.size) > 100 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    with pytest.raises(ValueError, match=r"no map of this site.*blocks\.0, blocks\.1"):
        plot_survey(seen, tmp_path / "s", site="blocks.7")
    with pytest.raises(ValueError, match="without measurements"):
        plot_calibration(Calibration({"a": [(0.5, 0)]}), tmp_path / "c")


@pytest.mark.parametrize(
    "clip",
    [
        torch.rand(3, 8, 12),
        torch.rand(3, 8, 12, 3).numpy(),
        (torch.rand(3, 8, 12, 1) * 255).to(torch.uint8),
        [Image.new("RGB", (12, 8), (i, 0, 0)) for i in range(3)],
    ],
    ids=["grey", "array", "bytes", "pictures"],
)
def test_clips_of_any_kind_stand_side_by_side(clip, tmp_path):
    longer = torch.linspace(0, 1, 5).view(5, 1, 1).expand(5, 8, 12)
    path = side_by_side({"one": clip, "other": longer}, tmp_path / "clips.gif", height=16, rate=10)
    with Image.open(path) as shown:
        assert shown.n_frames == 5 and shown.info["duration"] == 100 and shown.info["loop"] == 0
        assert shown.height == 16 + 18 and shown.width >= 2 * 24
        shown.seek(4)
        frame = shown.convert("L")
        assert frame.getpixel((frame.width - 20, 30)) > 250, "the last frame of the longer one is white"
    low = Image.open(io.BytesIO(gif({"one": torch.rand(1, 64, 64)}, highest=32)))
    assert low.height == 32 + 18
    still = side_by_side({"one": clip[:1]}, tmp_path / "still.gif")
    with Image.open(still) as shown:
        assert shown.n_frames == 1 and shown.height == 21 * 8 + 18, "small ones are enlarged"


def test_a_picture_is_a_png_in_all_its_colours(tmp_path):
    picture = torch.rand(1, 64, 64, 3)
    path = side_by_side({"one": picture, "other": picture}, tmp_path / "pictures.png", height=64)
    with Image.open(path) as shown:
        assert shown.format == "PNG" and shown.size == (2 * 64 + 6, 64 + 18)
        found = torch.frombuffer(bytearray(shown.convert("RGB").tobytes()), dtype=torch.uint8).view(82, 134, 3)
    assert torch.equal(found[18:, -64:], (picture[0] * 255).round().to(torch.uint8))
    with pytest.raises(ValueError, match=r"a PNG is one picture: got 3 frames.*'clips.gif'"):
        side_by_side({"one": torch.rand(3, 8, 12)}, tmp_path / "clips.png")


@pytest.mark.parametrize("clip", [torch.rand(3, 8, 12, 2), torch.zeros(3, 8, 12, dtype=torch.int64), [], 5, "frames"])
def test_what_is_no_clip_is_refused(clip, tmp_path):
    with pytest.raises(ValueError, match="clip 'x'"):
        side_by_side({"x": clip}, tmp_path / "clips.gif")
    with pytest.raises(ValueError, match="0 clips"):
        side_by_side({}, tmp_path / "clips.gif")


def test_what_pipelines_give():
    video = torch.rand(2, 4, 3, 8, 8)
    assert torch.equal(frames_of(SimpleNamespace(frames=video)), video[0].movedim(1, -1))
    array = video.movedim(2, -1).numpy()
    assert frames_of(SimpleNamespace(frames=array)).shape == (4, 8, 8, 3)
    assert frames_of(SimpleNamespace(frames=[video[0, :3, 0]])).shape == (3, 8, 8), "three grey frames, no channels"
    pictures = [Image.new("RGB", (8, 8))] * 4
    assert frames_of(SimpleNamespace(frames=[pictures])) == pictures
    assert frames_of(SimpleNamespace(images=pictures)) == pictures[:1]
    for output in (video, SimpleNamespace(frames=video[0, 0]), SimpleNamespace(images=[]), SimpleNamespace()):
        assert frames_of(output) is None


def test_without_a_library_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    for name, package, draw in (
        ("matplotlib", "matplotlib", lambda: plot_calibration(CALIBRATION, tmp_path / "c")),
        ("jinja2", "jinja2", lambda: write_report(tmp_path / "c.html", CALIBRATION)),
        ("PIL.Image", "pillow", lambda: side_by_side({"x": torch.rand(1, 8, 8)}, tmp_path / "c.gif")),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, name, None)
            with pytest.raises(ImportError, match=rf"needs {package}.*pip install {package}.*\.\[plot\]"):
                draw()


def test_names_where_there_is_little_room():
    assert short_names(["blocks.0.attn1", "blocks.1.attn1"]) == (["0", "1"], "blocks.*.attn1")
    assert short_names(["a.0.x", "a.0.y"]) == (["x", "y"], "a.0.*")
    assert short_names(["a", "b"]) == (["a", "b"], "")
    assert short_names(["a.b"]) == (["a.b"], "")
    assert short_names(["double.0.attn", "single.0.attn", "single.1.attn"]) == (
        ["double.0", "single.0", "single.1"],
        "*.attn",
    )
    assert short_names(["attn", "blocks.0.attn"]) == (["attn", "blocks.0.attn"], "")
