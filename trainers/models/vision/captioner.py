"""Describes images with an image-to-text or vision-language model of transformers (BLIP, Florence-2, Qwen-VL)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.storage.node_cache import node_copy
from dreamfleet.trainers.distributed.device import best_device, explain_out_of_memory
from dreamfleet.trainers.models.pretrained import first_line, quiet_libraries

MEMORY = "a smaller --batch-size; a smaller model; or CUDA_VISIBLE_DEVICES= (empty), which runs on the CPU"
# Prompts for models that give nothing useful without one, by `model_type`; those with a chat template get CHAT.
PROMPTS = {"florence2": "<MORE_DETAILED_CAPTION>", "paligemma": "caption en"}
CHAT = "Describe this image in one paragraph."
# Models whose caption continues the prompt: "a photo of" becomes "a photo of a cat".
CONTINUING = frozenset(("blip", "git"))
TOKENS = 128  # default of the largest number of tokens of a description


class Captioner:
    """An image-to-text model of a local or s3:// folder in the format of transformers.

    ``prompt``: the instruction for models with a chat, the task of Florence-2 (`<CAPTION>`), the beginning of the
    caption of BLIP and GIT; "" for the model's default. Descriptions have at most ``max_tokens`` tokens and are
    deterministic. On a GPU the model computes in bfloat16, else in float32. Code of the folder is never run. Raises
    ModelError if the folder holds no such model.
    """

    @explain_out_of_memory(MEMORY)
    def __init__(self, place: str, *, prompt: str = "", max_tokens: int = TOKENS) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

        quiet_libraries()
        self._device = best_device()
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        with node_copy(place) as folder, explained(place, folder):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            self._processor = load_processor(folder, config.model_type)
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True)
        self._model: Any = model.eval().to(self._device)
        self._kind = str(config.model_type)
        tokenizer = self._processor.tokenizer
        self._has_chat = bool(getattr(self._processor, "chat_template", None) or tokenizer.chat_template)
        self._prompt = prompt or PROMPTS.get(self._kind, CHAT if self._has_chat else "")
        self._answers_only = not config.is_encoder_decoder and self._kind not in CONTINUING
        tokenizer.padding_side = "left" if self._answers_only else "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        own = self._model.generation_config or GenerationConfig()
        self._options = {"max_new_tokens": max_tokens, "do_sample": False, "num_beams": own.num_beams or 1}

    @explain_out_of_memory(MEMORY)
    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """Return a description of each RGB image, on one line."""
        asked: dict[str, Any] = {"images": list(images)}
        if self._has_chat:
            content = [{"type": "image"}, {"type": "text", "text": self._prompt}]
            chat = self._chat([{"role": "user", "content": content}])
            asked |= {"images": [[image] for image in images], "text": [chat] * len(images), "padding": True}
        elif self._prompt:
            asked |= {"text": [self._prompt] * len(images), "padding": True}
        inputs = self._processor(**asked, return_tensors="pt").to(self._device, self._model.dtype)
        ids = self._model.generate(**inputs, **self._options)
        if self._answers_only and "input_ids" in inputs:
            given = inputs["input_ids"]
            if ids.shape[1] > given.shape[1] and torch.equal(ids[:, : given.shape[1]], given):
                ids = ids[:, given.shape[1] :]
        texts = self._processor.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _chat(self, messages: list[dict[str, Any]]) -> str:
        asked: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
        holder = (
            self._processor if getattr(self._processor, "chat_template", None) else self._processor.tokenizer
        )
        return str(holder.apply_chat_template(messages, **asked))


def load_processor(folder: Path, model_type: str) -> Any:
    """Load the processor of an image-to-text model.

    Processors that also read videos need torchvision for it; without torchvision they are loaded without that part.
    Models without a processor of their own get their image processor and tokenizer.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        return _Parts(folder)
    kind: Any = getattr(transformers, name)
    if "video_processor" in kind.get_attributes() and not transformers.utils.is_torchvision_available():
        kind = _without_videos(kind)
    return kind.from_pretrained(folder, local_files_only=True)


@contextmanager
def explained(place: str, folder: Path) -> Iterator[None]:
    """Convert what transformers raises for an unusable model folder into a ModelError."""
    if not (folder / "config.json").exists():
        raise ModelError(f"{place} is no model folder of transformers: it has no config.json")
    try:
        yield
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"{place} cannot be loaded ({first_line(error)})") from error


def _without_videos(kind: Any) -> Any:
    """Return a subclass of a processor that loads and accepts None as its video processor."""

    class ForImages(kind):  # type: ignore[misc]  # the base is known only here
        @classmethod
        def _get_arguments_from_pretrained(
            cls, folder: Any, processor_dict: Any = None, **options: Any
        ) -> Any:
            from transformers import AutoImageProcessor, AutoTokenizer

            loaders = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
            return [
                loaders[name].from_pretrained(folder, local_files_only=True) if name in loaders else None
                for name in cls.get_attributes()
            ]

        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    ForImages.__name__ = kind.__name__
    return ForImages


class _Parts:
    """The image processor and tokenizer of a model without a processor, such as ViT-GPT2."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._images: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self.batch_decode: Callable[..., list[str]] = self.tokenizer.batch_decode

    def __call__(self, *, images: Sequence[Image.Image], return_tensors: str, **_: Any) -> Any:
        return self._images(images=images, return_tensors=return_tensors)
