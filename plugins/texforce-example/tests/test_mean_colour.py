"""Run with: pip install pytest pillow texforce . ; pytest"""

import pytest
from PIL import Image
from texforce_example.reward import MeanColour


def test_the_colour_itself_scores_one_and_its_opposite_zero():
    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black")]
    assert MeanColour("white").score(pictures, ["a", "b"], [{}, {}]) == [1.0, 0.0]


def test_half_of_the_way_is_half_of_the_score():
    # from (255, 255, 255), (0, 255, 255) is one side of the cube away: 1 - 1 / sqrt(3)
    (found,) = MeanColour("white").score([Image.new("RGB", (2, 2), "cyan")], ["a"], [{}])
    assert found == pytest.approx(1 - 3**-0.5)


def test_the_contract():
    testing = pytest.importorskip("texforce_cli.testing")
    testing.check_reward("texforce_example", "mean-colour", options={"colour": "#ff8800"})
