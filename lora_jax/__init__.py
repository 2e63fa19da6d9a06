"""LoRA for any JAX model, as a pure transform of its parameter tree."""

from lora_jax import rules as rules
from lora_jax.check import check_merge as check_merge
from lora_jax.checkpoint import load_adapter as load_adapter
from lora_jax.checkpoint import read_adapter as read_adapter
from lora_jax.checkpoint import save_adapter as save_adapter
from lora_jax.interpret import RefusedError as RefusedError
from lora_jax.interpret import lora as lora
from lora_jax.interpret import register as register
from lora_jax.params import Adapter as Adapter
from lora_jax.params import adapter as adapter
from lora_jax.params import attach as attach
from lora_jax.params import combine as combine
from lora_jax.params import labels as labels
from lora_jax.params import merge as merge
from lora_jax.params import partition as partition
from lora_jax.params import summary as summary
from lora_jax.params import swap as swap
from lora_jax.params import unmerge as unmerge
from lora_jax.params import wrap as wrap
from lora_jax.train import TrainState as TrainState
from lora_jax.train import make_train_step as make_train_step
from lora_jax.train import only_trainable as only_trainable
from lora_jax.weight import FullWeight as FullWeight
from lora_jax.weight import LoraWeight as LoraWeight
from lora_jax.weight import NotUnderLoraError as NotUnderLoraError
