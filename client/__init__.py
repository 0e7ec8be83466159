"""Use a model that the swarm hosts, as if it were local.

>>> from swarm.client import AutoDistributedModelForCausalLM
>>> model = AutoDistributedModelForCausalLM.from_pretrained("smollm2", initial_peers=["/ip4/…/p2p/12D3KooW…"])
>>> model.generate(input_ids, max_new_tokens=64)
"""

from swarm.client.inference_session import InferenceSession
from swarm.client.model import AutoDistributedModelForCausalLM, DistributedMixin
from swarm.client.network import Network
from swarm.client.remote_layers import RemoteCache
from swarm.client.sampling import Sampling
from swarm.client.session import Recovery
from swarm.client.settings import ClientSettings
from swarm.client.token_streams import Token, TokenStreams

__all__ = [
    "AutoDistributedModelForCausalLM", "ClientSettings", "DistributedMixin", "InferenceSession", "Network", "Recovery",
    "RemoteCache", "Sampling", "Token", "TokenStreams",
]  # fmt: skip
