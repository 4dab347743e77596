"""MoH language models of the Llama family, as ordinary transformers models (extra `llm`).

Importing `moh` is enough for `AutoModelForCausalLM.from_pretrained(directory)` to find them.
"""

from moh._extras import require

require("transformers", extra="llm")

from moh.models.llama.configuration import MoHLlamaConfig
from moh.models.llama.modeling import MoHLlamaForCausalLM, MoHLlamaModel, MoHLlamaPreTrainedModel

__all__ = ["MoHLlamaConfig", "MoHLlamaForCausalLM", "MoHLlamaModel", "MoHLlamaPreTrainedModel"]
