"""Hybrid students as Hugging Face models. Importing this lets the Auto classes load them."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gendistill.models.cache import HybridCache
from gendistill.models.configuration import HybridConfig
from gendistill.models.modeling import GendistillForCausalLM, HybridForCausalLM, HybridModel

AutoConfig.register(HybridConfig.model_type, HybridConfig)
AutoModel.register(HybridConfig, HybridModel)
AutoModelForCausalLM.register(HybridConfig, GendistillForCausalLM)

__all__ = ["GendistillForCausalLM", "HybridCache", "HybridConfig", "HybridForCausalLM", "HybridModel"]
