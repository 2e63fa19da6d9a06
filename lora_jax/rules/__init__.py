"""What each primitive does with a LoraWeight; importing this package registers the rules."""

from lora_jax.rules import algebra as algebra
from lora_jax.rules import control as control
from lora_jax.rules import custom as custom
from lora_jax.rules import linear as linear
from lora_jax.rules import shape as shape
