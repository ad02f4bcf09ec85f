"""Image classifiers of transformers, from the hub or a local folder: safetensors only, never code from a repository.

The model card stores the configuration, so that a saved model can be rebuilt without the hub.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import Tensor, nn

from nayer_edge.config import InputSpec
from nayer_edge.errors import WRONG_ARGUMENT, MissingError, UsageError, missing_extra, on_meta
from nayer_edge.models.names import ModelName
from nayer_edge.runtime import hub

PROBE_PIXELS = 512
"""side of the constant images given to an image processor"""
OTHER_PIXELS = 384
"""side of another one: its output has the same size if the processor resizes"""
COLOUR = (0, 51, 255)
"""a colour whose channels can be told apart"""
REFUSED = ("timm_wrapper",)
"""refused model types: this one passes its configuration to a function that reads files"""


def build(
    model: ModelName,
    spec: InputSpec,
    classes: Sequence[str],
    arguments: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Builds an untrained classifier.

    Args:
        arguments: configuration keys to override.
        config: the configuration from a card; None: read it from the folder or the hub.

    Returns:
        The network, and its configuration.

    Raises:
        UsageError: there is no such folder or model, or transformers has no image classifier of this type.
        MissingError: transformers is not installed, or the hub cannot be reached.
    """
    with _quiet(model) as transformers:
        from huggingface_hub.errors import StrictDataclassError

        try:
            values = dict(config) if config is not None else _config_of(transformers, model).to_dict()
            kind = str(values.get("model_type"))
            # Keys that would run code from a repository, and local paths.
            # The type in which weights are stored is not that of the network.
            for key in ("auto_map", "_name_or_path", "name_or_path", "quantization_config", "dtype", "torch_dtype"):
                values.pop(key, None)
            if kind in REFUSED:
                raise UsageError(
                    f"{model.portable} is a timm network wrapped by transformers.",
                    fix=f"Use timm:{values.get('architecture', '<architecture>')}, and set teacher.weights to its "
                    "model.safetensors.",
                )
            settings = transformers.AutoConfig.for_model(kind, **{k: v for k, v in values.items() if k != "model_type"})
            unknown = [name for name in arguments if not hasattr(settings, name)]
            if unknown:
                raise UsageError(f"The configuration of {model.portable} has no {', '.join(unknown)}.")
            settings.update(dict(arguments))
            if (problem := getattr(settings, "problem_type", None)) not in (None, "single_label_classification"):
                raise UsageError(
                    f"{model.portable} is not a single-label classifier.",
                    why=f"Its config.json has problem_type = {problem}.",
                    fix="Use a model that was trained with one label per image. If this one was, correct config.json.",
                )
            if config is None:
                settings.id2label = dict(enumerate(classes))
                settings.label2id = {label: number for number, label in enumerate(classes)}
                if hasattr(settings, "num_channels"):
                    settings.num_channels = spec.channels
            network = transformers.AutoModelForImageClassification.from_config(settings, trust_remote_code=False)
        except (*WRONG_ARGUMENT, StrictDataclassError) as error:
            if on_meta(error):
                raise
            raise UsageError(
                f"transformers cannot build an image classifier from {model.portable}.",
                why=str(error).splitlines()[0] if str(error) else type(error).__name__,
                fix="Use an image classification model (ResNet, RegNet, MobileNet, EfficientNet, …).",
            ) from error
    kept = {"model_type": kind, **_plain(settings.to_diff_dict())}
    kept |= {"id2label": _plain(settings.id2label), "label2id": dict(settings.label2id)}
    return network, kept


def own_weights(model: ModelName) -> dict[str, Tensor]:
    """The weights published with the model.

    Raises:
        MissingError: they are not on this machine, and the hub cannot be reached.
        UsageError: there are none in the safetensors format, or they do not match the configuration.
    """
    with _quiet(model) as transformers:
        try:
            _require_hub(model)
            network, found = transformers.AutoModelForImageClassification.from_pretrained(
                model.name, use_safetensors=True, output_loading_info=True, **_options(model)
            )
        except SafetensorError as error:
            raise UsageError(f"The weights of {model.portable} are damaged.", why=f"{error}") from error
        except OSError as error:
            if model.path is not None:
                raise UsageError(
                    f"{model.portable} has no safetensors weights.",
                    why=str(error).splitlines()[0],
                    fix="Save it with model.save_pretrained(folder), which writes model.safetensors.",
                ) from error
            raise _unreachable(model, error) from error
        except (ValueError, RuntimeError, ImportError) as error:
            # ImportError: the weights are quantized by a library that is not installed.
            raise UsageError(f"{model.portable} cannot be loaded.", why=str(error).splitlines()[0]) from error
    absent = sorted(found.get("missing_keys") or ())
    if absent:
        raise UsageError(
            f"The weights of {model.portable} lack {len(absent)} tensors of its network.",
            why=f"transformers would initialise {', '.join(absent[:3])} at random: a model that was not trained as a "
            "classifier has no head.",
            fix="Use a model that was trained for image classification.",
        )
    return network.state_dict()


def labels(config: Mapping[str, Any]) -> list[str]:
    """The class names in a configuration; empty if it has only numbers."""
    names = {int(number): str(label) for number, label in dict(config.get("id2label") or {}).items()}
    if not names or all(label == f"LABEL_{number}" for number, label in names.items()):
        return []
    return [names[number] for number in sorted(names)]


def published_labels(model: ModelName) -> list[str]:
    """The class names of a model in a folder or on the hub; empty if it has only numbers."""
    with _quiet(model) as transformers:
        return labels(_config_of(transformers, model).to_dict())


class UnknownSizeError(UsageError):
    """The image processor of a model does not tell its input size."""


def input_of(model: ModelName) -> dict[str, Any]:
    """Channels, height, width, mean and std, found by passing constant images through the image processor.

    Its outputs for three brightness levels give an affine map per channel, whatever its settings are called, and that
    for a colour shows the order of the channels. Their size is the model's input size.

    Raises:
        UnknownSizeError: the image processor does not resize.
        UsageError: it has no image processor, or one that does more than resize and normalise.
        MissingError: transformers is not installed, or the hub cannot be reached.
    """
    with _quiet(model) as transformers:
        try:
            _require_hub(model)
            processor = transformers.AutoImageProcessor.from_pretrained(model.name, **_options(model))
            dark, grey, bright = (_constant(processor, (level,) * 3) for level in (0, 51, 255))
            colour = _constant(processor, COLOUR)
            smaller = _constant(processor, (51,) * 3, OTHER_PIXELS)
        except OSError as error:
            if model.path is not None:
                raise UsageError(
                    f"{model.portable} has no preprocessor_config.json, so its input is unknown.",
                    fix="Set [teacher.input]: channels, height, width, mean and std.",
                ) from error
            raise _unreachable(model, error) from error
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError) as error:
            raise UsageError(
                f"transformers cannot read or use the image processor of {model.portable}.",
                why=str(error).splitlines()[0] if str(error) else type(error).__name__,
                fix="Set [teacher.input]: channels, height, width, mean and std.",
            ) from error
    low, middle, high = (image.mean(axis=(1, 2), dtype=np.float64) for image in (dark, grey, bright))
    gain = high - low
    if not np.allclose(middle, low + gain / 5, atol=1e-4) or not (gain > 0).all() or np.ptp(dark, axis=(1, 2)).any():
        raise UsageError(
            f"The image processor of {model.portable} does more than resize and normalise.",
            fix="Set [teacher.input]: channels, height, width, mean and std.",
        )
    channels, height, width = dark.shape
    if channels == len(COLOUR):
        expected = low + gain * np.array(COLOUR) / 255
        seen = colour.mean(axis=(1, 2), dtype=np.float64)
        if not np.allclose(seen, expected, atol=1e-3):
            turned = np.allclose(seen, low + gain * np.array(COLOUR[::-1]) / 255, atol=1e-3)
            raise UsageError(
                f"The image processor of {model.portable} "
                + ("reverses the channels: the model expects BGR." if turned else "mixes the channels."),
                why="Images are given to models as RGB.",
                fix="Reverse the input channels of its first convolution (weight.flip(1)), save the model, and set "
                "do_flip_channel_order to false in preprocessor_config.json."
                if turned
                else "Set [teacher.input], if the model does expect RGB: channels, height, width, mean and std.",
            )
    if smaller.shape != grey.shape:
        raise UnknownSizeError(
            f"The image processor of {model.portable} does not resize, so the model's input size is unknown.",
            fix="Set [teacher.input]: channels, height, width, mean and std.",
        )
    return {
        "channels": channels,
        "height": height,
        "width": width,
        "mean": tuple(_rounded(value) for value in -low / gain),
        "std": tuple(_rounded(value) for value in 1 / gain),
    }


def _constant(processor: Any, colour: tuple[int, ...], pixels: int = PROBE_PIXELS) -> np.ndarray:
    """What the image processor makes of a square of one RGB colour."""
    image = np.full((pixels, pixels, 3), colour, dtype=np.uint8)
    return np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0])


def _rounded(value: float) -> float:
    return float(f"{value:.5g}") + 0.0


def _plain(value: Any) -> Any:
    """The value after a round trip through JSON, whose keys are strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _config_of(transformers: Any, model: ModelName) -> Any:
    if model.path is None and (model.local or model.name.startswith(".")):
        raise UsageError(f"There is no folder {model.name}.", fix="Give hf: a folder with config.json, or a hub id.")
    try:
        _require_hub(model)
        return transformers.AutoConfig.from_pretrained(model.name, **_options(model))
    except OSError as error:
        if model.path is not None:
            raise UsageError(
                f"{model.portable} has no readable config.json.",
                why=str(error).splitlines()[0],
                fix="Save the model with model.save_pretrained(folder).",
            ) from error
        raise _unreachable(model, error) from error


def _options(model: ModelName) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": model.path is not None}
    return options | ({"revision": model.revision} if model.revision else {})


def _require_hub(model: ModelName) -> None:
    if model.path is None:
        hub.require(model.name, revision=model.revision)


def _unreachable(model: ModelName, error: Exception) -> MissingError:
    return MissingError(
        f"The model {model.portable} is not on this machine and could not be downloaded from the hub.",
        why=str(error).splitlines()[0] if str(error) else type(error).__name__,
        fix=f"Check its name; or run hf download {model.name} --local-dir FOLDER on a machine with network access, "
        "copy the folder here, and use hf:FOLDER.",
    )


@contextlib.contextmanager
def _quiet(model: ModelName) -> Iterator[Any]:
    """transformers, without its progress bars and warnings."""
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise missing_extra("transformers", "cpu", f"The model {model.portable}") from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield transformers
    finally:
        logging.set_verbosity(verbosity)
