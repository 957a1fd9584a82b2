"""Pictures of results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from texforce_cli.report.curve import reward_curve
from texforce_cli.report.pictures import _width, _wrap, before_after, picture_grid, save_png

HOSTILE = "</script>\n\x00\u202e" + "word " * 400


def picture(level: int, size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), (level, level, level))


def test_the_pictures_of_a_grid_are_where_they_belong() -> None:
    rows = [[picture(10), picture(20)], [picture(30), picture(40)]]
    grid = np.asarray(picture_grid(rows, captions=["a", "b"], headers=["seed 0", "seed 1"], title="t"))[..., 0]
    tops = {level: np.argwhere(grid == level) for level in (10, 20, 30, 40)}
    assert all(len(found) >= 128 * 128 for found in tops.values())  # enlarged to be seen
    y = {level: found[:, 0].min() for level, found in tops.items()}
    x = {level: found[:, 1].min() for level, found in tops.items()}
    assert y[10] == y[20] < y[30] == y[40]
    assert x[10] == x[30] < x[20] == x[40]


def test_hostile_prompts_do_not_break_a_picture(tmp_path: Path) -> None:
    made = before_after(
        [picture(1)] * 3,
        [picture(2)] * 3,
        [HOSTILE] * 3,
        before_label="base",
        after_label=HOSTILE,
        title=HOSTILE,
        columns=2,
    )
    assert max(made.size) < 3000
    save_png(tmp_path / "a.png", made, {"prompt": HOSTILE, "seed": "1"})
    text = Image.open(tmp_path / "a.png").text  # type: ignore[attr-defined]
    assert text["seed"] == "1" and text["prompt"].startswith("</script>")


def test_large_pictures_keep_their_size() -> None:
    assert picture_grid([[picture(0, 512)]], captions=[""]).width < 600


def test_the_curve_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    rows = [{"images": i, "reward_mean": i / 9, "reward_std": 0.1, "approx_kl": 10.0**-i} for i in (1, 2, 3)]
    points = [{"images": 3, "mean": 1.0, "low": 0.5, "high": 1.5, "base": 0.2}]
    for name in ("a.png", "b.png"):
        reward_curve(rows, tmp_path / name, title="t", reward_label="r (kB)", evaluations=points)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert np.asarray(Image.open(tmp_path / "a.png").convert("L")).std() > 5
    flat = [{"images": 1, "reward_mean": 0.0, "reward_std": 0.0, "approx_kl": 0.0}]
    reward_curve(flat, tmp_path / "c.png", title="t", reward_label="r")
    assert (tmp_path / "c.png").exists()


def test_a_short_label_is_never_broken() -> None:
    font = ImageFont.load_default(13)
    for labels in (["base", "tuned"], ["a cat (base)", "a cat (tuned)"]):
        left = _width(labels, font, 128)
        assert [_wrap(label, font, left - 12) for label in labels] == labels
    assert "\n" in _wrap("two foxes in the park (tuned)", font, 128)
