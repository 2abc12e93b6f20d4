"""Generation with a hybrid student: its cache, its masks, and what a recurrent state cannot do."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache
from transformers.generation.utils import GenerationMixin

from gendistill.models.cache import HybridCache
from gendistill.models.configuration import HybridConfig
from gendistill.models.sequences import layer_masks

# settings that make transformers guess tokens and take back the wrong ones
_ASSISTED = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "is_assistant")


class HybridGeneration(GenerationMixin):
    """The part of a hybrid student that generates."""

    config: HybridConfig
    # transformers makes the masks of static caches before the forward pass
    create_masks_for_generate = staticmethod(layer_masks)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as every transformers model does; refuses what a recurrent state cannot do.

        Settings count wherever they are: in the call, its ``generation_config``, or the student's own.
        """
        if kwargs.get("assistant_model") is not None:
            raise _assisted("assistant_model")
        return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching, which pages keys and values only."""
        raise ValueError(
            "continuous batching does not support linear mixers; use generate() with a padded batch"
        )

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_generation_config(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        settings = prepared[0]
        for name in _ASSISTED:
            # not all of them exist in every version
            if getattr(settings, name, None) not in (None, False):
                raise _assisted(name)
        self._check_cache_implementation(settings.cache_implementation)
        return prepared

    def _check_cache_implementation(self, implementation: str | None) -> None:
        if implementation in (None, "dynamic"):
            return
        pure = set(self.config.layer_types or ()) == {"linear_attention"}
        device: Any = self.device  # pyright: ignore[reportAttributeAccessIssue]
        stranded = "offloaded" in implementation and device.type != "cuda"
        if pure or stranded or implementation in ("quantized", "paged"):
            place = f" on {device}" if stranded else ""
            raise ValueError(
                f'cache_implementation="{implementation}" cannot hold this student\'s states{place}; leave it out, '
                "also in generation_config.json"
            )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        prepare = super()._prepare_cache_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        result = prepare(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if given is None and type(cache) is DynamicCache and not cache.offloading:
            model_kwargs["past_key_values"] = HybridCache(self.config)
        return result


def _assisted(name: str) -> ValueError:
    return ValueError(
        f"assisted decoding ({name}) needs a cache that can be cropped; a linear mixer's state cannot: leave it out, "
        "also in generation_config.json"
    )
