"""pyiqa's metrics: the face ones made from files that are checked, the others as pyiqa makes them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from texforce_face_iqa._torchvision import import_torchvision
from texforce_face_iqa.weights import Published, load_strictly, locate, read

import_torchvision()  # before pyiqa, which imports it

HUB = "chaofengc/IQA-PyTorch-Weights"
DETECTOR = Published(
    repository="github.com/xinntao/facexlib (release v0.1.0)",
    file="detection_Resnet50_Final.pth",
    sha256="6d1de9c2944f2ccddca5f5e010ea5ae64a39845a86311af6fdf30841b0a5a16d",
    option="detector",
)
_DETECTOR_URL = f"https://github.com/xinntao/facexlib/releases/download/v0.1.0/{DETECTOR.file}"

_OF_SETS = ("fid", "sfid", "fid_dinov2", "inception_score")


def no_reference_metrics() -> list[str]:
    """The metrics of pyiqa that judge one picture by itself."""
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    names = [name for name, config in DEFAULT_CONFIGS.items() if config["metric_mode"] == "NR"]
    return sorted(set(names) - {*_OF_SETS, "clipscore"})


def looks_for_faces(metric: str) -> bool:
    """Whether the metric judges a face that it looks for, and not the picture."""
    return "gfiqa" in _options(metric).get("model_name", "")


def _options(metric: str) -> dict[str, Any]:
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    return dict(DEFAULT_CONFIGS[metric]["metric_opts"])


def make_face_metric(metric: str, weights: str, detector: str, device: torch.device, *, allow_pickle: bool) -> Any:
    """pyiqa's metric with its face detector, both from files that fit and are official, or allowed.

    pyiqa would download a backbone that the weights then overwrite, and facexlib's face parser, which no score uses.

    Raises:
        FileNotFoundError: a file is not there and cannot be fetched.
        ValueError: a file is not what it should be.
    """
    from pyiqa.archs import topiq_arch
    from pyiqa.models.inference_model import InferenceModel

    model_name = _options(metric)["model_name"]
    published = _published(model_name)
    path = locate(published, weights, lambda: _from_hub(published))
    tensors = read(path, published, allow_pickle=allow_pickle)
    helper = _make_face_helper(detector, device, allow_pickle=allow_pickle)  # before the slower network is made
    empty_swin = functools.partial(_without_weights, topiq_arch.create_swin)
    with _replaced(topiq_arch, create_swin=empty_swin):
        # under its own name the network would make a helper itself
        made = InferenceModel(metric, device=device, model_name="", pretrained=False, backbone_pretrain=False)
    load_strictly(made.net, tensors, path, published)
    made.net.model_name, made.net.face_helper = model_name, helper
    return made


def _without_weights(create: Callable[..., Any], name: str, **options: Any) -> Any:
    return create(name, **{**options, "pretrained": False})


def _published(model_name: str) -> Published:
    from pyiqa.archs.topiq_arch import default_model_urls

    file = default_model_urls[model_name].rsplit("/", 1)[1]
    return Published(HUB, file, sha256=Path(file).stem.rsplit("-", 1)[1], option="weights")


def _from_hub(published: Published) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(published.repository, published.file)


def _make_face_helper(given: str, device: torch.device, *, allow_pickle: bool) -> Any:
    """facexlib's FaceRestoreHelper as pyiqa makes it, with this detector and without a parser."""
    from facexlib.detection.retinaface import RetinaFace
    from facexlib.utils import face_restoration_helper as facexlib_helper

    path = locate(DETECTOR, given, _fetch_detector)
    detector = RetinaFace(network_name="resnet50", device=device)
    load_strictly(detector, read(path, DETECTOR, allow_pickle=allow_pickle), path, DETECTOR)
    detector.eval()
    made = {"init_detection_model": lambda *_, **__: detector, "init_parsing_model": lambda *_, **__: None}
    with _replaced(facexlib_helper, **made):  # it would download both
        return facexlib_helper.FaceRestoreHelper(1, face_size=512, det_model="retinaface_resnet50", device=device)


def _fetch_detector() -> str:
    """Into the folder where pyiqa keeps it too."""
    from pyiqa.utils.download_util import DEFAULT_CACHE_DIR

    path = Path(DEFAULT_CACHE_DIR) / DETECTOR.file
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(_DETECTOR_URL, os.fspath(path), hash_prefix=DETECTOR.sha256)
    return os.fspath(path)


def make_metric(metric: str, device: torch.device) -> Any:
    """Another metric of pyiqa, made by pyiqa, which downloads what it needs; pickles are read with `weights_only`.

    Raises:
        RuntimeError: it cannot be made, for the want of a package, of a file or of a network.
    """
    from pyiqa.models.inference_model import InferenceModel
    from pyiqa.utils.download_util import DEFAULT_CACHE_DIR

    try:
        with _replaced(torch, load=_load_weights_only):
            return InferenceModel(metric, device=device)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"the metric '{metric}' of pyiqa needs the package '{error.name}', which is not among the pinned ones; "
            "install it into the environment of face-iqa, or take another metric"
        ) from error
    except Exception as error:  # the network boundary, and the files of others
        raise RuntimeError(
            f"pyiqa could not make the metric '{metric}' ({type(error).__name__}: {error}); where there is no network, "
            f"put its files into {DEFAULT_CACHE_DIR}"
        ) from error


_load = torch.load


@functools.wraps(_load)
def _load_weights_only(*arguments: Any, **options: Any) -> Any:
    return _load(*arguments, **{**options, "weights_only": True})


@contextlib.contextmanager
def _replaced(module: Any, **attributes: Any) -> Iterator[None]:
    """While this lasts, `module` has these attributes."""
    before = {name: getattr(module, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
