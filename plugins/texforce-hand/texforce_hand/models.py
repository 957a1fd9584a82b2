"""MediaPipe's two hand models: out of the package where it brings them, else out of a `.task` file."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

PALM = "hand_detector.tflite"
LANDMARKS = "hand_landmarks_detector.tflite"
"""Their names in a `.task` file."""

_IN_PACKAGE = {
    PALM: Path("modules/palm_detection/palm_detection_full.tflite"),
    LANDMARKS: Path("modules/hand_landmark/hand_landmark_full.tflite"),
}
_ADVICE = (
    "give the path of Google's hand_landmarker.task with --reward-option hand.model=FILE.task, "
    "or use mediapipe 0.10.21, which brings the models"
)


@dataclass(frozen=True)
class Models:
    """The palm detector and the landmark model, each as the bytes of a `.tflite` file."""

    palm: bytes
    landmarks: bytes

    def task(self) -> bytes:
        """The two as one `.task` file: a zip in which they lie uncompressed, as MediaPipe wants them."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            for name, content in ((PALM, self.palm), (LANDMARKS, self.landmarks)):
                archive.writestr(zipfile.ZipInfo(name), content)  # without a date: the same models, the same bytes
        return packed.getvalue()


def find_models(model: str = "") -> Models:
    """The models of the `.task` file `model`, or, without one, of the installed mediapipe.

    Raises:
        FileNotFoundError: there is no such file, or mediapipe brings no models (it does in 0.10.21, not in 1.x).
        ValueError: the file is no `.task` with the two models.
    """
    return _from_task(Path(model).expanduser()) if model else _from_package()


def _from_task(path: Path) -> Models:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}' (option model); {_ADVICE}")
    try:
        with zipfile.ZipFile(path) as archive:
            return Models(archive.read(PALM), archive.read(LANDMARKS))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"'{path}' (option model) is no .task file with {PALM} and {LANDMARKS}; {_ADVICE}") from error


def _from_package() -> Models:
    found = importlib.util.find_spec("mediapipe")  # looks for the folder; importing it would take seconds
    if found is None or found.origin is None:
        raise FileNotFoundError(f"mediapipe is not installed and the option model is empty; {_ADVICE}")
    folder = Path(found.origin).parent
    for path in _IN_PACKAGE.values():
        if not (folder / path).is_file():
            raise FileNotFoundError(f"this mediapipe brings no '{path}' and the option model is empty; {_ADVICE}")
    return Models(*((folder / _IN_PACKAGE[name]).read_bytes() for name in (PALM, LANDMARKS)))
