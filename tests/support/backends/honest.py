"""The memory backend, cut down to what the kit needs to look at, for mutants to spoil."""

from dataclasses import replace

from hsmwrap.catalog import KeySpec, WrappingAlgorithm
from hsmwrap.testing.memory import MemoryBackend


class HonestBackend(MemoryBackend):
    algorithms = (WrappingAlgorithm.RSAES_OAEP_SHA_1, WrappingAlgorithm.SM2PKE)
    key_specs = tuple(KeySpec)

    def __init__(self, settings):
        super().__init__(replace(settings, algorithms=self.algorithms, key_specs=self.key_specs))
        self.readable = {}  # what a holder of its PIN could read, if it had one


class Sm4Only(HonestBackend):
    """A backend of few talents is right too."""

    algorithms = (WrappingAlgorithm.SM2PKE,)
    key_specs = (KeySpec.ALIYUN_SM4,)
