"""The reward `mean-colour`."""

from PIL import ImageColor, ImageStat

_FARTHEST = (3 * 255**2) ** 0.5


class MeanColour:
    """1 where the mean colour of the picture is `colour`, 0 where it is as far from it as black from white.

    Args:
        colour: a name ("orange") or #rrggbb.
    """

    def __init__(self, colour: str = "orange"):
        self.colour = ImageColor.getrgb(colour)[:3]

    def score(self, images, prompts, metadata):
        """One number an image, in order; `images` are PIL pictures."""
        return [1 - self._distance(ImageStat.Stat(image).mean) / _FARTHEST for image in images]

    def _distance(self, mean):
        return sum((a - b) ** 2 for a, b in zip(mean, self.colour)) ** 0.5
