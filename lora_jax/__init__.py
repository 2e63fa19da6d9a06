"""LoRA for any JAX model, as a pure transform of its parameter tree."""

from lora_jax import rules as rules
from lora_jax.interpret import RefusedError as RefusedError
from lora_jax.interpret import lora as lora
from lora_jax.interpret import register as register
from lora_jax.weight import FullWeight as FullWeight
from lora_jax.weight import LoraWeight as LoraWeight
from lora_jax.weight import NotUnderLoraError as NotUnderLoraError
