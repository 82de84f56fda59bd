"""Makes our attention known to transformers as `attn_implementation="neoflix"`, in any program that imports this.

GPT-Neo takes its attention from a table of classes, every other architecture from a table of functions.
"""

from transformers import GPTNeoForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neo.modeling_gpt_neo import GPT_NEO_ATTENTION_CLASSES

from neoflix.model.attention import ATTENTION_NAME, GPTNeoFastAttention
from neoflix.model.continuous_batching import init_continuous_batching
from neoflix.model.packed_attention import attend_by_text_or_mask

GPT_NEO_ATTENTION_CLASSES[ATTENTION_NAME] = GPTNeoFastAttention
ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attend_by_text_or_mask)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, sdpa_mask)
GPTNeoForCausalLM.init_continuous_batching = init_continuous_batching
